"""Any device and dtype, by the formulas as they stand; what the other kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from ..functional import NO_SQUARE, Affine, OptTensor, by_group, per_channel, pooled, response, statistics_dtype

if TYPE_CHECKING:
    from ..batch import RunningStatistics
    from ..carried import Carried
    from ..distributed import JoinedMoments

    Running: TypeAlias = RunningStatistics | None
    Share: TypeAlias = float | Tensor


class Folded(NamedTuple):
    """A norm layer as a part of the layer that feeds it."""

    state: Carried  # at the weights that this was made of
    scale: Tensor  # s [C]
    shift: Tensor  # β + s (b - M) [C], the bias
    weight: Tensor | None  # s θ [C, ...], where it was asked for


class PatchAxis(NamedTuple):
    """One axis of a conv and of its input, and the positions of the output that are looked at.

    memory: how far apart neighbours lie. first, step: of the positions.
    """

    size: int
    memory: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    first: int
    step: int
    positions: int


class Kernels:
    """x [N, C, ...] of any float dtype; θ [C, ...] and what is per channel in float32 (float64 for float64 x).

    The F weights of a channel may have any shape; p̄, d [G, F] and axes [G, K, F] have one axis for all.
    """

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C]."""
        var, mean = torch.var_mean(x.to(statistics_dtype(x)), [0, *range(2, x.dim())], correction=0)
        return mean, var

    def patch_moments(
        self, y: Tensor, axes: Sequence[PatchAxis], probes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`InputPatches.moments` of some patches of y [N, C, ...] along probes [G, K, F], or None."""
        return None

    def pool(self, state: Carried, found: JoinedMoments, share: Share) -> tuple[Carried, Tensor | bool]:
        """What a window is after a look at no patches, and whether what was found is finite."""
        return state.of(*pooled(state.mean, state.var, found.mean, found.var, share)), found.finite

    def join(
        self, state: Carried, theta: Tensor, bias: OptTensor, found: JoinedMoments, shares: tuple[Share, Share]
    ) -> tuple[Carried, Tensor | bool]:
        """What a window at θ [C, F] and b is after a look, and whether that is finite.

        Args:
            state: statistics at θ and b, before the look.
            theta, bias: θ [C, F], and b [C] or None.
            found: the moments of the batch and of its patches, which must be there.
            shares: those of what was found of the batch and of its patches; a float, or a tensor on the device.
        """
        share, of_patches = shares
        assert found.patches is not None
        joined = state.with_patches(found.patches, of_patches, theta, bias)
        joined = joined.of(*pooled(state.mean, state.var, found.mean, found.var, share))
        assert joined.patch_rest is not None
        return joined, found.finite & torch.isfinite(joined.table.sum() + joined.patch_rest.sum())

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> Tensor:
        """The table of `state` at θ [C, ...] and b [C]; see `Carried.moved`."""
        theta = theta.flatten(1)
        mean, var, anchor_then, spread_then, square_then = state.table.unbind()
        patch_mean, patch_rest, axes = cast(tuple[Tensor, Tensor, Tensor], state[1:])
        squares, anchor = theta.square(), response(patch_mean, theta, bias)
        spread = response(patch_rest, squares, None)
        for axis in axes.unbind(1):
            spread = spread + response(axis, theta, None).square()
        spread = spread.clamp_min(NO_SQUARE)
        square = squares.sum(1).clamp_min(NO_SQUARE)
        growth = (square / square_then).sqrt()
        mean = mean + (anchor - anchor_then) + (growth - 1) * (mean - anchor_then)
        leave_zero = (square_then <= NO_SQUARE) & (square > NO_SQUARE)
        mean, var = torch.where(leave_zero, anchor, mean), torch.where(leave_zero, spread, var * (spread / spread_then))
        return torch.stack([mean, var, anchor, spread, square])

    def scale(self, x: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Makes x·scale + shift of x, per channel and in place."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale, shift = scale.view(shape), shift.view(shape)
        if x.dtype == scale.dtype:
            x.mul_(scale).add_(shift)
        else:  # half precision would round in between
            x.copy_(x.to(scale.dtype).mul_(scale).add_(shift))

    def fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, running: Running = None,
        with_weight: bool = True,
    ) -> Folded:  # fmt: skip
        """`state` at θ [C, ...] and b [C], and what normalises by it. M and S are written to `running`.

        Args:
            state: statistics at any weights; those without patches stay as they are.
            theta, bias: the weights, and b where there is one.
            affine: of the norm layer.
            running: None where nothing is to be written.
            with_weight: whether s θ is wanted, too.
        """
        if state.patch_mean is not None:
            state = state._replace(table=self.move(state, theta, bias))
        if running is not None:
            running.write(state.mean, state.var)
        gamma, beta, eps = affine
        scale = torch.rsqrt(state.var + eps)
        scale = scale if gamma is None else scale * gamma
        shift = -scale * (state.mean if bias is None else state.mean - bias)
        shift = shift if beta is None else shift + beta
        return Folded(state, scale, shift, per_channel(scale, theta) * theta if with_weight else None)

    def folded_gradient(
        self, state: Carried, theta: Tensor, bias: Tensor | None, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """∂L/∂θ [C, ...] and ∂L/∂γ [C], from g, the gradient of the rows s θ, which may be overwritten, and that of β.

        With t = θ·g + (b - M) g_shift, g_M = -s g_shift and g_S = -½ s t / (S + eps):
        ∂L/∂θ = s g + g_M (p̄ + (M - θ·p̄ - b) θ / |θ|²) + 2 g_S S (d θ + Σ_k (u_k·θ) u_k) / q. Without patches, M and S
        are fixed.

        Args:
            state: statistics at θ and b, as `fold` gives them.
            theta, bias: θ [C, ...], and b [C] or None.
            affine: of the norm layer; its β is of no meaning here.
            g: [C, ...], as θ.
            g_shift: [C].
        """
        inv_std = torch.rsqrt(state.var + affine.eps)
        scale = inv_std if affine.gamma is None else inv_std * affine.gamma
        away = -state.mean if bias is None else bias - state.mean
        shape, theta, g = theta.shape, theta.flatten(1), g.flatten(1)
        t = torch.linalg.vecdot(theta, g) + g_shift * away
        g_theta = g * scale[:, None]
        if state.patch_mean is not None and state.patch_rest is not None and state.patch_axes is not None:
            mean, var, anchor, spread, square = state.table.unbind()
            groups = len(state.patch_mean)
            g_mean, g_var = -scale * g_shift, -0.5 * scale * t * inv_std * inv_std
            along_length = g_mean * (mean - anchor) / square * (square > NO_SQUARE)
            along_spread = g_var * 2 * var / spread * (spread > NO_SQUARE)
            rows = by_group(g_theta, groups)
            rows += by_group(along_length[:, None] * theta, groups)
            spreading = by_group(along_spread[:, None] * theta, groups)
            rows += spreading * state.patch_rest[:, None]
            for axis in state.patch_axes.unbind(1):
                rows += torch.linalg.vecdot(spreading, axis[:, None])[:, :, None] * axis[:, None]
            rows += by_group(g_mean, groups)[:, :, None] * state.patch_mean[:, None]
        return g_theta.view(shape), t * inv_std
