"""What a user sees of a comparison while it runs, on standard error."""

from __future__ import annotations

import time

from rich import progress

from ..training.progress import Bar
from .estimate import spoken
from .plan import Cell

UNFINISHED = 0.02  # what is at least left of a run


class Display(Bar):
    """One bar for all cells with the time left, and a line for each that is finished."""

    def __init__(self, quiet: bool, jobs: int) -> None:
        super().__init__(
            quiet,
            progress.TextColumn("{task.fields[done]} of {task.fields[cells]} runs"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[left]}"),
        )
        self.jobs = jobs
        self.task = self.bar.add_task("", total=1.0, done=0, cells=0, left="")
        self.rates: dict[int, list[float]] = {}  # seconds per image, by batch size
        self.started: dict[Cell, tuple[float, float]] = {}

    def begin(self, cell: Cell, part: float) -> None:
        """A cell has started, of which this part was done before."""
        self.started[cell] = time.monotonic(), part

    def end(self, cell: Cell, images: int, text: str) -> float:
        """A cell that took so many images is finished; the seconds that it took."""
        began, part = self.started.pop(cell)
        seconds = time.monotonic() - began
        if part < 1:
            self.rates.setdefault(cell.batch_size, []).append(seconds / (images * (1 - part)))
        self.line(text)
        return seconds

    def update(self, done: int, todo: dict[Cell, float], images: int) -> None:
        """`done` cells are finished; of those that are not, the part that is left; images of a cell."""
        cells = done + len(todo)
        left = ""
        if self.rates:
            known = [rate for rates in self.rates.values() for rate in rates]
            seconds = sum(
                max(part, UNFINISHED) * images * _mean(self.rates.get(cell.batch_size, known))
                for cell, part in todo.items()
            )
            left = f"at least {spoken(seconds / self.jobs)} left"
        # a run whose last step is logged is not finished: it evaluates
        part = 1 - sum(max(part, UNFINISHED) for part in todo.values()) / cells if cells else 1.0
        self.bar.update(self.task, completed=part, done=done, cells=cells, left=left)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
