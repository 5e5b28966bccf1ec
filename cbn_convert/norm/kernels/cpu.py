"""The CPU without compiled kernels: torch's own BatchNorm passes, used for sums and affine maps.

Reducing over N and the positions of NCHW is slow in most of ATen's operations, and the statistics of nn.BatchNorm
itself take several times as long as a pass over memory (docs/performance.md). Two passes are fast: that of BatchNorm in
evaluation, a·x + b per channel, and the sums of its backward pass, Σ g and Σ g (x - mean).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..functional import Affine, per_channel, statistics_dtype
from .plain import folded_gradient, in_two_passes, respond

__all__ = ["ACTIVATIONS", "backward", "folded_gradient", "normalize", "respond", "statistics"]

ACTIVATIONS: frozenset[str] = frozenset()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    x = x.to(statistics_dtype(x))
    positions = x.numel() / x.shape[1]
    mean = x.mean([0, *range(2, x.dim())])
    # the variance of centred values: a difference of large sums would leave nothing where |mean| is many times the std
    centred = _affine(x, mean, torch.ones_like(mean), torch.zeros_like(mean), torch.empty_like(x))
    rest, square = (t / positions for t in _sums(centred, x, mean))
    return mean + rest, square - rest * rest


def normalize(x: Tensor, affine: Affine) -> Tensor:
    """See `Kernels`."""
    xs = x.to(affine.mean.dtype)
    return _affine(xs, *affine[:3], torch.empty_like(xs)).to(x.dtype)


def reduce(g: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g (x - mean) [C]."""
    if not x.numel():  # a rank without images, where torch's kernel would divide by zero
        return torch.zeros_like(affine.mean), torch.zeros_like(affine.mean)
    return _sums(g.to(affine.mean.dtype), x.to(affine.mean.dtype), affine.mean)


def input_gradient(g: Tensor, x: Tensor, affine: Affine, slope: Tensor, constant: Tensor) -> Tensor:
    """g·scale + slope·(x - mean) + constant in x's dtype."""
    mean, scale = affine.mean, affine.scale
    gs = g.to(mean.dtype)
    g_x = _affine(gs, torch.zeros_like(mean), scale, constant - slope * mean, torch.empty_like(gs))
    return g_x.addcmul_(x.to(mean.dtype), per_channel(slope, x)).to(x.dtype)


backward = partial(in_two_passes, reduce, input_gradient)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Writes (x - mean)·scale + shift to out."""
    unused = mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
    )
    return out


def _sums(g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g (x - mean) [C]."""
    _, products, total = torch.ops.aten.native_batch_norm_backward(
        g, x, None, mean, torch.ones_like(mean), None, None, False, 0.0, [False, True, True]
    )
    return total, products
