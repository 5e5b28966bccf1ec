"""Statistics of the batch that all ranks of a process group see together, as in torch's SyncBatchNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from .functional import statistics_dtype
from .kernels import select

if TYPE_CHECKING:
    from .batch import Batch
    from .carried import Carried
    from .moments import InputPatches


def world_size() -> int:
    """Ranks in the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(t: Tensor) -> Tensor:
    """Sum of a tensor over all ranks."""
    t = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t)
    return t


def joined_statistics(x: Tensor, ranks: int) -> tuple[float | Tensor, Tensor, Tensor]:
    """Number of values per channel, mean and biased variance [C] of x [N, C, ...] over all ranks, with gradients.

    N may be 0 here, but not on all ranks.
    """
    axes, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    x = x.to(statistics_dtype(x))
    if ranks == 1:
        var, mean = torch.var_mean(x, axes, correction=0)
        return float(count), mean, var
    sums = all_reduce(torch.cat([x.sum(axes), x.new_full((1,), count)]))
    every = sums[-1].detach()
    mean = sums[:-1] / every
    spread = (x - mean.view(1, -1, *[1] * (x.dim() - 2))).square().sum(axes)
    return every, mean, all_reduce(spread) / every


def joined_mean(t: Tensor, count: int, ranks: int) -> Tensor:
    """Mean over all ranks of a mean over `count` values here, which is ignored where count is 0."""
    if ranks == 1:
        return t
    flat = t.flatten() * count if count else t.new_zeros(t.numel())
    sums = total(torch.cat([flat, t.new_full((1,), count)]))
    return (sums[:-1] / sums[-1]).view_as(t)


class JoinedMoments(NamedTuple):
    """Mean and variance of a batch and of its input patches, over all ranks.

    images: those that the batch stands for.
    """

    mean: Tensor  # [C]
    var: Tensor  # [C]
    images: float | Tensor
    patch_mean: Tensor | None = None  # [G, F]
    patch_var: Tensor | None = None  # [G, F]

    @property
    def finite(self) -> Tensor:
        """Whether all values are; those of patches may be too large where their x is not."""
        finite = torch.isfinite(self.mean + self.var).all()
        if self.patch_mean is None or self.patch_var is None:
            return finite
        return finite & torch.isfinite(self.patch_mean + self.patch_var).all()


def joined_moments(batch: Batch, patches: InputPatches | None, about: Carried, images: int) -> JoinedMoments:
    """The moments of a batch, joined by one sum over the ranks, of distances to what is known already (`about`).

    images: those of this rank that the batch stands for.
    """
    if batch.ranks == 1:
        mean, var = select(batch.x).statistics(batch.x)
        found = () if patches is None else patches.mean_and_var()
        return JoinedMoments(mean, var, images, *found)
    count = batch.x.numel() // batch.x.shape[1]
    nothing = about.mean.new_zeros(len(about.mean))
    parts = [(*(select(batch.x).statistics(batch.x) if count else (nothing, nothing)), about.mean, count)]
    if patches is not None:
        known = about.patch_mean
        centre = about.mean.new_zeros(()) if known is None else known
        parts.append((*patches.mean_and_var(), centre, patches.positions))
    sums = []
    for mean, var, centre, n in parts:
        away = (mean - centre).double()
        sums += [n * away.flatten(), n * (var.double() + away * away).flatten(), away.new_full((1,), n)]
    sums.append(sums[0].new_full((1,), images))
    found, moments = total(torch.cat(sums)).split([len(t) for t in sums]), []
    for i, (mean, _, centre, _) in enumerate(parts):
        first, second, every = found[3 * i : 3 * i + 3]
        away = (first / every).view_as(mean)
        moments += [centre + away.to(mean.dtype), ((second / every).view_as(mean) - away * away).to(mean.dtype)]
    return JoinedMoments(moments[0], moments[1], found[-1].to(moments[0].dtype), *moments[2:])
