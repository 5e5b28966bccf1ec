"""CUDA without Triton: the kernels of torch.nn.SyncBatchNorm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..functional import Affine, gradient_through_the_past
from .plain import in_two_passes, window

__all__ = ["ACTIVATIONS", "backward", "gradient_through_the_past", "normalize", "statistics", "window"]

ACTIVATIONS: frozenset[str] = frozenset()


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `Kernels`."""
    mean, inv_std = torch.batch_norm_stats(x, 0.0)
    return mean, torch.where(inv_std == 0, 0, inv_std.pow(-2)), None  # the kernel says 0 where the variance is 0


def normalize(x: Tensor, affine: Affine, spare: Tensor | None) -> Tensor:
    """See `Kernels`."""
    mean, scale, shift, _ = affine
    y: Tensor = torch.batch_norm_elemt(x, scale, shift, mean, torch.ones_like(mean), 0.0)
    return y


def reduce(g: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g (x - mean) [C]."""
    ones = torch.ones_like(affine.mean)
    total, products, _, _ = torch.batch_norm_backward_reduce(g, x, affine.mean, ones, ones, True, False, False)
    return total, products


def input_gradient(g: Tensor, x: Tensor, affine: Affine, slope: Tensor, constant: Tensor) -> Tensor:
    """g·scale + slope·(x - mean) + constant in x's dtype."""
    mean, scale = affine.mean, affine.scale
    # the kernel computes (g - total/count - (x - mean)·products/count)·scale; where scale is 0, so are the other two
    total, products = (torch.where(scale == 0, 0, -t / scale) for t in (constant, slope))
    one = torch.ones(1, dtype=torch.int32, device=x.device)
    g_x: Tensor = torch.batch_norm_backward_elemt(g, x, mean, torch.ones_like(mean), scale, total, products, one)
    return g_x


backward = partial(in_two_passes, reduce, input_gradient)
