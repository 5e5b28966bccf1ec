"""Which runs a task's grid has, and which is next: the search of rates is that of `cbn compare`.

A column, a treatment at a batch size, is tried with seed 0 at the task's rate, which goes with the root of the batch
size, and at √10 times more and less, until the best has none that is better on either side. The other seeds run at the
best. All columns of a batch size are searched before their other seeds, and the batch sizes follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from cbn_convert.comparison.plan import Cell, Column

SEEDS = 3
Records = Mapping[Cell, Mapping[str, Any]]


class DenseColumn(Column):
    """A treatment at a batch size."""

    def __init__(self, rate: float, treatment: str, batch: int, seeds: int) -> None:
        self.config: Any = SimpleNamespace(lrs=None, run=SimpleNamespace(seed=0), seeds=seeds)
        self.norm, self.batch_size = treatment, batch
        self.automatic = float(f"{rate * (batch / 2) ** 0.5:.3g}")


def results(records: Sequence[Mapping[str, Any]], metric: str) -> dict[Cell, dict[str, Any]]:
    """Records as the search reads them: a value to choose by, or an error."""
    found = {}
    for one in records:
        cell = Cell(one["treatment"], one["batch"], one["lr"], one["seed"])
        found[cell] = {**one, **({} if one["diverged"] else {"top1": one["val"][metric]})}
        if one["diverged"]:
            found[cell].setdefault("error", "diverged")
    return found


def following(columns: Sequence[DenseColumn], found: Records) -> Cell | None:
    """The next run; None if all are there."""
    for batch in dict.fromkeys(column.batch_size for column in columns):
        own = [column for column in columns if column.batch_size == batch]
        missing = [[c for c in column.needed(found) if c not in found] for column in own]
        for seed in range(max(column.config.seeds for column in own)):
            # the search's first rate of all columns before the second of any, so that what is cut off is comparable
            open_ = [
                (place, i, cell)
                for i, cells in enumerate(missing)
                for place, cell in enumerate(_central(own[i], cells))
                if cell.seed == seed
            ]
            if open_:
                return min(open_, key=lambda one: (_tried(own[one[1]], found), one[0], one[1]))[2]
    return None


def _tried(column: DenseColumn, found: Records) -> int:
    return sum((c.norm, c.batch_size) == (column.norm, column.batch_size) for c in found)


def _central(column: DenseColumn, cells: list[Cell]) -> list[Cell]:
    """The rates nearest to where the search began first."""
    assert column.automatic is not None
    automatic = column.automatic
    return sorted(cells, key=lambda c: (c.seed, max(c.lr / automatic, automatic / c.lr)))


def runs(columns: Sequence[DenseColumn], found: dict[Cell, Any]) -> Iterator[Cell]:
    """One after the other; whoever iterates adds to `found` in between."""
    while (cell := following(columns, found)) is not None:
        yield cell
