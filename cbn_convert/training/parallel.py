"""What the processes of one run tell each other; all of it is nothing in a run of one process.

Collectives go through torch.distributed's default group, objects and flags through one of gloo, beside the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CbnError, RunError
from ..norm import CrossIterationMixin

T = TypeVar("T")


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

    def told(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, which alone calls it; if it fails there, a RunError in the others."""
        if self.count == 1:
            return act()
        outcome = _Outcome(act if self.main else lambda: None)
        answer = [outcome.result, outcome.sentence]
        dist.broadcast_object_list(answer, src=0, group=self._cpu)
        outcome.result = answer[0]
        return outcome.get(answer[1:])

    def agreed(self, act: Callable[[], T]) -> T:
        """What `act` gives in this process; if it fails in any, a RunError in those where it does not."""
        if self.count == 1:
            return act()
        outcome = _Outcome(act)
        sentences: list[Any] = [None] * self.count
        dist.all_gather_object(sentences, outcome.sentence, group=self._cpu)
        return outcome.get(sentences)

    def union(self, names: list[str]) -> list[str]:
        """The sorted union of the lists of all processes, in all of them."""
        if self.count == 1:
            return sorted(set(names))
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, names, group=self._cpu)
        return sorted({name for own in lists for name in own})

    def average_statistics(self, model: nn.Module) -> None:
        """The same running statistics in all processes: the mean of theirs, as timm's distribute_bn gives."""
        if self.count == 1:
            return
        for module in model.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, CrossIterationMixin)):
                for buffer in (module.running_mean, module.running_var):
                    if isinstance(buffer, Tensor):
                        buffer.copy_(self.sum(buffer.clone()) / self.count)


class _Outcome:
    """What a call gave, or the error that it raised, and this as a sentence for other processes."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self.sentence: str | None = None
        try:
            self.result = act()
        except Exception as error:
            self.error = error
            self.sentence = str(error) if isinstance(error, CbnError) else f"{type(error).__name__}: {error}"

    def get(self, said: Sequence[str | None]) -> Any:
        """The result; raises this process's own error, or the first that others `said`."""
        if self.error is not None:
            raise self.error
        if sentence := next(filter(None, said), None):
            raise RunError(sentence)
        return self.result
