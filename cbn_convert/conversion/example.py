"""What a model is run on to look at it: the caller's example, or random images of a size that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConversionError
from ..norm import modes_kept

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Result = TypeVar("Result")

# Small images show as much of a model's structure as large ones, where it takes them.
QUICK_SIZES, OTHER_SIZES = (64, 128), (224, 256, 299)


def on_example(
    model: nn.Module, example_input: Any | None, call: Callable[[Arguments], Result]
) -> tuple[Result, Arguments]:
    """`call` of the first arguments for the model that do not make it fail, and these arguments.

    `example_input` is a tensor, a tuple of positional or a dict of keyword arguments; by default random images of 64 or
    128 px, the size in the model's pretrained_cfg or another usual size. Raises ConversionError if all fail.
    """
    failure: Exception | None = None
    tried: list[str] = []
    for args, kwargs in _candidates(model, example_input):
        try:
            return call((args, kwargs)), (args, kwargs)
        except Exception as error:  # whatever a forward pass may raise
            failure = error
            shapes = [str(tuple(t.shape)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            tried.append(" and ".join(shapes))
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    what = "the example input" if example_input is not None else "random images"
    raise ConversionError(
        f"the model cannot run on {what} of shape {', '.join(tried)} ({reason}); pass an example_input that it accepts"
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


def _candidates(model: nn.Module, example_input: Any | None) -> Iterator[Arguments]:
    if isinstance(example_input, dict):
        yield (), example_input
    elif example_input is not None:
        yield (example_input if isinstance(example_input, tuple) else (example_input,)), {}
    else:
        reference = next(model.parameters(), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        for size in _image_sizes(model):
            images = torch.randn(1, *size, generator=generator, device="cpu")
            yield (images.to(reference.device, reference.dtype),), {}


def _image_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """[C, H, W] of images that the model may take, in the order in which they should be tried."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    # the model's own size where it was built for another one; about mean and std, of no interest here, it would warn
    known = {**cfg, "mean": 0.5, "std": 0.5}
    channels, *own = resolve_input_data_config(model, pretrained_cfg=known)["input_size"] if cfg else (3,)
    quick = [] if cfg.get("fixed_input_size") else [(size, size) for size in QUICK_SIZES]
    sizes = [*quick, *([tuple(own)] if own else []), *((size, size) for size in OTHER_SIZES)]
    smaller = [size for size in sizes if not own or size[0] <= own[0]]
    return [(channels, *size) for size in dict.fromkeys([*smaller, *sizes])]
