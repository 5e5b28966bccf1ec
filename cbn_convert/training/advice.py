"""How far the images are from those that the weights were trained on, and which norm that speaks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modes import modes_kept
from ..norm.functional import is_measured
from .config import FinetuneConfig
from .loading import batches, evaluation_batch, plain_loader
from .setup import Setup

SHIFT_IMAGES = 64
# Between the data sets of docs/results.md, on three networks (docs/training.md has the table).
FAR = 0.1
_STUDY = "in this project's comparisons; cbn compare asks your images"
SMALL_BATCH = 4  # up to which the study compares the norms in all ways


@torch.no_grad()
def statistics_shift(model: nn.Module, images: Iterable[Tensor]) -> float | None:
    """Median over all BatchNorm channels of the divergence of what they see from their running statistics, in nats.

    The Kullback-Leibler divergence of two normal distributions, of the inputs over all images [N, 3, H, W] from the
    running mean and variance, in evaluation mode. Modes, weights and statistics stay as they are. None where there is
    no BatchNorm, none whose running statistics are not those of a new one, or no image.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and is_measured(m.running_mean, m.running_var)]
    if not norms:
        return None
    sums: dict[nn.Module, Tensor] = {}  # of 1, x - running_mean and its square, [3, C]
    hooks = [norm.register_forward_pre_hook(partial(_add, sums), with_kwargs=True) for norm in norms]
    with modes_kept(model):
        try:
            model.eval()
            for batch in images:
                model(batch)
        finally:
            for hook in hooks:
                hook.remove()
    divergences = [_divergence(norm, *total) for norm, total in sums.items()]
    shift = float(torch.cat(divergences).nanmedian()) if divergences else math.nan
    return shift if math.isfinite(shift) else None


def _add(sums: dict[nn.Module, Tensor], norm: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    x = args[0] if args else kwargs["input"]
    x = x.transpose(0, 1).flatten(1).float()
    var, mean = (t.cpu().double() for t in torch.var_mean(x, 1, correction=0))
    step = mean - norm.running_mean.cpu().double()
    new = torch.stack([torch.ones_like(step), step, var + step.square()]) * x.shape[1]
    sums[norm] = sums[norm] + new if norm in sums else new


def _divergence(norm: Any, count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    step = first / count
    expected = norm.running_var.cpu().double() + norm.eps
    ratio = ((second / count - step.square()).clamp_min(0) + norm.eps) / expected
    return (ratio - 1 - ratio.log() + step.square() / expected) / 2


def measure(
    model: nn.Module,
    setup: Setup,
    config: FinetuneConfig,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """`statistics_shift` on some training images, as evaluation sees them; the same ones for the same seed.

    Args:
        model: with the statistics that the images are compared with.
        setup, config: those of the run.
        device: that of the model.
        interrupted: asked while images have to be waited for.

    Raises DataError where images have to be waited for and `interrupted()`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(setup.training.samples), generator=generator)[:SHIFT_IMAGES].tolist()
    size = min(evaluation_batch(config.batch_size, setup.data_config), SHIFT_IMAGES)
    loader = plain_loader(
        setup.training, setup.data_config, size, config.workers, skip_bad=config.skip_bad_images, indices=chosen
    )
    readable = (batch.images[batch.labels >= 0] for batch in batches(loader, interrupted))
    return statistics_shift(model, (images.to(device) for images in readable if len(images)))


def advice(config: FinetuneConfig, shift: float | None) -> str:
    """What the study (docs/results.md) found of a run's norm at its batch size on images like these; may be empty."""
    norm, batch_size = config.norm, config.batch_size
    at = f"at {batch_size} image{'s' * (batch_size > 1)} per step"
    if shift is None:
        random_weights = not config.pretrained and config.checkpoint is None
        if not random_weights or norm not in ("cbn", "bn", "brn") or batch_size > SMALL_BATCH:
            return ""
        return (
            f"the weights have no statistics to start from: {at} --norm gn was better from random weights, or level "
            f"{_STUDY}"
        )
    far = shift >= FAR
    found = f"the images are {'far from' if far else 'near to'} those of the pretraining ({shift:.2f} nats)"
    if norm in ("frozen", "tune"):
        return f"{found}: --norm cbn was better than frozen BN, or level, on both kinds {_STUDY}"
    if norm in ("bn", "brn") and batch_size <= SMALL_BATCH:
        second = "" if far else ", and so was --norm frozen"
        level = ", or level," if far and batch_size == SMALL_BATCH else ""
        return f"{found}: {at} --norm cbn was better{level}{second} {_STUDY}"
    if norm == "cbn" and batch_size <= SMALL_BATCH:
        return f"{found}: {at} --norm cbn was best, or level, on both kinds {_STUDY}"
    return found
