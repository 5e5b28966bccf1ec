"""Any device and dtype, by the formulas as they stand; what the other kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..functional import Affine, FoldGradient, InputGradient, by_group, per_channel, response, statistics_dtype

ACTIVATIONS: frozenset[str] = frozenset()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), [0, *range(2, x.dim())], correction=0)
    return mean, var


def normalize(x: Tensor, affine: Affine) -> Tensor:
    """See `Kernels`."""
    mean, scale, shift = (per_channel(t, x) for t in affine[:3])
    return ((x.to(mean.dtype) - mean) * scale + shift).to(x.dtype)


def backward(
    g: Tensor,
    x: Tensor,
    affine: Affine,
    inv_std: Tensor,
    share: float | Tensor | None,
    total: Callable[[Tensor], Tensor] | None,
) -> InputGradient:
    """See `Kernels`."""
    return in_two_passes(reduce, input_gradient, g, x, affine, inv_std, share, total)


def in_two_passes(
    reduce: Callable[[Tensor, Tensor, Affine], tuple[Tensor, Tensor]],
    input_gradient: Callable[[Tensor, Tensor, Affine, Tensor, Tensor], Tensor],
    g: Tensor,
    x: Tensor,
    affine: Affine,
    inv_std: Tensor,
    share: float | Tensor | None,
    total: Callable[[Tensor], Tensor] | None,
) -> InputGradient:
    """`Kernels.backward` from the sums Σ g', Σ g' (x - mean) and from g'·scale + slope·(x - mean) + constant."""
    g_beta, products = reduce(g, x, affine)
    g_gamma = products * inv_std
    g_mean, twice_g_var = -affine.scale * g_beta, -affine.scale * inv_std * g_gamma
    g_x = None
    if share is not None:
        every = torch.stack([twice_g_var, g_mean])
        g_x = input_gradient(g, x, affine, *(share * (every if total is None else total(every))).unbind())
    return InputGradient(g_x, g_gamma, g_beta, g_mean, twice_g_var)


def reduce(g: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Σ g' and Σ g' (x - mean) [C]."""
    axes = [0, *range(2, x.dim())]
    g = g.to(affine.mean.dtype)
    return g.sum(axes), (g * (x.to(g.dtype) - per_channel(affine.mean, x))).sum(axes)


def input_gradient(g: Tensor, x: Tensor, affine: Affine, slope: Tensor, constant: Tensor) -> Tensor:
    """g'·scale + slope·(x - mean) + constant in x's dtype."""
    mean, scale, slope, constant = (per_channel(t, x) for t in (affine.mean, affine.scale, slope, constant))
    return (g.to(mean.dtype) * scale + slope * (x.to(mean.dtype) - mean) + constant).to(x.dtype)


def respond(theta: Tensor, patch_mean: Tensor, patch_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`."""
    square = theta.square()
    return response(patch_mean, theta, None), response(patch_var, square, None), square.sum(1)


def folded_gradient(theta: Tensor, g: Tensor, fold: FoldGradient) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    scale, inv_std, away, shift, along_length, along_spread, patch_mean, patch_var = fold
    t = torch.linalg.vecdot(theta, g) + shift * away
    g_theta = g * scale[:, None]
    if patch_mean is not None and patch_var is not None:
        groups = len(patch_mean)
        g_mean, g_var = -scale * shift, -0.5 * scale * t * inv_std * inv_std
        rows = by_group(g_theta, groups)
        rows += by_group((g_mean * along_length)[:, None] * theta, groups)
        rows += by_group((g_var * along_spread)[:, None] * theta, groups) * patch_var[:, None]
        rows.baddbmm_(by_group(g_mean, groups)[:, :, None], patch_mean[:, None])
    return t, g_theta
