"""Statistics of the batch that all ranks of a process group see together, as in torch's SyncBatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from .functional import between_means, probes_of, statistics_dtype
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


class PatchMoments(NamedTuple):
    """Mean, variance and covariance of the input patches of a batch, the latter along some directions."""

    mean: Tensor  # p̄ [G, F]
    var: Tensor  # of every entry [G, F]
    probes: Tensor  # V [G, K, F]
    along: Tensor  # ΣV [G, K, F]


class JoinedMoments(NamedTuple):
    """Mean and variance of a batch and moments of its input patches, over all ranks.

    images: those that the batch stands for.
    """

    mean: Tensor  # [C]
    var: Tensor  # [C]
    images: float | Tensor
    patches: PatchMoments | None = None

    @property
    def finite(self) -> Tensor:
        """Whether all values are; those of patches may be too large where their x is not."""
        finite = torch.isfinite(self.mean + self.var).all()
        if self.patches is None:
            return finite
        mean, var, _, along = self.patches
        return finite & torch.isfinite(mean + var + along.sum(1)).all()


def joined_moments(batch: Batch, patches: InputPatches | None, about: Carried, images: int) -> JoinedMoments:
    """The moments of a batch, joined by one sum over the ranks, of distances to what is known already (`about`).

    Args:
        batch: that of this rank.
        patches: those of its input, looked at along the axes that are known; None in a look at none.
        about: what is known already.
        images: those of this rank that the batch stands for.
    """
    count, nothing = batch.x.numel() // batch.x.shape[1], about.mean.new_zeros(len(about.mean))
    mean, var = select(batch.x).statistics(batch.x) if count or batch.ranks == 1 else (nothing, nothing)
    here = None if patches is None else _patch_moments(patches, about)
    if batch.ranks == 1:
        return JoinedMoments(mean, var, images, here)
    away = (mean - about.mean).double()
    sums = [count * away, count * (var.double() + away * away), away.new_tensor([count, images])]
    if here is not None and patches is not None:
        sums += _patch_sums(here, about.patch_mean, patches.positions)
    found = total(torch.cat([t.flatten() for t in sums])).split([t.numel() for t in sums])
    every, images_of_all = found[2].unbind()
    away, second = found[0] / every, found[1] / every
    joined = (about.mean + away.to(mean.dtype), (second - away * away).to(mean.dtype), images_of_all.to(mean.dtype))
    return JoinedMoments(*joined, None if here is None else _joined_patches(here, about.patch_mean, found[3:]))


def joined_patches(patches: InputPatches, about: Carried, ranks: int) -> PatchMoments:
    """The moments of patches alone, joined over the ranks likewise."""
    here = _patch_moments(patches, about)
    if ranks == 1:
        return here
    sums = _patch_sums(here, about.patch_mean, patches.positions)
    found = total(torch.cat([t.flatten() for t in sums])).split([t.numel() for t in sums])
    return _joined_patches(here, about.patch_mean, found)


def _patch_moments(patches: InputPatches, about: Carried) -> PatchMoments:
    probes = probes_of(about.patch_axes, patches.groups, patches.width, about.table)
    mean, var, along = patches.moments(probes)
    return PatchMoments(mean, var, probes, along)


def _patch_sums(here: PatchMoments, centre: Tensor | None, positions: int) -> list[Tensor]:
    """Sums over the positions of this rank: of distances to a centre, their squares, and products along the probes."""
    away = (here.mean if centre is None else here.mean - centre).double()
    sums = [away, here.var.double() + away * away, here.along.double() + between_means(here.probes, away)]
    return [*[positions * t for t in sums], away.new_tensor([positions])]


def _joined_patches(here: PatchMoments, centre: Tensor | None, sums: Sequence[Tensor]) -> PatchMoments:
    """The moments of all ranks, of the sums of their `_patch_sums`."""
    dtype, shapes = here.mean.dtype, (here.mean, here.var, here.along)
    away, second, along = ((t / sums[3]).view_as(like) for t, like in zip(sums, shapes, strict=False))
    mean = away.to(dtype) if centre is None else centre + away.to(dtype)
    along = (along - between_means(here.probes, away)).to(dtype)
    return here._replace(mean=mean, var=(second - away * away).to(dtype), along=along)
