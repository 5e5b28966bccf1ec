"""How long a comparison will take, before it begins."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..training.evaluation import resolve_device
from ..training.loading import evaluation_batch
from ..training.setup import build
from .config import ComparisonConfig
from .plan import Cell

TIMED = 2  # steps, after one that is not


def seconds(config: ComparisonConfig, cells: Iterable[Cell], images: int) -> float:
    """What these cells take if every step takes as long as one of BN with random images; loading is left out.

    images: those that each run sees. Raises what building a run raises.
    """
    device = resolve_device(config.run.device)
    todo = list(cells)
    sizes = sorted({cell.batch_size for cell in todo})
    setup = build(config.cell("bn", sizes[0], None, config.run.seed))
    model, shape = setup.model.to(device), setup.data_config["input_size"]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def took(batch_size: int, training: bool) -> float:
        x = torch.randn(batch_size, *shape, device=device)
        began = 0.0
        with torch.set_grad_enabled(training):
            for step in range(1 + TIMED):
                if step == 1:
                    began = time.perf_counter()
                # one image may leave one value per channel, at which BN does not train
                loss = F.cross_entropy(model.train(training and batch_size > 1)(x), x.new_zeros(batch_size).long())
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                float(loss)  # waits for the device
        return (time.perf_counter() - began) / TIMED

    step = {size: took(size, True) for size in sizes}
    batch = evaluation_batch(sizes[0], setup.data_config)
    epochs = math.ceil(images / max(1, len(setup.training.samples)))
    evaluation = epochs * math.ceil(len(setup.validation.samples) / batch) * took(batch, False)
    return sum(images / cell.batch_size * step[cell.batch_size] + evaluation for cell in todo) / config.jobs


def spoken(length: float) -> str:
    """Seconds in words."""
    if length < 90:
        return f"{length:.0f} s"
    return f"{length / 60:.0f} min" if length < 5400 else f"{length / 3600:.1f} h"
