"""Activations behind a layer that trains folded, which keep one of their input and output for the backward pass.

The output is kept by whatever takes it as its input. Where it gives the gradient, the activation overwrites its input;
where it does not, the conv that takes it keeps the activation's input instead and makes the output again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


def name_of_activation(act: nn.Module) -> str:
    """The name of an activation module; empty if it is none of those known here, or if somebody watches it."""
    hooks = (act._forward_hooks, act._forward_pre_hooks, act._backward_hooks, act._backward_pre_hooks)
    return "" if any(hooks) else _NAMES.get(type(act), "")


class _ClampInPlace(torch.autograd.Function):
    """ReLU6 that keeps its output, which takes the place of its input; torch's keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [...] of any float dtype, which is overwritten."""
        ctx.mark_dirty(x)
        F.relu6(x, inplace=True)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Zero where the output is at one of its ends, as it is where the input is there or beyond."""
        (y,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.hardtanh_backward(grads[0], y, 0.0, 6.0)
        return out


class Activated(NamedTuple):
    """How a tensor came about: what it was made of, by which activation, and how often it had been written to then."""

    input: Tensor
    name: str
    writes: int

    def again(self) -> Tensor:
        """The tensor, made again."""
        return getattr(F, self.name)(self.input)  # type: ignore[no-any-return]


def activate(x: Tensor, act: nn.Module) -> Tensor:
    """The activation of x, which nobody else has or needs."""
    name = name_of_activation(act)
    if name == "relu":
        return F.relu(x, inplace=True)
    if name == "relu6":
        y: Tensor = _ClampInPlace.apply(x)
        return y
    if not name:
        return act(x)  # type: ignore[no-any-return]
    y = getattr(F, name)(x)
    if y.requires_grad and not y.is_inference():
        y._cbn_origin = Activated(x, name, y._version)  # type: ignore[attr-defined]
    return y


def origin(y: Tensor) -> Activated | None:
    """How a tensor came about, if `activate` made it and nobody has written to it since."""
    found: Activated | None = getattr(y, "_cbn_origin", None)
    return found if found is not None and not y.is_inference() and found.writes == y._version else None
