"""Who feeds whom: runs a model once and follows tensors from producing modules to norm layers.

A tensor is known by the memory that it looks at, which is kept alive until the trace ends; never by the name or the
registration order of modules. Operations are seen as the dispatcher sees them, so that nothing that scripted or
functional code does goes by unnoticed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..modes import modes_kept, tensors_kept
from ..norm.producers import is_linear, is_producer, out_channels, own_forward
from ..norm.tap import is_watched
from .example import Arguments, copied, leaves_of, on_example, quietly

OWN_FORWARD = "whose forward is its own"  # behind the class of a conv or linear layer, as the origin of a norm's input


class Part(NamedTuple):
    """`channels` output channels, from `first` on, of the module of that name."""

    module: str
    first: int
    channels: int


@dataclass
class NormCall:
    """How a norm layer was reached: its input's origin, and what a decision about it depends on."""

    calls: int = 0
    parts: tuple[Part, ...] = ()  # the channels of the input, where all of them are outputs of producers
    origin: str = "the model's input"  # operation or module that made the input
    consumers: int = 0  # how many operations read one of the outputs, or a copy or view on the way to the norm
    producer_calls: int = 0  # how often a producer ran
    samples: int = 0  # along the first axis, in all calls
    split: bool = False  # whether these are the example's, some of them in each call


_Key = tuple[Any, ...]


@dataclass
class _Origin:
    tensor: Tensor
    label: str
    writes: int  # into its memory, when it was met
    parts: tuple[Part, ...] = ()  # what its channels are, for an output of a producer, a copy or a concatenation
    channels_last: bool = False  # as a Linear leaves them
    root: _Origin | None = None  # the tensor with parts that this one is a view of
    sources: Sequence[_Origin] = ()  # what it is a view, a copy or a concatenation of
    consumers: int = 0

    def consumed(self) -> int:
        """Readers of the tensor, or of one that it was made from without computing anything."""
        return max([self.consumers, *(source.consumed() for source in self.sources)])


class _Provenance(TorchDispatchMode):
    """Labels every tensor with the operation that made it, or last wrote to it, and counts its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[_Key, _Origin] = {}
        self.writes: Counter[int] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        read = {_key(t): t for t in _tensors((args, kwargs))}
        made = {_key(t): t for t in _tensors(out)}
        written = _written(func, args, kwargs)
        if made and not written and made.keys() <= read.keys():
            return  # all of it as it is, under another name
        sources = [self.origins[key] for key in read if key in self.origins]
        for source in sources:
            source.consumers += 1
        for t in written:
            self.writes[_memory(t)] += 1
            made[_key(t)] = t
        name = func._schema.name.split("::")[-1].strip("_").removeprefix("native_").removesuffix("_with_indices")
        parts = self._joined(*args, **kwargs) if name == "cat" else ()
        for key, t in made.items():
            self.origins[key] = self._origin(t, name, [] if written else sources, parts)

    def _joined(self, tensors: Sequence[Tensor], dim: int = 0) -> tuple[Part, ...]:
        """What the channels of a concatenation are, where all tensors hold outputs of producers."""
        parts = [self.parts_of(t, origin) for t in tensors if (origin := self.origin(t)) is not None]
        along_channels = dim in (1, 1 - tensors[0].dim())
        return sum(parts, ()) if along_channels and len(parts) == len(tensors) and all(parts) else ()

    def _origin(self, t: Tensor, name: str, sources: Sequence[_Origin], parts: tuple[Part, ...]) -> _Origin:
        new = _Origin(t, name, self.writes[_memory(t)], parts)
        if name == "cat":
            new.sources = sources if parts else ()
            return new
        for source in sources:
            if name == "clone" or _memory(source.tensor) == _memory(t):
                new.label, new.sources, new.root = source.label, [source], source.root or source
                if name == "clone":
                    self._copy_parts(new, source)
        return new

    def _copy_parts(self, new: _Origin, source: _Origin) -> None:
        """Gives a copy the parts of the tensor that it has the values of."""
        root = source.root or source
        new.root = None
        if source.tensor.shape == root.tensor.shape and source.tensor.stride() == root.tensor.stride():
            new.parts, new.channels_last = () if self.written(root) else root.parts, root.channels_last
        else:
            new.parts = self.parts_of(source.tensor, source)

    def produced(self, name: str, module: Any, output: Any) -> None:
        """To be called behind a producing module."""
        last = is_linear(module)
        # without a batch axis, which convs do without too, channels are on axis 0
        if isinstance(output, Tensor) and _has_memory(output) and (last or output.dim() == module.weight.dim()):
            parts = (Part(name, 0, out_channels(module)),)
            writes = self.writes[_memory(output)]
            self.origins[_key(output)] = _Origin(output, type(module).__name__, writes, parts, last)

    def made_by(self, kind: str, output: Any) -> None:
        """To be called behind a conv or linear layer of class `kind`, with a forward pass of its own."""
        if not isinstance(output, Tensor) or not _has_memory(output):
            return
        new = _Origin(output, "", self.writes[_memory(output)])
        origin = self.origins.setdefault(_key(output), new)
        if not origin.parts and origin.root is None:  # else it hands on what a layer inside of it made
            origin.label = f"{kind}, {OWN_FORWARD}"

    def origin(self, t: Tensor) -> _Origin | None:
        """What is known of a tensor."""
        return self.origins.get(_key(t))

    def read(self, tree: Any) -> None:
        """Counts one more reader of all tensors in a tree."""
        for origin in {id(o): o for t in _tensors(tree) if (o := self.origin(t)) is not None}.values():
            origin.consumers += 1

    def written(self, origin: _Origin) -> bool:
        """Whether something wrote into the tensor's memory since it was met."""
        return self.writes[_memory(origin.tensor)] != origin.writes

    def parts_of(self, t: Tensor, origin: _Origin) -> tuple[Part, ...]:
        """What the channels on axis 1 are, if t holds outputs of producers, its positions in their order.

        BatchNorm1d normalises axis 1, which is the features of a Linear only in [N, C] or after a rearrangement.
        """
        root = origin.root or origin
        if not root.parts or t.dim() < 2 or self.written(root):
            return ()
        paused, self.paused = self.paused, True
        made = root.tensor
        if root.channels_last:
            t, made = t.movedim(1, -1).flatten(0, -2), made.flatten(0, -2)
        self.paused = paused
        first = _first_channel(t, made)
        return () if first is None else _cut(root.parts, first, t.shape[1])


