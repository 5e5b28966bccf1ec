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

from typing import Any, Literal, NamedTuple

import torch
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


class CrossIterationNormalize(torch.autograd.Function):
    """y = γ (x - M) / sqrt(S + eps) + β over a window of iterations.

    forward(x, weight, bias, γ, β, past, newest_weight, compensation, gradient, eps) takes x [N, C, ...] of any float
    dtype, the weight [C, ...] and bias [C] that made it (or None), and the past `Moments` with their axis n (or None).
    `newest_weight` is the current iteration's share w of the window, 1/k; the past shares the rest equally.
    Returns y in x's dtype, then M, S, μ, σ² of shape [C] in the statistics' dtype, which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        past: Moments | None,
        newest_weight: float,
        compensation: Compensation,
        gradient: Gradient,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        dtype = statistics_dtype(x)
        xs = x.to(dtype)
        mean, var = batch_statistics(xs)

        M, S = mean, var
        dM = dS = dM_db = dS_db = None  # dM/dθ [G, F], dS/dθ [C, F], dM/db (a number), dS/db [C]
        if past is not None:
            theta = None if weight is None else weight.to(dtype).flatten(1)
            b = None if bias is None else bias.to(dtype)
            old = compensate(past, theta, b, compensation)
            w0 = newest_weight
            w = (1 - w0) / old.mean.shape[1]
            M = w0 * mean + w * old.mean.sum(1)
            spread = old.mean - M[:, None]
            S = w0 * (var + (mean - M) ** 2) + w * (old.var + spread * spread).sum(1)
            if gradient == "full" and past.patch_mean is not None and old.slope is not None and old.across is not None:
                dM = w * past.patch_mean.sum(1)
                pull = w * (2 * spread - old.across)
                dS = w * old.slope + torch.bmm(by_group(pull, dM.shape[0]), past.patch_mean).flatten(0, 1)
                dM_db, dS_db = 1 - w0, pull.sum(1)

        inv_std = torch.rsqrt(S + eps)
        scale = inv_std if gamma is None else inv_std * gamma.to(dtype)
        y = (xs - per_channel(M, x)) * per_channel(scale, x)
        if beta is not None:
            y += per_channel(beta.to(dtype), x)

        ctx.save_for_backward(x, weight, bias, gamma, beta, M, inv_std, dM, dS, dS_db)
        ctx.dM_db = dM_db
        ctx.newest_share = 1.0 if past is None or gradient == "straight_through" else newest_weight
        outputs = (y.to(x.dtype), M, S, mean, var)
        # M and S alias mean and var without a past; autograd needs distinct tensors to mark.
        if past is None:
            outputs = (outputs[0], M.clone(), S.clone(), mean, var)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients for x, weight, bias, γ and β; M and S respond to the weight through dM/dθ and dS/dθ."""
        x, weight, bias, gamma, beta, M, inv_std, dM, dS, dS_db = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        g = g.to(M.dtype)
        centred = x.to(M.dtype) - per_channel(M, x)
        scale = inv_std if gamma is None else inv_std * gamma.to(M.dtype)

        g_beta = g.sum(dims)
        g_gamma = (g * centred).sum(dims) * inv_std
        g_M = -scale * g_beta
        g_S = -0.5 * scale * inv_std * g_gamma

        g_x = g_weight = g_bias = None
        if ctx.needs_input_grad[0]:
            share = ctx.newest_share * x.shape[1] / x.numel()
            g_x = g * per_channel(scale, x) + per_channel(share * g_M, x) + centred * per_channel(2 * share * g_S, x)
            g_x = g_x.to(x.dtype)
        if ctx.needs_input_grad[1] and dS is not None:
            g_weight = (by_group(g_M, dM.shape[0])[:, :, None] * dM[:, None]).flatten(0, 1) + g_S[:, None] * dS
            g_weight = g_weight.view_as(weight).to(weight.dtype)
        if ctx.needs_input_grad[2] and dS_db is not None:
            g_bias = (g_M * ctx.dM_db + g_S * dS_db).to(bias.dtype)
        return (
            g_x,
            g_weight,
            g_bias,
            None if gamma is None else g_gamma.to(gamma.dtype),
            None if beta is None else g_beta.to(beta.dtype),
            *[None] * 5,
        )
