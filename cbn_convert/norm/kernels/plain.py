"""Any device and dtype, by the formulas as they stand; what the other kernels are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..functional import NO_SQUARE, FoldGradient, by_group, response, statistics_dtype

if TYPE_CHECKING:
    from ..carried import Carried


class Kernels:
    """x [N, C, ...] of any float dtype; weights [C, F] and what is per channel in float32 (float64 for float64 x)."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C]."""
        var, mean = torch.var_mean(x.to(statistics_dtype(x)), [0, *range(2, x.dim())], correction=0)
        return mean, var

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Mean, var, anchor, spread and square of `state` at θ [C, F] and b [C]; see `Carried.moved`."""
        mean, var, patch_mean, patch_var, anchor_then, spread_then, square_then = cast(tuple[Tensor, ...], state)
        squares, anchor = theta.square(), response(patch_mean, theta, bias)
        spread = response(patch_var, squares, None).clamp_min(NO_SQUARE)
        square = squares.sum(1).clamp_min(NO_SQUARE)
        growth = (square / square_then).sqrt()
        mean = mean + (anchor - anchor_then) + (growth - 1) * (mean - anchor_then)
        leave_zero = (square_then <= NO_SQUARE) & (square > NO_SQUARE)
        mean, var = torch.where(leave_zero, anchor, mean), torch.where(leave_zero, spread, var * (spread / spread_then))
        return mean, var, anchor, spread, square

    def folded_gradient(self, theta: Tensor, g: Tensor, fold: FoldGradient) -> tuple[Tensor, Tensor]:
        """t = θ·g + away·shift [C] and ∂L/∂θ [C, F], from g, the gradient of the rows s θ, which may be overwritten.

        ∂L/∂θ = s g + g_M (p̄ + along_length θ) + g_S along_spread d θ, with g_M = -s·shift and g_S = -½ s t / (S + eps).
        """
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
