"""What the processes of one run tell each other; all of it is nothing in a run of one process.

Collectives go through torch.distributed's default group, objects and flags through one of gloo, beside the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..norm import CrossIterationMixin


class Ranks:
    """This process among all of the run; `alone` it takes no notice of others that there may be."""

    def __init__(self, alone: bool = False) -> None:
        joined = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.count = dist.get_world_size() if joined else 1
        self.main = self.rank == 0
        self._cpu: Any = dist.new_group(backend="gloo") if self.count > 1 else None

    def sum(self, t: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(t)
        return t

    def largest(self, number: float) -> float:
        """The largest of a number over all processes, without waiting for a GPU."""
        if self.count == 1:
            return number
        t = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self._cpu)
        return float(t)

    def gather(self, thing: Any) -> list[Any]:
        """The things of all processes in rank 0, in order; an empty list elsewhere."""
        if self.count == 1:
            return [thing]
        things = [None] * self.count if self.main else None
        dist.gather_object(thing, things, group=self._cpu)
        return things or []

    def union(self, names: list[str]) -> list[str]:
        """The sorted union of the lists of all processes, in all of them."""
        if self.count == 1:
            return sorted(set(names))
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, names, group=self._cpu)
        return sorted({name for own in lists for name in own})

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(group=self._cpu)

    def average_statistics(self, model: nn.Module) -> None:
        """The same running statistics in all processes: the mean of theirs, as timm's distribute_bn gives."""
        if self.count == 1:
            return
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, CrossIterationMixin)):
                for buffer in (module.running_mean, module.running_var):
                    if isinstance(buffer, Tensor):
                        buffer.copy_(self.sum(buffer.clone()) / self.count)
