"""Accuracy of a model on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import DataError, RunError
from .loading import Batch
from .parallel import Ranks


@dataclass(frozen=True)
class Evaluation:
    """Loss (cross-entropy) and accuracies in percent over `images` images.

    confusion: for each class a row with the number of its images that were taken for each class. bad_images: files that
    could not be read, and are not counted.
    """

    images: int
    loss: float
    top1: float
    top5: float
    confusion: list[list[int]]
    bad_images: list[str]

    @property
    def per_class(self) -> list[float | None]:
        """Top-1 of each class in percent, None for a class without images."""
        sums = [sum(row) for row in self.confusion]
        return [100 * row[i] / n if n else None for i, (row, n) in enumerate(zip(self.confusion, sums, strict=True))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the confusion matrix."""
        return {
            "images": self.images, "loss": self.loss, "top1": self.top1, "top5": self.top5,
            "per_class": self.per_class, "bad_images": self.bad_images,
        }  # fmt: skip


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    ranks: Ranks | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates the model, put into eval mode, on all batches of the loaders of all processes together.

    Images labelled IGNORED are not counted. Raises DataError if no image is left.

    Args:
        model: on `device`.
        loader: the batches of this process.
        device: where batches are moved.
        ranks: the processes; by default this one alone.
        interrupted: asked at every batch; as soon as it says so, the evaluation is given up, and None is returned.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    confusion, classes = torch.zeros(0, dtype=torch.long, device=device), 0
    bad: list[str] = []
    for batch in loader:
        if interrupted():
            return None
        x, y = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        logits = model(x).float()
        classes = logits.shape[1]
        known = y >= 0
        hits = logits.topk(min(5, classes)).indices == y[:, None]
        loss = F.cross_entropy(logits, y, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.any(1).sum(), known.sum()])
        if not len(confusion):
            confusion = confusion.new_zeros(classes * classes)
        pairs = torch.where(known, y * classes + logits.argmax(1), 0)
        confusion.index_add_(0, pairs, known.long())
        bad += batch.bad
    ranks = ranks or Ranks(alone=True)
    sums, bad = ranks.sum(sums), ranks.union(bad)
    loss, top1, top5, images = sums.tolist()
    if not images:
        raise DataError("there is no readable image to evaluate on; check the folder")
    classes = int(ranks.largest(classes))  # a process may have had no image
    table = ranks.sum(confusion if len(confusion) else confusion.new_zeros(classes * classes))
    return Evaluation(
        int(images), loss / images, 100 * top1 / images, 100 * top5 / images,
        table.view(classes, classes).tolist(), bad,
    )  # fmt: skip


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises RunError if it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next((name for name in ("cuda", "mps") if available[name]), "cpu"))
    if not available.get(device):
        raise RunError(f"device {device} is not available on this machine; use --device cpu or auto")
    return torch.device(device)
