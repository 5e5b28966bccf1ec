"""Cross-Iteration Batch Normalization as mathematics: window statistics, compensation, gradient.

Source: Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712, section 3, with two deviations that
`compensation="taylor", gradient="current"` switches off. Notation, for one output channel j of x = θ·p + b, where p is
the input patch at one of the m positions of a batch:

    mean       μ  = mean(x)                     dμ/dθ  = p̄, the mean input patch
    var        σ² = mean((x - μ)²)              dσ²/dθ = 2C
    covariance C  = mean((x - μ) p)

Everything is centred: the paper's ν = mean(x²) is σ² + μ², and its D = dν/dθ is 2(C + μ p̄), so no expression below
subtracts two large numbers. An iteration τ of the past, seen from today's weights θ (paper, eqs. 7 to 10), has

    μ̃ = μ + p̄·(θ - θ_τ) + (b - b_τ)            exact, because the mean is linear in θ
    σ̃² = max(2c - σ² - (μ̃ - μ)², 0)            "taylor": the paper's max(ν̃, μ̃²) - μ̃², with c = θ·C
    σ̃² = c² / σ²                               "projection": Cauchy-Schwarz, var(x') >= cov(x, x')² / var(x)
    σ̃² = θ·Σ·θ, Σ = cov(p)                     "exact": no approximation, but F² numbers per group

and the window is the average over iterations: M = Σ w μ̃ and S = Σ w (σ̃² + (μ̃ - M)²), the current one included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Compensation = Literal["projection", "taylor", "exact", "none"]
Gradient = Literal["full", "current", "straight_through"]

COMPENSATIONS: tuple[str, ...] = ("projection", "taylor", "exact", "none")
GRADIENTS: tuple[str, ...] = ("full", "current", "straight_through")


class Moments(NamedTuple):
    """What one iteration leaves behind, or, with an axis of n after the first one, what n iterations left.

    Shapes for C channels, G groups and F = (C_in / G)·K_h·K_w weights per channel. What the compensation has no use for
    is None. All in float32 (float64 for float64 input).
    """

    mean: Tensor  # μ [C]
    var: Tensor  # σ² [C], biased
    anchor: Tensor | None = None  # θ_τ·p̄ + b_τ [C]: what the weights of that iteration made of the mean patch
    patch_mean: Tensor | None = None  # p̄ [G, F]
    covariance: Tensor | None = None  # C [C, F], for "projection" and "taylor"
    patch_covariance: Tensor | None = None  # Σ [G, F, F], for "exact"


class Compensated(NamedTuple):
    """Past statistics under today's weights, with the sum over τ of dσ̃²/dθ = slope - Σ_τ across·p̄."""

    mean: Tensor  # μ̃ [C, n]
    var: Tensor  # σ̃² [C, n]
    slope: Tensor | None = None  # [C, F]
    across: Tensor | None = None  # [C, n]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and history: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_group(t: Tensor, groups: int) -> Tensor:
    """Views [C, ...] as [G, C/G, ...]."""
    return t.view(groups, -1, *t.shape[1:])


