"""What both kinds of window share, as mathematics without state: moments, and normalisation by a window's statistics.

Notation, for one output channel of x = θ·p + b, where p is the input patch at one of the m positions of a batch:

    mean  μ  = mean(x)                 M  the window's mean
    var   σ² = mean((x - μ)²)          S  the window's biased variance

Source: Yao et al., "Cross-Iteration Batch Normalization", arXiv 2002.05712, section 3. Everything is centred: no
expression subtracts two large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OptTensor = Tensor | None
NO_SQUARE = 1e-24  # what |θ|² and q are taken to be at least, so that they can be divided by
# A part of the mean variance that every entry of a patch is taken to have at least: one that hardly varied in the few
# patches seen so far may do so tomorrow. And what keeps q positive where nothing varies.
LEAST_VARIANCE, TINY = 0.05, 1e-12
# Principal axes of patches, or one for each entry, if these are fewer.
AXES = 8
# What has to be left along a probe for an axis of its own, of the variance along it and of that of all entries: less is
# rounding, of which an axis could be as large as the others.
LEAST_AXIS, LEAST_PART = 1e-4, 1e-6


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` where it has it already costs as much as an addition."""
    return t if t.dtype is dtype else t.to(dtype)


def by_group(t: Tensor, groups: int) -> Tensor:
    """Views [C, ...] as [G, C/G, ...]."""
    return t.view(groups, -1, *t.shape[1:])


def per_channel(values: Tensor, of: Tensor, axis: int = 0) -> Tensor:
    """Views [C] so that it broadcasts along an axis of a tensor."""
    return values.view(*[1] * axis, -1, *[1] * (of.dim() - axis - 1))


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
    # no matrix product, whose precision is up to the user's settings
    out: Tensor = torch.linalg.vecdot(by_group(theta, len(patch_mean)), patch_mean[:, None]).flatten()
    return out if bias is None else out + bias


def pooled(
    mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor, share: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture in which the new population has weight `share` (parallel variance formula).

    Args:
        mean, var: those of the old population [C].
        new_mean, new_var: those of the new one [C].
        share: from 0 to 1.
    """
    step = new_mean - mean
    return mean + share * step, torch.lerp(var, new_var, share) + share * (1 - share) * step.square()


def whole_gradient(of_window: tuple[Tensor, Tensor], mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """M and S of a window, with the derivatives that the batch, of this mean and variance, alone would give them."""
    M, S = (t.detach() for t in of_window)
    square = var + (mean - M) ** 2
    return M + mean - mean.detach(), S + square - square.detach()


def patch_shapes(groups: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Those of mean, variance beside the axes, and axes of patches with so many entries."""
    return (groups, width), (groups, width), (groups, min(AXES, width), width)


def between_means(probes: Tensor, step: Tensor) -> Tensor:
    """What a distance [G, F] between two means adds to a covariance along probes [G, K, F]."""
    return (probes * step[:, None]).sum(2, keepdim=True) * step[:, None]


def probes_of(axes: Tensor | None, groups: int, width: int, like: Tensor) -> Tensor:
    """Directions [G, K, F] of length 1, to look along: those of the axes, and any where there is none yet.

    Args:
        axes: u [G, K, F]; None, or those of another shape, count as none.
        groups, width: G and F.
        like: a tensor of the dtype and on the device of the directions.
    """
    # what is made for a FakeTensor is one itself, and of no use to others
    waves = _waves if type(like) is Tensor else _waves.__wrapped__
    any_ones = waves(min(AXES, width), width, like.dtype, like.device).expand(groups, -1, -1)
    if axes is None or axes.shape != any_ones.shape:
        return any_ones.contiguous()
    length = axes.norm(dim=2, keepdim=True)
    directions: Tensor = torch.where(length > 0, axes / length, any_ones)
    return directions


@lru_cache(maxsize=256)
def _waves(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal cosines [K, F] of length 1."""
    with torch.inference_mode(False):
        at = torch.arange(width, dtype=torch.float64, device="cpu") + 0.5  # some devices have no float64
        waves = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * at
        made = torch.cos(waves * (math.pi / width))
        directions: Tensor = (made / made.norm(dim=1, keepdim=True)).to(device, dtype)
        return directions


def principal_axes(probes: Tensor, along: Tensor, total: Tensor, least: Tensor) -> Tensor:
    """u [G, K, F] of a covariance Σ, from ΣV [G, K, F] along probes V: that of which Σ_k u_k u_kᵀ V = ΣV.

    Nyström's approximation, never above Σ. An axis is what those before leave of Σv, so that probes which are axes of
    the time before converge to principal ones, as in the power method; none where they leave nothing but rounding.

    Args:
        probes: V [G, K, F], of length 1.
        along: ΣV [G, K, F].
        total: the variance of every entry [G, F].
        least: what the axes leave of it at least [G, 1], whatever rounding does.
    """
    own, trace = (probes * along).sum(2), total.sum(1, keepdim=True)
    axes = []
    for k in range(probes.shape[1]):
        size = (probes[:, k] * along[:, k]).sum(1, keepdim=True)
        there = size > LEAST_AXIS * own[:, k : k + 1] + LEAST_PART * trace + TINY
        u = torch.where(there, along[:, k] / size.clamp_min(TINY).sqrt(), torch.zeros_like(size))
        along = along - (probes * u[:, None]).sum(2, keepdim=True) * u[:, None]
        axes.append(u)
    if not axes:
        return along
    found = torch.stack(axes, 1)
    explained = found.square().sum(1)
    most = (total - least).clamp_min(0)
    return found * torch.where(explained > most, (most / explained.clamp_min(TINY)).sqrt(), 1.0)[:, None]


class Affine(NamedTuple):
    """What a norm layer does with normalised values: γ and β [C], or None, and its eps."""

    gamma: Tensor | None
    beta: Tensor | None
    eps: float


def normalize(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """γ (x - M) / sqrt(S + eps) + β of x [N, C, ...] in its dtype, with the gradients of all; M and S [C].

    As BatchNorm in evaluation with M and S as they are, whose γ and β carry the gradients of M and S: its passes are
    fast, keep x alone, and have second derivatives.

    Args:
        x: [N, C, ...], in any float dtype.
        mean, var: M and S [C], in the dtype of statistics.
        gamma, beta: γ and β [C], or None.
        eps: as in BatchNorm.
    """
    M, S = mean.detach(), var.detach()
    if mean.requires_grad or var.requires_grad:
        # ones and zeros, to the bit, so that a pass without gradients gives the same
        inv_std = torch.rsqrt(var + eps)
        ratio, shift = inv_std * (S + eps).sqrt(), (M - mean) * inv_std
        gain = 1 + (ratio - ratio.detach())
        shift = shift if gamma is None else shift * gamma.to(M.dtype)
        gamma = gain if gamma is None else gain * gamma.to(M.dtype)
        beta = shift if beta is None else shift + beta.to(M.dtype)
    elif gamma is not None and gamma.dtype != M.dtype:
        gamma, beta = gamma.to(M.dtype), None if beta is None else beta.to(M.dtype)
    return F.batch_norm(x, M, S, gamma, beta, False, 0.0, eps)


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
