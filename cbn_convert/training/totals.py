"""Sums over the updates since the last record, kept on the device so that no step waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parallel import Ranks


class Totals:
    """Loss, hits and images of finite steps, and which step was the first that was not."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(4, device=device)  # loss, hits, images, updates left out
        self.first = torch.full((), torch.inf, device=device)
        self.rates: dict[int, float] = {}
        self.lr = 0.0
        self.bad_losses = torch.zeros((), device=device)  # parts of the update under way

    @property
    def updates(self) -> int:
        """Updates since the last record."""
        return len(self.rates)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """The mean loss of a batch, its logits [N, classes] and labels [N]."""
        loss = loss.detach().float()
        finite = torch.isfinite(loss)
        hits = (logits.detach().argmax(1) == labels).sum()
        added = torch.stack(
            [loss * len(labels), hits.float(), torch.full_like(loss, len(labels)), torch.zeros_like(loss)]
        )
        self.sums += torch.where(finite, added, 0.0)
        self.bad_losses += ~finite

    def loss_is_bad(self) -> Tensor:
        """Whether the loss of any part of the update under way is not finite in some process; asks all of them."""
        return self.ranks.sum(self.bad_losses.clone()) > 0

    def note(self, bad: Tensor, step: int) -> None:
        """Whether update `step`, which ends here, was not finite."""
        self.bad_losses.zero_()
        self.sums[3] += bad
        self.first = torch.where(bad, self.first.clamp(max=step), self.first)
        self.rates[step] = self.lr

    def first_bad(self) -> tuple[int, float] | None:
        """The first update since the last record that was not finite in some process, and its rate."""
        first = -self.ranks.largest(-float(self.first))
        return None if first == torch.inf else (int(first), self.rates.get(int(first), self.lr))

    def take(self) -> tuple[float, float, int]:
        """Mean loss, top-1 in percent and updates left out, of all processes; starts again from zero."""
        loss, hits, images, skipped = self.ranks.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        self.first.fill_(torch.inf)
        self.rates.clear()
        images = max(images, 1)
        return loss / images, 100 * hits / images, round(skipped / self.ranks.count)

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two records."""
        return {"sums": self.sums, "rates": self.rates, "lr": self.lr}

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.sums.copy_(state["sums"])
        self.rates, self.lr = dict(state["rates"]), state["lr"]
