"""Activations around layers that train folded, which keep one of their input and output for the backward pass.

The output is kept by whatever takes it as its input. Where it gives the gradient, a norm's own activation overwrites
its input. Where autograd keeps the input, whoever called the activation, the conv that takes the output keeps that
instead and makes the output again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tap import is_watched

# by autograd's name of the backward pass, those of which it keeps the input, or a copy of one that is overwritten
_OF_INPUT = {"HardtanhBackward0": "relu6", "SiluBackward0": "silu", "HardswishBackward0": "hardswish"}


class _Clamp(torch.autograd.Function):
    """ReLU6 that keeps its output; torch's keeps its input, or in a graph a mask beside the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [...] of any float dtype."""
        y = F.relu6(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Zero where the output is at one of its ends, as it is where the input is there or beyond."""
        (y,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.hardtanh_backward(grads[0], y, 0.0, 6.0)
        return out


class _ClampInPlace(_Clamp):
    """The same, with the output in the place of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [...] of any float dtype, which is overwritten."""
        ctx.mark_dirty(x)
        F.relu6(x, inplace=True)
        ctx.save_for_backward(x)
        return x


def activate_in_graph(x: Tensor, act: nn.Module) -> Tensor:
    """The activation of what a graph has folded."""
    if type(act) is not nn.ReLU6 or is_watched(act):
        return act(x)  # type: ignore[no-any-return]
    y: Tensor = _Clamp.apply(x)
    return y


def activate(x: Tensor, act: nn.Module) -> Tensor:
    """The activation of x, which nobody else has or needs; in place only where that takes no copy."""
    kind = nn.Module if is_watched(act) else type(act)
    if kind is nn.ReLU:
        return F.relu(x, inplace=True)
    if kind is nn.ReLU6:
        y: Tensor = _ClampInPlace.apply(x)
        return y
    return {nn.SiLU: F.silu, nn.Hardswish: F.hardswish}.get(kind, act)(x)


def origin(y: Tensor) -> tuple[Tensor, str] | None:
    """What a tensor was made of and by which activation, if autograd has that at hand, and nobody has written to y."""
    node: Any = y.grad_fn
    name = None if node is None else _OF_INPUT.get(node.name())
    ends = (getattr(node, "_saved_min_val", 0), getattr(node, "_saved_max_val", 6))
    # one write is that of an activation in place, behind a folded layer
    if name is None or ends != (0, 6) or y._version != getattr(y, "_cbn_writes", -1) + 1:
        return None
    try:
        return (node._saved_self, name) if _is_at_hand(node._raw_saved_self, y.device) else None
    except RuntimeError:  # what it was made of has been written to, which is an error of the backward pass only
        return None


def _is_at_hand(saved: Any, device: torch.device) -> bool:
    """Whether hooks on saved tensors, if any, left a tensor where it was, and see what is kept from here on, too.

    Not where activation checkpointing computes once more, which has to keep what it kept the first time.
    """
    # older versions of torch do not tell of either
    hook = getattr(saved, "unpack_hook", saved)
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    _, current = (top and top(True)) or (None, None)
    same = hook is current and torch._C._current_graph_task_id() == -1
    return hook is None or (same and isinstance(saved.data, Tensor) and saved.data.device == device)
