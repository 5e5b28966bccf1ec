"""Who feeds whom: runs a model once and follows tensors from producing modules to norm layers.

Matching is by tensor object, never by name or registration order. Every tensor met is kept alive until the trace ends,
so that no id can belong to two tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import ConversionError
from ..norm.producers import is_producer


@dataclass
class NormCall:
    """How a norm layer was reached: its input's origin, and what a decision about it depends on."""

    calls: int = 0
    producer: str | None = None  # module whose output object is the input
    origin: str = "the model's input"  # function or module that made the input
    consumers: int = 0  # how many operations read the producer's output, or a view of it on the way to the norm
    producer_calls: int = 0


@dataclass
class _Origin:
    tensor: Tensor
    label: str
    producer: str | None = None
    consumers: int = 0
    version: int = 0  # writes to the tensor when it was met
    viewed: _Origin | None = None  # what this tensor is a rearrangement of


# Functions that only rearrange their first argument, and functions that of their second one read the shape alone.
_REARRANGING = {"flatten", "reshape", "view", "transpose", "permute", "movedim", "contiguous", "squeeze", "unsqueeze"}
_LIKE = {"reshape_as", "view_as", "expand_as"}


class _Provenance(TorchFunctionMode):
    """Labels every tensor with the function that made it, or last wrote to it, and counts its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[int, _Origin] = {}
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func is Tensor.__setitem__:
            made = [args[0]]
        # writing to a view changes the tensor it looks at
        if getattr(func, "__name__", "").endswith("_") and made and made[0]._base is not None:
            made.append(made[0]._base)
        if made:
            called = getattr(func, "__name__", str(func))
            name = called.strip("_")
            rearranged = name in _REARRANGING and not called.endswith("_") and bool(args)
            if rearranged and made[0] is args[0]:
                return out
            read = args[:1] if name in _LIKE else (args, kwargs)
            for t in {id(t): t for t in tree_leaves(read) if isinstance(t, Tensor)}.values():
                if (origin := self.origins.get(id(t))) is not None:
                    origin.consumers += 1
            viewed = self.origins.get(id(args[0])) if rearranged else None
            for t in made:
                if viewed is None:
                    self.origins[id(t)] = _Origin(t, name)
                else:
                    self.origins[id(t)] = _Origin(
                        t, viewed.label, viewed.producer, version=viewed.version, viewed=viewed
                    )
        return out


def default_example_input(model: nn.Module) -> Tensor:
    """Random images [1, C, H, W] of the size in the model's pretrained_cfg, 3x224x224 without one, on its device."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size") or (3, 224, 224)
    reference = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator).to(reference.device, reference.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _arguments(model: nn.Module, example_input: Any | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_input is None:
        example_input = default_example_input(model)
    if isinstance(example_input, dict):
        return (), example_input
    return example_input if isinstance(example_input, tuple) else (example_input,), {}


def run(model: nn.Module, example_input: Any | None) -> Any:
    """The model's outputs on the example input, in eval mode without gradients."""
    args, kwargs = _arguments(model, example_input)
    with _evaluating(model):
        return model(*args, **kwargs)


def trace_norms(model: nn.Module, norms: dict[str, nn.Module], example_input: Any | None) -> dict[str, NormCall]:
    """Runs the model once in eval mode without gradients; returns a NormCall per name in `norms`.

    `example_input` is a tensor, a tuple of positional or a dict of keyword arguments, by default
    `default_example_input`. Parameters, buffers, modes and random state are left as they were. Raises ConversionError
    if the model cannot run on it.
    """
    args, kwargs = _arguments(model, example_input)
    provenance = _Provenance()
    calls = {name: NormCall() for name in norms}
    inputs: dict[str, Tensor] = {}
    runs: dict[str, int] = {}
    handles = []

    def after_producer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            if isinstance(output, Tensor):
                version = 0 if output.is_inference() else output._version
                provenance.origins[id(output)] = _Origin(output, type(module).__name__, producer=name, version=version)

        return hook

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call, x = calls[name], args[0] if args else next(iter(kwargs.values()))
            call.calls += 1
            inputs[name] = x
            if (origin := provenance.origins.get(id(x))) is not None:
                call.origin = origin.label
                provenance.paused = True
                if origin.producer is not None and _aligned(x, origin, model.get_submodule(origin.producer)):
                    call.producer = origin.producer
                provenance.paused = False

        return hook

    try:
        for name, module in model.named_modules():
            if is_producer(module):
                handles.append(module.register_forward_hook(after_producer(name)))
        for name, module in norms.items():
            handles.append(module.register_forward_pre_hook(before_norm(name), with_kwargs=True))
        with _evaluating(model), provenance:
            output = model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        raise ConversionError(
            f"the model cannot run on the example input of shape {shapes} ({error}); "
            "pass an example_input that it accepts"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    returned = {id(t) for t in tree_leaves(output)}
    for name, call in calls.items():
        if call.producer is not None:
            call.producer_calls = runs[call.producer]
            origin: _Origin | None = provenance.origins[id(inputs[name])]
            while origin is not None:
                call.consumers = max(call.consumers, origin.consumers + (id(origin.tensor) in returned))
                origin = origin.viewed
    return calls


def _aligned(x: Tensor, origin: _Origin, module: nn.Module) -> bool:
    """Whether axis 1 of x holds the channels that the module made, in the order that its positions have.

    BatchNorm1d normalises axis 1, which is the features of a Linear only in [N, C] or after a rearrangement. That x has
    the output's values is checked by comparing them, which a constant output leaves open.
    """
    made = origin
    while made.viewed is not None:
        made = made.viewed
    if not made.tensor.is_inference() and made.tensor._version != made.version:
        return False  # written to in the meantime, perhaps through a view
    if not isinstance(module, nn.Linear):
        return x is made.tensor
    channels = made.tensor.shape[-1]
    if x.dim() < 2 or x.shape[1] != channels or bool((made.tensor == made.tensor.flatten()[:1]).all()):
        return False
    return torch.equal(x.movedim(1, -1).reshape(-1, channels), made.tensor.reshape(-1, channels))
