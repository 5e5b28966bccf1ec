"""Statistics of the batch that all ranks of a process group see together, as in torch's SyncBatchNorm."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import statistics_dtype
from .kernels import batch_statistics


def world_size() -> int:
    """Ranks in the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(t: Tensor) -> Tensor:
    """Sum of a tensor over all ranks."""
    t = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t)
    return t


def joined_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values per channel, mean and biased variance [C] of x [N, C, ...] over all ranks; N may be 0 here."""
    count = x.numel() // x.shape[1]
    nothing = x.new_zeros(x.shape[1], dtype=statistics_dtype(x))
    mean, var = batch_statistics(x) if count else (nothing, nothing)
    sums = total(torch.cat([mean * count, mean.new_full((1,), count)]))
    every, joined = sums[-1], sums[:-1] / sums[-1]
    return every, joined, total(count * (var + (mean - joined) ** 2)) / every


def joined_mean(t: Tensor, count: int) -> Tensor:
    """Mean over all ranks of a mean over `count` values here, which is ignored where count is 0."""
    flat = t.flatten() * count if count else t.new_zeros(t.numel())
    sums = total(torch.cat([flat, t.new_full((1,), count)]))
    return (sums[:-1] / sums[-1]).view_as(t)
