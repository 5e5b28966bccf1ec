"""What both kinds of window share, as mathematics without state: moments, and normalisation by a window's statistics.

Notation, for one output channel of x = θ·p + b, where p is the input patch at one of the m positions of a batch:

    mean  μ  = mean(x)                 M  the window's mean
    var   σ² = mean((x - μ)²)          S  the window's biased variance

Source: Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712, section 3. Everything is centred: no
expression subtracts two large numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .kernels import Kernels


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_group(t: Tensor, groups: int) -> Tensor:
    """Views [C, ...] as [G, C/G, ...]."""
    return t.view(groups, -1, *t.shape[1:])


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Views a vector [C] so that it broadcasts against x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def is_known(condition: Tensor) -> bool:
    """Whether a condition can be looked at without waiting for a device: not on one, and no FakeTensor."""
    return condition.is_cpu and type(condition) is Tensor


def is_measured(mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether running statistics are there and not a new BatchNorm's zeros and ones; true of those without values."""
    if mean is None or var is None:
        return False
    return mean.is_meta or type(mean) is not Tensor or bool((mean != 0).any() | (var != 1).any())


def response(patch_mean: Tensor, theta: Tensor, bias: Tensor | None) -> Tensor:
    """θ·p̄ + b [C] for mean patches [G, F], weights [C, F] and bias [C]."""
    out = torch.bmm(by_group(theta, len(patch_mean)), patch_mean[:, :, None]).flatten()
    return out if bias is None else out + bias