def response(patch_mean: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """θ·p̄ + b for mean patches [G, n, F], weights [C, F] and bias [C]; returns [C, n]."""
    out = torch.bmm(by_group(weight, patch_mean.shape[0]), patch_mean.transpose(1, 2)).flatten(0, 1)
    return out if bias is None else out + bias[:, None]


def compensate(past: Moments, weight: Tensor | None, bias: Tensor | None, compensation: Compensation) -> Compensated:
    """Carries n past iterations over to today's weights [C, F] and bias [C] (paper, eqs. 7 to 10)."""
    if weight is None or past.patch_mean is None or past.anchor is None:
        return Compensated(past.mean, past.var)
    drift = response(past.patch_mean, weight, bias) - past.anchor
    mean = past.mean + drift

    if past.patch_covariance is not None:
        theta = by_group(weight, past.patch_covariance.shape[0])
        row = torch.einsum("gcf,gnfh->gcnh", theta, past.patch_covariance)
        var = (row * theta[:, :, None]).sum(3).flatten(0, 1)
        return Compensated(mean, var, 2 * row.sum(2).flatten(0, 1), torch.zeros_like(var))

    assert past.covariance is not None
    c = torch.bmm(past.covariance, weight[:, :, None]).squeeze(2)
    if compensation == "taylor":
        var = 2 * c - past.var - drift * drift
        unclamped = (var > 0).to(var.dtype)
        along, across = unclamped, 2 * unclamped * drift
        var = var.clamp_min(0)
    else:
        # A channel that was constant has σ² = 0 and C = 0: nothing is known of its slope.
        known = past.var > torch.finfo(past.var.dtype).tiny
        along, across = torch.where(known, c / past.var, 0), torch.zeros_like(c)
        var = torch.where(known, along * c, past.var)
    slope = torch.bmm(2 * along[:, None, :], past.covariance).squeeze(1)
    return Compensated(mean, var, slope, across)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, ...]."""
    if x.is_cpu:
        # the reduction of nn.BatchNorm itself; var_mean over these axes takes about three times as long on the CPU
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, var


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Views a vector [C] so that it broadcasts against x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


class WindowStatistics(NamedTuple):
    """Mean M and biased variance S [C] over the window, and how they respond to what the layer can influence.

    share: by how much a change of the current batch's statistics moves the window's.
    dM [G, F], dS [C, F], dM_db, dS_db [C]: their derivatives by θ and b through the past, where these are wanted.
    """

    mean: Tensor
    var: Tensor
    share: float = 1.0
    dM: Tensor | None = None
    dS: Tensor | None = None
    dM_db: float = 0.0
    dS_db: Tensor | None = None


def window_statistics(
    mean: Tensor,
    var: Tensor,
    past: Moments | None,
    newest_weight: float,
    theta: Tensor | None,
    bias: Tensor | None,
    compensation: Compensation,
    gradient: Gradient,
) -> WindowStatistics:
    """Averages the current mean and var [C] with the past as seen from today's θ [C, F] and b [C] (paper, eqs. 9, 10).

    newest_weight is the current iteration's share w of the window, 1/k; the past shares the rest equally.
    """
    if past is None:
        return WindowStatistics(mean, var)
    old = compensate(past, theta, bias, compensation)
    w0 = newest_weight
    w = (1 - w0) / old.mean.shape[1]
    M = w0 * mean + w * old.mean.sum(1)
    spread = old.mean - M[:, None]
    S = w0 * (var + (mean - M) ** 2) + w * (old.var + spread * spread).sum(1)
    if gradient != "full" or past.patch_mean is None or old.slope is None or old.across is None:
        return WindowStatistics(M, S, share=1.0 if gradient == "straight_through" else w0)
    dM = w * past.patch_mean.sum(1)
    pull = w * (2 * spread - old.across)
    dS = w * old.slope + torch.bmm(by_group(pull, dM.shape[0]), past.patch_mean).flatten(0, 1)
    return WindowStatistics(M, S, share=w0, dM=dM, dS=dS, dM_db=1 - w0, dS_db=pull.sum(1))


class WindowNormalize(torch.autograd.Function):
    """y = γ (x - M) / sqrt(S + eps) + β, backpropagated through M and S to x and to the θ and b that made it.

    forward(x, θ, b, γ, β, window, eps, positions, total): x [N, C, ...] of any float dtype; θ [C, F] and b [C], or
    None; `WindowStatistics`; the number of values per channel in the current batch; `total`, which sums a tensor over
    the ranks of a process group where the batch is the joined one of all ranks, or None. Returns y in x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        theta: Tensor | None,
        b: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        window: WindowStatistics,
        eps: float,
        positions: float | Tensor,
        total: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """See the class."""
        M, S = window.mean, window.var
        ctx.save_for_backward(x, gamma, M, S, window.dM, window.dS, window.dS_db)
        ctx.share, ctx.dM_db, ctx.eps, ctx.total = window.share / positions, window.dM_db, eps, total
        gamma, beta = (None if t is None else t.to(M.dtype) for t in (gamma, beta))
        return F.batch_norm(x.to(M.dtype), M, S, gamma, beta, False, 0.0, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, θ, b, γ and β. ∂L/∂M and ∂L/∂S collect what every output says about the statistics.

        ∂L/∂M = -Σ g γ / sqrt(S + eps)              ∂L/∂S = -½ Σ g γ (x - M) / (S + eps)^(3/2)
        ∂L/∂x = g γ / sqrt(S + eps) + (w/m) (∂L/∂M + 2 ∂L/∂S (x - M))
        ∂L/∂θ = ∂L/∂M ∂M/∂θ + ∂L/∂S ∂S/∂θ           through the past; what passes through x, autograd adds
        """
        x, gamma, M, S, dM, dS, dS_db = ctx.saved_tensors
        xs, factor = x.to(M.dtype), None if gamma is None else gamma.to(M.dtype)
        inv_std = torch.rsqrt(S + ctx.eps)
        scale = inv_std if factor is None else inv_std * factor
        # with statistics held constant: g·scale, Σ g (x - M) / sqrt(S + eps), Σ g
        if x.numel():
            g_x, g_gamma, g_beta = torch.ops.aten.native_batch_norm_backward(
                g.to(M.dtype), xs, factor, M, S, None, None, False, ctx.eps, [True, True, True]
            )
        else:  # a rank without images, where torch's kernel would divide by zero
            g_x, g_gamma, g_beta = torch.zeros_like(xs), torch.zeros_like(M), torch.zeros_like(M)
        g_M = -scale * g_beta
        g_S = -0.5 * scale * inv_std * g_gamma

        if ctx.needs_input_grad[0]:
            every_M, every_S = (g_M, g_S) if ctx.total is None else ctx.total(torch.stack([g_M, g_S])).unbind()
            slope = 2 * ctx.share * every_S
            g_x.addcmul_(xs, per_channel(slope, x)).add_(per_channel(ctx.share * every_M - slope * M, x))
        g_theta = g_b = None
        if not x.numel():  # statistics that no rank could compute must not reach the weights
            dM, dS, dS_db = (None if t is None else torch.zeros_like(t) for t in (dM, dS, dS_db))
        if ctx.needs_input_grad[1] and dS is not None:
            g_theta = (by_group(g_M, dM.shape[0])[:, :, None] * dM[:, None]).flatten(0, 1) + g_S[:, None] * dS
        if ctx.needs_input_grad[2] and dS_db is not None:
            g_b = g_M * ctx.dM_db + g_S * dS_db
        return (
            g_x.to(x.dtype) if ctx.needs_input_grad[0] else None,
            g_theta,
            g_b,
            None if gamma is None else g_gamma.to(gamma.dtype),
            g_beta.to(gamma.dtype) if gamma is not None and ctx.needs_input_grad[4] else None,
            *[None] * 4,
        )
