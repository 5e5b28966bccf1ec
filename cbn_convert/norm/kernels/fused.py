"""The CUDA path: Triton kernels for [N, C, ...] in NCHW and channels_last, float32, bfloat16 and float16.

A forward pass is the sums of x and the normalisation with its activation; a backward pass the sums of g, their merging,
and the gradient of x. Sums are of distances to a first guess of the mean, in float32, split among enough programs to
fill the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..functional import Affine, InputGradient
from . import device
from .plain import folded_gradient, respond

__all__ = ["ACTIVATIONS", "backward", "folded_gradient", "normalize", "respond", "statistics"]

_ACTS = {"": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
ACTIVATIONS = frozenset(_ACTS) - {""}
_TILE = 2048  # elements per tile
_PROGRAMS = 512  # that a sum is split among


class _Layout(NamedTuple):
    """How a dense tensor is cut into tiles."""

    x: Tensor
    images: int
    channels: int
    positions: int
    strides: tuple[int, int, int]  # of image, channel and position
    tile: tuple[int, int]  # positions and channels
    values: int  # per channel

    @property
    def tiles(self) -> int:
        return self.images * -(-self.positions // self.tile[0])

    @property
    def columns(self) -> int:
        return -(-self.channels // self.tile[1])

    @property
    def options(self) -> dict[str, Any]:
        return {"BP": self.tile[0], "BC": self.tile[1], "WIDE": self.x.numel() >= 2**31}


def _layout(x: Tensor) -> _Layout:
    n, c = x.shape[:2]
    p = x.numel() // max(n * c, 1)
    last = p == 1 or not x.is_contiguous()
    if last:
        x = x.contiguous(memory_format=_format(x))
        last = not x.is_contiguous() or p == 1
    if last:
        channels = min(64, triton.next_power_of_2(c))
        tile = (max(1, min(_TILE // channels, triton.next_power_of_2(n * p))), channels)
        return _Layout(x, 1, c, n * p, (0, 1, c), tile, n * p)
    positions = max(1, min(_TILE, triton.next_power_of_2(p)))
    tile = (positions, max(1, min(_TILE // positions, triton.next_power_of_2(c), 16)))
    return _Layout(x, n, c, p, (c * p, p, 1), tile, n * p)


def _format(x: Tensor) -> torch.memory_format:
    for rank, kind in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == rank and x.is_contiguous(memory_format=kind):
            return kind
    return torch.contiguous_format


def _like(g: Tensor, layout: _Layout) -> Tensor:
    x = layout.x
    return g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=_format(x))


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _splits(layout: _Layout) -> int:
    return max(1, min(layout.tiles, _PROGRAMS // layout.columns))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    layout = _layout(x)
    splits, channels = _splits(layout), layout.channels
    sums = torch.empty(splits, 3, channels, dtype=torch.float32, device=x.device)
    mean, var = torch.empty(2, channels, dtype=torch.float32, device=x.device).unbind()
    with _on(x):
        device.sums_of_x[layout.columns, splits](
            layout.x, sums, channels, layout.positions, layout.tiles, *layout.strides, **layout.options
        )
        device.merge_statistics[(triton.cdiv(channels, 128),)](sums, mean, var, channels, splits, layout.values, BC=128)
    return mean, var


def normalize(x: Tensor, affine: Affine) -> Tensor:
    """See `Kernels`."""
    layout = _layout(x)
    y = torch.empty_like(layout.x)
    with _on(x):
        device.normalize[layout.tiles, layout.columns](
            layout.x, y, *affine[:3], layout.channels, layout.positions, *layout.strides, **layout.options,
            ACT=_ACTS[affine.act],
        )  # fmt: skip
    return y


def backward(
    g: Tensor,
    x: Tensor,
    affine: Affine,
    inv_std: Tensor,
    share: float | Tensor | None,
    total: Callable[[Tensor], Tensor] | None,
) -> InputGradient:
    """See `Kernels`."""
    layout = _layout(x)
    g, splits, channels = _like(g, layout), _splits(layout), layout.channels
    sums = torch.empty(splits, 2, channels, dtype=torch.float32, device=x.device)
    out = torch.empty(6, channels, dtype=torch.float32, device=x.device)
    act = _ACTS[affine.act]
    at_once = total is None and isinstance(share, (int, float))
    with _on(x):
        device.sums_of_g[layout.columns, splits](
            g, layout.x, sums, *affine[:3], channels, layout.positions, layout.tiles, *layout.strides,
            **layout.options, ACT=act,
        )  # fmt: skip
        device.merge_gradients[(triton.cdiv(channels, 128),)](
            sums, inv_std, affine.scale, out, channels, splits, share if at_once else 0.0, BC=128
        )
        g_x = None
        if share is not None:
            if not at_once:
                out[4:] = share * (out[2:4] if total is None else total(out[2:4]))
            g_x = torch.empty_like(layout.x)
            device.input_gradient[layout.tiles, layout.columns](
                g, layout.x, g_x, *affine[:3], out[4], out[5], channels, layout.positions, *layout.strides,
                **layout.options, ACT=act,
            )  # fmt: skip
    return InputGradient(g_x, *out[:4].unbind())
