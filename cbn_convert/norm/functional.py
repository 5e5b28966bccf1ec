"""Cross-Iteration Batch Normalization as mathematics: window statistics, compensation, gradient.

Source: Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712, section 3, with two deviations that
`compensation="taylor", gradient="current"` switches off. Notation, for one output channel j of x = θ·p + b, where p is
the input patch at one of the m positions of a batch:

    mean       μ  = mean(x)                     dμ/dθ  = p̄, the mean input patch
    var        σ² = mean((x - μ)²)              dσ²/dθ = 2C
    covariance C  = mean((x - μ) p)             θ·C    = σ²

Everything is centred: the paper's ν = mean(x²) is σ² + μ², and its D = dν/dθ is 2(C + μ p̄), so no expression below
subtracts two large numbers. An iteration τ of the past, seen from today's weights θ (paper, eqs. 7 to 10), has

    μ̃ = μ + p̄·(θ - θ_τ) + (b - b_τ)            exact, because the mean is linear in θ
    σ̃² = max(σ² + 2(c - c_τ) - (μ̃ - μ)², 0)    "taylor": the paper's max(ν̃, μ̃²) - μ̃², with c = θ·C and c_τ = θ_τ·C
    σ̃² = σ² (c / c_τ)²                         "projection": Cauchy-Schwarz, var(x') >= cov(x, x')² / var(x)
    σ̃² = σ² (θ·Σ·θ) / (θ_τ·Σ·θ_τ)              "exact": no approximation, but Σ = cov(p) has F² numbers per group

and the window is the average over iterations: M = Σ w μ̃ and S = Σ w (σ̃² + (μ̃ - M)²), the current one included.
p̄, C and Σ may come from a part of the positions that μ and σ² come from, or from some of the iterations only: they say
how the statistics respond to θ, relative to what they say of θ_τ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .kernels import Kernels

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
    explained: Tensor | None = None  # θ_τ·C, or θ_τ·Σ·θ_τ [C]: the variance that they made of the patches
    patch_mean: Tensor | None = None  # p̄ [G, F]
    covariance: Tensor | None = None  # C [C, F], for "projection" and "taylor"
    patch_covariance: Tensor | None = None  # Σ [G, F, F], for "exact"


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


class Responses(NamedTuple):
    """What today's θ [C, F] and b [C] make of past patches: all that is taken from tensors of θ's size."""

    mean: Tensor  # θ·p̄ + b [C, n]
    along: Tensor  # θ·C, or θ·Σ·θ [C, n]
    covariance: Tensor  # C, or Σ·θ [C, n, F]
    patch_mean: Tensor  # p̄ [G, n, F]


def responses(past: Moments, theta: Tensor | None, bias: Tensor | None) -> Responses | None:
    """The responses of past moments [C, n, ...]; None where these have no patches, or no θ is given."""
    if theta is None or past.patch_mean is None:
        return None
    covariance = past.covariance
    if past.patch_covariance is not None:
        rows = by_group(theta, len(past.patch_covariance))
        covariance = torch.einsum("gcf,gnfh->gcnh", rows, past.patch_covariance).flatten(0, 1)
    assert covariance is not None
    along = torch.linalg.vecdot(covariance, theta[:, None])
    return Responses(response(past.patch_mean, theta, bias), along, covariance, past.patch_mean)


class PastStatistics(NamedTuple):
    """n iterations of the past under today's weights; of each, dσ̃²/dθ = 2 (along·covariance - across·p̄)."""

    mean: Tensor  # μ̃ [C, n]
    var: Tensor  # σ̃² [C, n]
    along: Tensor | None = None
    across: Tensor | None = None  # None for zero


# a variance that vanishes beside BatchNorm's eps: nothing is known of the slope of a channel that is constant
NEGLIGIBLE = 1e-15


def compensate(past: Moments, seen: Responses | None, compensation: Compensation) -> PastStatistics:
    """Carries n past iterations over to today's weights (paper, eqs. 7 to 10)."""
    if seen is None or past.anchor is None or past.explained is None:
        return PastStatistics(past.mean, past.var)
    drift, gain = seen.mean - past.anchor, seen.along - past.explained
    mean = past.mean + drift
    if compensation == "taylor":
        var = past.var + 2 * gain - drift * drift
        unclamped = (var > 0).to(var.dtype)
        return PastStatistics(mean, var.clamp_min(0), unclamped, unclamped * drift)
    inverse = 1 / past.explained.clamp_min(NEGLIGIBLE)
    growth = 1 + gain * inverse
    if compensation == "exact":
        return PastStatistics(mean, past.var * growth, past.var * inverse)
    var = past.var * growth
    return PastStatistics(mean, var * growth, var * inverse)


# the part of a variance that patches must explain at least, to say how it responds to the weights
EXPLAINS = 0.25


