"""What a model is run on to look at it: the caller's example, or random images of a size that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConversionError, first_line
from ..modes import modes_kept
from ..norm.producers import fan_in, is_conv, is_linear, is_transposed, per_axis

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Result = TypeVar("Result")

# Small inputs show as much of a model's structure as large ones, where it takes them.
QUICK_SIZES, OTHER_SIZES = (64, 128), (224, 256, 299, 32, 28)
SIZES: dict[int, Sequence[tuple[int, ...]]] = {  # by the number of spatial axes
    1: [(size,) for size in (64, 256, 1024, 4096, 16384)],
    2: [(size, size) for size in (*QUICK_SIZES, *OTHER_SIZES)],
    3: [*((size, size, size) for size in (32, 64, 96)), (16, 112, 112), (16, 224, 224), (128, 128, 128)],
}
SEEDS = (1, 4, 8, 16)  # before a transposed conv
SHOWN = {1: (32000,), 2: (512, 512), 3: (160, 160, 160)}  # in messages
WORDS = ("vectors", "sequences", "images", "volumes")

Shape = tuple[int, ...]


def on_example(
    model: nn.Module, example_input: Any | None, call: Callable[[Arguments], Result]
) -> tuple[Result, Arguments]:
    """`call` of the first arguments for the model that do not make it fail, and these arguments.

    `example_input` is a tensor, a tuple of positional or a dict of keyword arguments. By default random images of 64 or
    128 px, the size in the model's pretrained_cfg or another usual size; or else what the model's first conv takes, one
    sequence, image or volume with its channels, or the first linear layer, two vectors. Raises ConversionError if all
    fail.
    """
    first: tuple[Exception, list[Arguments]] | None = None  # later groups are guesses that tell the caller nothing
    for group in _candidates(model, example_input):
        tried: list[Arguments] = []
        for arguments in group:
            try:
                return call(arguments), arguments
            except Exception as error:  # whatever a forward pass may raise
                tried.append(arguments)
                failure = error
        first = first or (failure, tried)
    assert first is not None
    failure, tried = first
    shapes = [[tuple(t.shape) for t in tree_leaves(arguments) if isinstance(t, Tensor)] for arguments in tried]
    text = ", ".join(" and ".join(map(str, these)) for these in shapes)
    reason = first_line(failure)
    what = "the example input" if example_input is not None else f"random {WORDS[len(shapes[0][0]) - 2]}"
    raise ConversionError(
        f"the model cannot run on {what} of shape {text} ({reason}); pass an example_input that it accepts, of the "
        f"form example_input=torch.zeros{_form(model)}, or a tuple or dict of all its arguments"
    ) from failure


def run(model: nn.Module, example_input: Any | None) -> tuple[list[Any], Arguments]:
    """`outputs_on` an example input in eval mode, and the arguments that it ran on, as in `on_example`."""
    with modes_kept(model):
        model.eval()
        return on_example(model, example_input, lambda arguments: outputs_on(model, arguments))


def outputs_on(model: nn.Module, arguments: Arguments) -> list[Any]:
    """The leaves of the model's outputs, without gradients; the same random numbers are drawn in every call."""
    args, kwargs = copied(arguments)
    with quietly(model):
        torch.manual_seed(0)
        return leaves_of(model(*args, **kwargs))


def copied(arguments: Arguments) -> Arguments:
    """The arguments with tensors of their own, which a model may write to."""
    copies: Arguments = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, arguments)
    return copies


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Without gradients, autocast and inference mode; random states are afterwards what they were."""
    devices = {p.device for p in model.parameters()}
    gpus = [d for d in devices if d.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(gpus))
        for kind in {d.type for d in devices} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def leaves_of(value: Any) -> list[Any]:
    """What is in nested containers: those that torch.utils._pytree knows, mappings, dataclasses and other objects."""
    leaves, todo, seen = [], tree_leaves(value), set()
    while todo:
        leaf = todo.pop(0)
        inside = isinstance(leaf, Mapping) or hasattr(leaf, "__dict__")
        if not inside or isinstance(leaf, (Tensor, nn.Module, type)):
            leaves.append(leaf)
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            todo += tree_leaves(list((leaf if isinstance(leaf, Mapping) else vars(leaf)).values()))
    return leaves


def _candidates(model: nn.Module, example_input: Any | None) -> Iterator[Iterator[Arguments]]:
    """What the model may run on, in the order in which it should be tried; in groups, the likely ones first."""
    if isinstance(example_input, dict):
        yield iter([((), example_input)])
    elif example_input is not None:
        yield iter([(example_input if isinstance(example_input, tuple) else (example_input,), {})])
    else:
        groups = _shapes(model)
        for i, group in enumerate(groups):
            tried = {shape for earlier in groups[:i] for shape in earlier}
            if fresh := [shape for shape in group if shape not in tried]:
                yield _random(model, fresh)


def _random(model: nn.Module, shapes: Iterable[Shape]) -> Iterator[Arguments]:
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        x = torch.randn(shape, generator=generator, device="cpu")
        yield (x.to(reference.device, reference.dtype),), {}


def _shapes(model: nn.Module) -> list[list[Shape]]:
    """Shapes of inputs, a single sample where that will do."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    groups = [_image_shapes(model, cfg)] if cfg else []
    for conv in _entrances(model):
        rank = len(per_axis(conv, "kernel_size"))
        sizes = [(size,) * rank for size in SEEDS] if is_transposed(conv) else SIZES[rank]
        groups.append([(1, conv.in_channels, *size) for size in sizes])
    for linear in _first(model, is_linear):
        groups.append([(2, fan_in(linear)), (2, 8, fan_in(linear))])
    return [*groups, [(1, 3, *size) for size in SIZES[2]]]


def _entrances(model: nn.Module) -> list[Any]:
    """Convs that may be the first to run: that which is registered first, and the one for the fewest channels."""
    forward: list[Any] = [m for m in model.modules() if is_conv(m) and not is_transposed(m)]
    return [*_first(model, is_conv), *sorted(forward, key=lambda m: m.in_channels)[:1]]


def _first(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[Any]:
    """The first module of a kind in the order in which they are registered, if there is one."""
    return [module for module in model.modules() if is_one(module)][:1]


def _form(model: nn.Module) -> str:
    """The shape of an input as the model's first layer takes it, in a size that was not tried."""
    for conv in _first(model, is_conv):
        return str((1, conv.in_channels or 3, *SHOWN[len(per_axis(conv, "kernel_size"))]))
    for linear in _first(model, is_linear):
        return str((4, fan_in(linear)))
    return str((1, 3, *SHOWN[2]))


def _image_shapes(model: nn.Module, cfg: dict[str, Any]) -> list[Shape]:
    """[1, C, H, W] of images for a model with a pretrained_cfg."""
    # the model's own size where it was built for another one; about mean and std, of no interest here, it would warn
    known = {**cfg, "mean": 0.5, "std": 0.5}
    channels, *own = resolve_input_data_config(model, pretrained_cfg=known)["input_size"]
    quick = [] if cfg.get("fixed_input_size") else [(size, size) for size in QUICK_SIZES]
    sizes = [*quick, tuple(own), *((size, size) for size in OTHER_SIZES)]
    smaller = [size for size in sizes if size[0] <= own[0]]
    return [(1, channels, *size) for size in dict.fromkeys([*smaller, *sizes])]
