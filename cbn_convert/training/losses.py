"""What a run minimizes: cross-entropy, of mixed labels too, and with classes of unequal size balanced."""

from __future__ import annotations

import torch
from timm.data.mixup import one_hot
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn


class BalancedCrossEntropy(nn.Module):
    """The mean over images of their cross-entropies, each times the weight of its class.

    nn.CrossEntropyLoss(weight) divides by the weights of the batch's own images instead, so that at batch size 1 they
    cancel. Here the expected gradient is that of classes of equal size, whatever a batch holds. The labels of a mixed
    image weigh with their parts. weight: [classes]; label_smoothing: part of an image's weight spread over all classes.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [N, classes]; labels [N], each at least 0, or parts of the classes [N, classes], not smoothed."""
        classes = len(self.weight)
        parts = one_hot(target, classes) if target.ndim == 1 else target
        weighted = parts * self.weight
        spread = self.label_smoothing / classes * weighted.sum(1, keepdim=True)
        return SoftTargetCrossEntropy()(logits, (1 - self.label_smoothing) * weighted + spread)


def class_weights(counts: list[int]) -> Tensor:
    """Weights that are inversely proportional to the images of each class, their mean over all images 1."""
    images = torch.tensor(counts, dtype=torch.float32)
    return images.sum() / (images.count_nonzero() * images.clamp(min=1))


def make_loss(label_smoothing: float, mixes: bool, counts: list[int] | None = None) -> nn.Module:
    """The loss for labels [N], or with `mixes` for the parts [N, classes] that timm's Mixup gives.

    With `counts`, the images of each class, it is balanced and smooths by itself; if not, Mixup smooths.
    """
    if counts is not None:
        return BalancedCrossEntropy(class_weights(counts), label_smoothing)
    return SoftTargetCrossEntropy() if mixes else nn.CrossEntropyLoss(label_smoothing=label_smoothing)