def _kept(value: Any) -> list[Any]:
    """The tensors in an attribute, as in self.features = [self.conv(x)]."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [t for t in inside if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _key(t: Tensor) -> _Key:
    return (_memory(t), t.storage_offset(), t.shape, t.stride(), t.dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and _has_memory(t)]


def _has_memory(t: Tensor) -> bool:
    """Whether a tensor is a view of memory with sizes and strides, which lazy, nested and vmapped ones are not."""
    if is_lazy(t):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
    return not t.is_nested and t.layout is torch.strided and not wrapped


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given.get(name) for name in writes])


def _cut(parts: Sequence[Part], first: int, channels: int) -> tuple[Part, ...]:
    """The parts of `channels` channels from `first` on."""
    cut, start = [], 0
    for part in parts:
        low, high = max(first, start), min(first + channels, start + part.channels)
        if low < high:
            cut.append(Part(part.module, part.first + low - start, high - low))
        start += part.channels
    return tuple(cut)


def _first_channel(t: Tensor, whole: Tensor) -> int | None:
    """Which channel of `whole` the view t of some of its channels begins with; None if it is none."""
    axes = [axis for axis in range(whole.dim()) if axis != 1]
    if _memory(t) != _memory(whole) or t.dim() != whole.dim() or any(t.shape[a] != whole.shape[a] for a in axes):
        return None
    if any(t.stride(a) != whole.stride(a) for a in range(t.dim()) if t.shape[a] > 1) or not whole.stride(1):
        return None
    first, rest = divmod(int(t.storage_offset() - whole.storage_offset()), whole.stride(1))
    return first if not rest and 0 <= first <= whole.shape[1] - t.shape[1] else None


def trace_norms(
    model: nn.Module, norms: dict[str, nn.Module], example_input: Any | None, training: bool = False
) -> dict[str, NormCall]:
    """Runs the model once without gradients; returns a NormCall per name in `norms`.

    Parameters, buffers, modes and random state are left as they were. Raises ConversionError if the model cannot run.

    Args:
        model: what is run.
        norms: those of its modules whose inputs are followed, by name.
        example_input: as in `on_example`.
        training: training mode for all but the layers with running statistics; eval mode otherwise.
    """
    with _mode(model, training):
        return on_example(model, example_input, lambda arguments: _trace(model, norms, arguments))[0]


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    # dynamo takes seconds to import, and nothing is compiled where nobody did
    compiling = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiling else nullcontext()
    kept = tensors_kept(model) if training else nullcontext()
    with modes_kept(model), kept, quietly(model), eager:
        model.train(training)
        for module in model.modules():
            if "running_mean" in module._buffers:
                module.eval()
        yield


def _trace(model: nn.Module, norms: dict[str, nn.Module], arguments: Arguments) -> dict[str, NormCall]:
    provenance = _Provenance()
    calls = {name: NormCall() for name in norms}
    origins: dict[str, _Origin] = {}
    runs: Counter[str] = Counter()

    def after_producer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            runs[name] += 1
            provenance.produced(name, module, output)

        return hook

    def after_own_forward(kind: str) -> Any:
        return lambda module, args, output: provenance.made_by(kind, output)

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call, x = calls[name], args[0] if args else next(iter(kwargs.values()))
            call.calls += 1
            call.samples += len(x) if x.dim() else 0
            if (origin := provenance.origin(x)) is not None:
                origins[name] = origin
                call.origin = origin.label
                call.parts = provenance.parts_of(x, origin)
                if not call.parts and (origin.parts or origin.root):
                    call.origin = f"a rearranged or changed output of {origin.label}"

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if is_producer(module):
                # before hooks of others, which may change the output
                hooks.callback(module.register_forward_hook(after_producer(name), prepend=True).remove)
            elif kind := own_forward(module):
                hooks.callback(module.register_forward_hook(after_own_forward(kind), prepend=True).remove)
            elif name not in norms and is_watched(module):
                seen = module.register_forward_hook(lambda module, *passed: provenance.read(passed), with_kwargs=True)
                hooks.callback(seen.remove)
        for name, module in norms.items():
            hooks.callback(module.register_forward_pre_hook(before_norm(name), with_kwargs=True).remove)
        args, kwargs = copied(arguments)
        with provenance:
            output = model(*args, **kwargs)

    provenance.read(leaves_of(output))
    provenance.read([_kept(value) for module in model.modules() for value in vars(module).values()])
    given = next((len(t) for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.dim()), 0)
    for name, call in calls.items():
        call.split = call.calls > 1 and call.samples == given
        if call.parts:
            call.producer_calls = max(runs[part.module] for part in call.parts)
            call.consumers = origins[name].consumed()
    return calls
