"""Layers that get their shapes from the first input, as LazyBatchNorm2d and LazyConv2d."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer
from torch.nn.parameter import is_lazy as is_uninitialized

from ..errors import ConversionError
from ..modes import modes_kept
from ..norm.producers import is_conv, is_linear
from .example import on_example, outputs_on

ADVICE = "run the model once on one of your inputs before"
# whatever the size of an image, these have the same shape
_SIZELESS = (nn.LazyBatchNorm2d, nn.LazyBatchNorm3d, nn.LazyConv2d, nn.LazyConv3d, nn.LazyConv1d)


def lazy_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the model that have no shapes yet, by name."""
    return {name: m for name, m in model.named_modules() if is_lazy(m)}


def is_lazy(module: nn.Module) -> bool:
    """Whether the layer has no shapes yet."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    # a lazy norm without parameters and statistics has nothing but torch's hook
    return "_initialize_hook" in module.__dict__ or any(t is not None and is_uninitialized(t) for t in tensors)


def materialize(model: nn.Module, example_input: Any | None) -> None:
    """Gives lazy layers their shapes, as the first forward pass would, in eval mode.

    Without an example input only those whose shapes any input shows, so that none gets a wrong one. Raises
    ConversionError for others, or if the model cannot run; it is then left as it was.
    """
    layers = lazy_layers(model)
    if not layers:
        return
    if example_input is None:
        first = next((name for name, m in model.named_modules() if is_conv(m) or is_linear(m)), None)
        open_ = [name for name, m in layers.items() if name == first or not isinstance(m, _SIZELESS)]
        if open_:
            raise ConversionError(
                f"layer {open_[0]!r}, a {type(layers[open_[0]]).__name__}, gets its shape from the first input that "
                f"the model sees; {ADVICE}, or pass one as example_input"
            )
    # on copies, since one that does not fit may give some layers a shape before it fails
    _, (args, kwargs) = on_example(model, example_input, lambda arguments: outputs_on(_copy(model), arguments))
    with modes_kept(model), torch.no_grad():
        model.eval()
        model(*args, **kwargs)  # weights are drawn here, with the caller's random numbers


def _copy(model: nn.Module) -> nn.Module:
    buffers = [b for b in model.buffers() if isinstance(b, UninitializedBuffer)]  # which torch does not copy
    memo: dict[int, Any] = {id(b): cast(Any, UninitializedBuffer)(device=b.device, dtype=b.dtype) for b in buffers}
    return deepcopy(model, memo)
