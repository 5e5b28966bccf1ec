"""Which cells a comparison has, and which of them are still to be run.

Every column, a norm at a batch size, is tried at several learning rates with the first seed; the other seeds run at the
best of them, by validation top-1. Without a list of rates those around the automatic one are tried, a factor of √10
apart, until the best has none that is better on either side, or lies a factor of 1000 away. What is next depends on the
finished cells alone, not on the order in which they finished, so an interrupted comparison ends with the same cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .config import ComparisonConfig

STEP = 10**0.5
FARTHEST = 6  # steps from the automatic rate, a factor of 1000


class Cell(NamedTuple):
    """One run of the grid."""

    norm: str
    batch_size: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        norm = self.norm.replace(":", "-").replace("=", "")
        return f"{norm}_b{self.batch_size}_lr{self.lr!r}_s{self.seed}"


Results = Mapping[Cell, Mapping[str, Any]]


def score(result: Mapping[str, Any]) -> float:
    """What rates are chosen by: validation top-1, below any other if the run failed."""
    return -1.0 if "error" in result else float(result["top1"])


class Column:
    """A norm at a batch size."""

    def __init__(self, config: ComparisonConfig, norm: str, batch_size: int) -> None:
        self.config, self.norm, self.batch_size = config, norm, batch_size
        self.automatic = None if config.lrs else config.cell(norm, batch_size, None, 0).peak_lr()

    def _cell(self, lr: float, seed: int = 0) -> Cell:
        return Cell(self.norm, self.batch_size, lr, self.config.run.seed + seed)

    def _rate(self, place: int) -> float:
        """The rate so many steps above the automatic one, with three digits."""
        assert self.automatic is not None
        return float(f"{self.automatic * STEP**place:.3g}")

    def _searched(self, results: Results) -> tuple[list[Cell], Cell | None]:
        """The cells of the search that are known to be needed, and the best of them once all are finished."""
        if self.config.lrs:
            cells = [self._cell(lr) for lr in self.config.lrs]
            return cells, None if any(c not in results for c in cells) else max(cells, key=lambda c: score(results[c]))
        low, high = -1, 1
        while True:
            places = range(low, high + 1)
            cells = [self._cell(self._rate(place)) for place in places]
            if any(cell not in results for cell in cells):
                return cells, None
            scores = {place: score(results[cell]) for place, cell in zip(places, cells, strict=True)}
            # of equals the one nearest to the automatic rate: then a column that learns nothing ends here
            best = max(places, key=lambda place: (scores[place], -abs(place)))
            if scores[best] < 0:
                best = low  # too high, most likely
            if best == low > -FARTHEST:
                low -= 1
            elif best == high < FARTHEST:
                high += 1
            else:
                return cells, self._cell(self._rate(best))

    def needed(self, results: Results) -> list[Cell]:
        """The cells that are known to belong to the column; more may follow from their results."""
        cells, best = self._searched(results)
        if best is None or score(results[best]) < 0:
            return cells
        return [*cells, *(self._cell(best.lr, seed) for seed in range(1, self.config.seeds))]

    def at_edge(self, results: Results) -> bool:
        """Whether the best rate is the lowest or highest of several, so that a better one may lie beyond."""
        cells, best = self._searched(results)
        return len(cells) > 1 and best is not None and best.lr in (min(cells).lr, max(cells).lr)

    def best(self, results: Results) -> float | None:
        """The chosen rate; None before all rates were tried, or if every one failed."""
        best = self._searched(results)[1]
        return None if best is None or score(results[best]) < 0 else best.lr


def columns(config: ComparisonConfig) -> list[Column]:
    """All columns."""
    return [Column(config, norm, size) for norm, size in config.columns]


def needed(config: ComparisonConfig, results: Results) -> list[Cell]:
    """All cells that are known to be needed, the first seed of every column before the others."""
    cells = [cell for column in columns(config) for cell in column.needed(results)]
    return sorted(cells, key=lambda cell: cell.seed)