def pooled(
    mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, share: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture in which the new population has weight `share` (parallel variance formula)."""
    step = new_mean - mean
    return mean + share * step, var + share * (new_var - var) + share * (1 - share) * step * step


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


class FoldGradient(NamedTuple):
    """What the gradient of folded rows s θ is made of [C]; p̄ and d [G, F] are None where M and S are fixed."""

    scale: Tensor  # s
    inv_std: Tensor  # 1 / sqrt(S + eps)
    away: Tensor  # b - M
    shift: Tensor  # ∂L/∂(β + s (b - M))
    along_length: Tensor  # (M - θ·p̄ - b) / |θ|²: ∂M/∂θ = p̄ + along_length θ
    along_spread: Tensor  # 2 S / q: ∂S/∂θ = along_spread d θ
    patch_mean: Tensor | None = None
    patch_var: Tensor | None = None


class WindowStatistics(NamedTuple):
    """M and S of a window as the sum of what the current batch and the past contribute.

        M = share·μ + past_mean        S = share·(σ² + (μ - M)²) + past_square, where past_square is about M

    past_mean and past_square [C] carry the gradient to the weights, if there is one. They are None where the batch is
    all of the window, where a carried window is constant (share 0), and with `replaces`, by which the batch gets the
    gradient of the whole window, as if it were all of it.
    """

    mean: Tensor
    var: Tensor
    share: float
    past_mean: Tensor | None = None
    past_square: Tensor | None = None
    replaces: bool = False


class Pass(NamedTuple):
    """How `Normalize` makes its passes over x.

    eps: as in BatchNorm. act: the name of one of the kernels' activations, applied to y, or empty. positions: values
    per channel in the current batch. total: sums a tensor over the ranks where the batch is the joined one of all.
    """

    kernels: Kernels
    eps: float
    act: str
    positions: float | Tensor
    total: Callable[[Tensor], Tensor] | None


class Normalize(torch.autograd.Function):
    """y = act(γ (x - M) / sqrt(S + eps) + β), backpropagated through M and S to x and to the past.

    forward(x, γ, β, past_mean, past_square, window, settings): x [N, C, ...] of any float dtype; γ and β [C] or None;
    the past's tensors once more, as what autograd sees, beside the `WindowStatistics` that they belong to; `Pass`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        past_mean: Tensor | None,
        past_square: Tensor | None,
        window: WindowStatistics,
        settings: Pass,
    ) -> Tensor:
        """See the class."""
        inv_std = torch.rsqrt(window.var + settings.eps)
        dtype = inv_std.dtype
        scale = inv_std if gamma is None else (inv_std * gamma).to(dtype)
        shift = torch.zeros_like(inv_std) if beta is None else beta.to(dtype).contiguous()
        affine = Affine(window.mean, scale, shift, settings.act)
        ctx.save_for_backward(x, gamma, beta, past_mean, past_square, window.mean, window.var, inv_std, scale, shift)
        ctx.share, ctx.replaces, ctx.settings = window.share, window.replaces, settings
        return settings.kernels.normalize(x, affine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, γ, β and the past. ∂L/∂M and ∂L/∂S collect what every output says about the statistics.

        ∂L/∂M = -Σ g γ / sqrt(S + eps)              ∂L/∂S = -½ Σ g γ (x - M) / (S + eps)^(3/2)
        ∂L/∂x = g γ / sqrt(S + eps) + (share/m) (∂L/∂M + 2 ∂L/∂S (x - M))

        With create_graph, all of it by the formulas that have derivatives of their own.
        """
        (g,) = grads
        x, gamma, beta, past_mean, past_square, M, S, inv_std, scale, shift = ctx.saved_tensors
        settings: Pass = ctx.settings
        if torch.is_grad_enabled():
            window = WindowStatistics(M, S, ctx.share, past_mean, past_square, ctx.replaces)
            return (
                *gradients(plainly_normalized, (x, gamma, beta, past_mean, past_square), g, window, settings),
                None,
                None,
            )
        share = 1.0 if ctx.replaces else ctx.share
        share = share / settings.positions if share else 0.0
        found = settings.kernels.backward(
            g, x, Affine(M, scale, shift, settings.act), inv_std, share if ctx.needs_input_grad[0] else None,
            settings.total,
        )  # fmt: skip
        g_mean, g_var = found.mean, found.twice_var / 2
        if not x.numel():  # a rank without images has no part in statistics that perhaps no rank could compute
            g_mean, g_var = (torch.nan_to_num(t, 0, 0, 0) for t in (g_mean, g_var))
        return (
            found.x,
            None if gamma is None else found.gamma.to(gamma.dtype),
            None if beta is None else found.beta.to(beta.dtype),
            None if past_mean is None else g_mean,
            None if past_square is None else g_var,
            None,
            None,
        )


def plainly_normalized(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    past_mean: Tensor | None,
    past_square: Tensor | None,
    window: WindowStatistics,
    settings: Pass,
) -> Tensor:
    """The function that `Normalize` computes, in operations that can be differentiated as often as one likes.

    past_square is about the value of M; about M itself it is
    past_square - 2 (M - value) (past_mean - (1 - share) value) + (1 - share) (M - value)²,
    whose first derivative is that of past_square.
    """
    if settings.total is not None:
        raise RuntimeError(
            "second derivatives are not known through statistics that are synchronised; convert without sync"
        )
    dtype, axes = window.mean.dtype, [0, *range(2, x.dim())]
    xs, at = x.to(dtype), window.mean.detach()
    share, rest = window.share, 1 - window.share
    if window.replaces:
        # the values of the window, with the derivatives that the batch alone would give it
        own, square = xs.mean(axes), (xs - per_channel(at, xs)).square().mean(axes)
        mean, var = at + own - own.detach(), window.var + square - square.detach()
    elif share:
        mean = share * xs.mean(axes) + (0 if past_mean is None else past_mean)
        var = share * (xs - per_channel(mean, xs)).square().mean(axes)
        if past_mean is not None and past_square is not None:
            step = mean - at
            var = var + past_square - 2 * step * (past_mean - rest * at) + rest * step * step
    else:
        mean = window.mean if past_mean is None else past_mean
        var = window.var if past_square is None else past_square
    scale = torch.rsqrt(var + settings.eps)
    y = (xs - per_channel(mean, xs)) * per_channel(scale if gamma is None else scale * gamma.to(dtype), xs)
    y = (y if beta is None else y + per_channel(beta.to(dtype), xs)).to(x.dtype)
    return getattr(F, settings.act)(y) if settings.act else y


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor, *constants: Any
) -> tuple[Tensor | None, ...]:
    """∂(g·function)/∂input for each input that requires a gradient, connected to inputs and g by autograd."""
    # copies under which each input counts once, although it may be part of another's history
    own = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in own if t is not None and t.requires_grad]
    if not wanted:
        return tuple(None for _ in own)
    found = iter(torch.autograd.grad(function(*own, *constants), wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in own)
