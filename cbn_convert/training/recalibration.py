"""Running statistics measured anew, with the weights as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor], frozen: Collection[str] = ()) -> None:
    """Sets the statistics of plain BatchNorm layers to the means over batches of images [N, 3, H, W], in place.

    Layers named in `frozen` keep theirs. All else stays in eval mode, unlike in torch.optim.swa_utils.update_bn, where
    dropout goes on. A model without BatchNorm stays as it is.
    """
    norms = [
        m for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and name not in frozen
    ]  # fmt: skip
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    try:
        for batch in images:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
