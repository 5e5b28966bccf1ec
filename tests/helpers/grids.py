"""Comparisons whose runs are made up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from cbn_convert.comparison.config import ComparisonConfig
from cbn_convert.comparison.plan import Cell, needed
from cbn_convert.training.config import FinetuneConfig

RUN = FinetuneConfig(data="photos", model="resnet18", output="out")


def grid(**changes: Any) -> ComparisonConfig:
    settings: dict[str, Any] = {"norms": ("bn", "cbn"), "batch_sizes": (2,), "reference": 0, **changes}
    return ComparisonConfig(settings.pop("run", RUN), **settings)


def finish(
    config: ComparisonConfig, top1: Callable[[Cell], float | None], order: random.Random | None = None
) -> dict[Cell, dict[str, Any]]:
    """Runs the whole grid, one cell at a time, in any order of those that are needed."""
    results: dict[Cell, dict[str, Any]] = {}
    while todo := [cell for cell in needed(config, results) if cell not in results]:
        cell = todo[0] if order is None else order.choice(todo)
        value = top1(cell)
        rest = {"step_seconds": 0.1, "peak_memory": None}
        results[cell] = {"error": "the loss is no longer finite"} if value is None else {"top1": value, **rest}
    return results


def peak(at: float) -> Callable[[Cell], float]:
    """Accuracies that are best at a rate and fall with its distance."""
    return lambda cell: 80 - 10 * abs(math.log10(cell.lr / at)) + 0.1 * cell.seed