def carry_over(past: Moments, theta: Tensor, bias: Tensor | None, compensation: Compensation) -> Moments:
    """The same iterations with their statistics and anchors at θ [C, F] and b [C], so that patches of θ can join them.

    Channels of which θ·C has changed by more than a factor of 1 / EXPLAINS stay anchored where they were: patches that
    θ turned away from, or ran into, say too little of what it makes of others.
    """
    seen = responses(past, theta, bias)
    assert seen is not None
    assert past.anchor is not None
    assert past.explained is not None
    old = compensate(past, seen, compensation)
    change = seen.along / past.explained.clamp_min(NEGLIGIBLE)
    holds = (change > EXPLAINS) & (change < 1 / EXPLAINS)
    pairs = ((old.mean, past.mean), (old.var, past.var), (seen.mean, past.anchor), (seen.along, past.explained))
    mean, var, anchor, explained = (torch.where(holds, new, stored) for new, stored in pairs)
    return past._replace(mean=mean, var=var, anchor=anchor, explained=explained)


def is_measured(mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether running statistics are there and not a new BatchNorm's zeros and ones; true of those without values."""
    if mean is None or var is None:
        return False
    return mean.is_meta or type(mean) is not Tensor or bool((mean != 0).any() | (var != 1).any())


def explaining(new: Moments, var: Tensor, theta: Tensor) -> Moments:
    """Moments of patches of θ [C, F] that explain at least the part EXPLAINS of the variance [C] they are to go with.

    What is missing is added as if patches also varied by some λ in all directions: λ θ to C, λ I to Σ. Otherwise a few
    patches, which hardly vary by chance, would make a large change of a large variance out of a small one of theirs.
    """
    assert new.explained is not None
    norm = theta.square().sum(1).clamp_min(NEGLIGIBLE)
    extra = (EXPLAINS * var - new.explained).clamp_min(0) / norm
    if new.covariance is not None:
        return new._replace(covariance=new.covariance + extra[:, None] * theta, explained=new.explained + extra * norm)
    assert new.patch_covariance is not None
    groups = len(new.patch_covariance)
    most = by_group(extra, groups).amax(1)
    every = torch.eye(theta.shape[1], dtype=theta.dtype, device=theta.device) * most[:, None, None]
    more = most.repeat_interleave(len(extra) // groups) * norm
    return new._replace(patch_covariance=new.patch_covariance + every, explained=new.explained + more)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Views a vector [C] so that it broadcasts against x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


class WindowStatistics(NamedTuple):
    """Mean M and biased variance S [C] over the window, and how they respond to what the layer can influence.

    share: by how much a change of the current batch's statistics moves the window's. Through the past, with a sum over
    its n iterations, dM/dθ = Σ w·p̄ and dS/dθ = Σ 2w·(along·covariance + pull·p̄); dM/db and dS/db have no p̄.
    """

    mean: Tensor
    var: Tensor
    share: float = 1.0
    w: float = 0.0
    along: Tensor | None = None  # [C, n]
    pull: Tensor | None = None  # [C, n]
    covariance: Tensor | None = None  # [C, n, F]
    patch_mean: Tensor | None = None  # [G, n, F]


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
    seen = responses(past, theta, bias)
    old = compensate(past, seen, compensation)
    w0, w = newest_weight, (1 - newest_weight) / old.mean.shape[1]
    M = w0 * mean + w * old.mean.sum(1)
    spread, step = old.mean - M[:, None], mean - M
    S = w0 * (var + step * step) + w * (old.var + spread * spread).sum(1)
    if gradient != "full" or seen is None:
        return WindowStatistics(M, S, share=1.0 if gradient == "straight_through" else w0)
    pull = spread if old.across is None else spread - old.across
    return WindowStatistics(M, S, w0, w, old.along, pull, seen.covariance, seen.patch_mean)


def gradient_through_the_past(window: WindowStatistics, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂θ [C, F] and ∂L/∂b [C] from ∂L/∂M and 2 ∂L/∂S [C]; for a window that depends on θ."""
    _, _, _, w, along, pull, covariance, patch_mean = window
    assert along is not None
    assert pull is not None
    assert covariance is not None
    assert patch_mean is not None
    grad_mean, grad_var = w * grad_mean[:, None], w * grad_var[:, None]
    along, pull = grad_var * along, grad_mean + grad_var * pull
    g_theta = (covariance * along[:, :, None]).sum(1)
    by_group(g_theta, len(patch_mean)).baddbmm_(by_group(pull, len(patch_mean)), patch_mean)
    return g_theta, pull.sum(1)


def is_known(condition: Tensor) -> bool:
    """Whether a condition can be looked at without waiting for a device: not on one, and no FakeTensor."""
    return condition.is_cpu and type(condition) is Tensor


class Running(NamedTuple):
    """Running statistics [C], to move by `momentum` towards the window's mean and `correction` times its var."""

    mean: Tensor
    var: Tensor
    momentum: float | Tensor
    correction: float | Tensor

    def update(self, mean: Tensor, var: Tensor, finite: Tensor) -> None:
        """Moves them, in place, unless a batch with NaN or inf makes `finite` false."""
        known = is_known(finite)
        if known and not finite:
            return
        for running, new in ((self.mean, mean), (self.var, var * self.correction)):
            new = new.to(running.dtype)
            if not known:  # decided on the device, without waiting for it
                new = torch.where(finite, new, running)
            momentum = self.momentum
            running.lerp_(new, momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum)


class Reader:
    """Says whether a backward pass that needs the window's tensors is still to come."""

    def __init__(self) -> None:
        self.waiting = True


class Affine(NamedTuple):
    """y = act((x - mean)·scale + shift), per channel [C]; act is the name of an activation, or empty."""

    mean: Tensor
    scale: Tensor
    shift: Tensor
    act: str = ""


class InputGradient(NamedTuple):
    """What a backward pass over x finds: ∂L/∂x, γ's and β's gradient, ∂L/∂M and 2 ∂L/∂S, all but the first [C]."""

    x: Tensor | None
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    twice_var: Tensor


class WindowNormalize(torch.autograd.Function):
    """y = γ (x - M) / sqrt(S + eps) + β, backpropagated through M and S to x and to the θ and b that made it.

    forward(x, θ, b, γ, β, window, eps, positions, total, kernels, spare, reader, act): x [N, C, ...] of any float
    dtype; θ [C, F] and b [C], or None; `WindowStatistics`; the number of values per channel in the current batch;
    `total`, which sums a tensor over the ranks of a process group where the batch is the joined one of all ranks, or
    None; the `Kernels` that make the passes over x, and what their `statistics` left to be overwritten, in a tuple
    since autograd takes a bare tensor for an input; `act`, one of the kernels' activations to be applied to y, or
    empty. Returns y in x's dtype.
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
        kernels: Kernels,
        spare: tuple[Tensor | None],
        reader: Reader,
        act: str,
    ) -> Tensor:
        """See the class."""
        inv_std = torch.rsqrt(window.var + eps)
        dtype = inv_std.dtype
        scale = inv_std if gamma is None else (inv_std * gamma).to(dtype)
        shift = torch.zeros_like(inv_std) if beta is None else beta.to(dtype).contiguous()
        affine = Affine(window.mean, scale, shift, act)
        ctx.save_for_backward(x, gamma, inv_std, *affine[:3], *window[4:])
        ctx.share, ctx.w, ctx.act = window.share / positions, window.w, act
        ctx.total, ctx.kernels, ctx.reader = total, kernels, reader
        return kernels.normalize(x, affine, *spare)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, θ, b, γ and β. ∂L/∂M and ∂L/∂S collect what every output says about the statistics.

        ∂L/∂M = -Σ g γ / sqrt(S + eps)              ∂L/∂S = -½ Σ g γ (x - M) / (S + eps)^(3/2)
        ∂L/∂x = g γ / sqrt(S + eps) + (w/m) (∂L/∂M + 2 ∂L/∂S (x - M))
        ∂L/∂θ = ∂L/∂M ∂M/∂θ + ∂L/∂S ∂S/∂θ           through the past; what passes through x, autograd adds
        """
        x, gamma, inv_std, M, scale, shift, *past = ctx.saved_tensors
        kernels = ctx.kernels
        affine = Affine(M, scale, shift, ctx.act)
        g_x, g_gamma, g_beta, g_M, twice_g_S = kernels.backward(
            g, x, affine, inv_std, ctx.share if ctx.needs_input_grad[0] else None, ctx.total
        )
        g_theta = g_b = None
        if past[0] is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            window = WindowStatistics(M, M, 0.0, ctx.w, *past)
            g_theta, g_b = kernels.gradient_through_the_past(window, g_M, twice_g_S)
            if not x.numel():  # a rank without images has no part in statistics that perhaps no rank could compute
                g_theta, g_b = torch.nan_to_num_(g_theta, 0, 0, 0), torch.nan_to_num_(g_b, 0, 0, 0)
        ctx.reader.waiting = torch._C._autograd._get_current_graph_task_keep_graph()
        return (
            g_x,
            g_theta if ctx.needs_input_grad[1] else None,
            g_b if ctx.needs_input_grad[2] else None,
            None if gamma is None else g_gamma.to(gamma.dtype),
            g_beta.to(gamma.dtype) if gamma is not None and ctx.needs_input_grad[4] else None,
            *[None] * 8,
        )
