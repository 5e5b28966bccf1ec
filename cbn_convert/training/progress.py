"""The progress bar of a run, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console
from typing_extensions import Self


class Bar:
    """A bar with these columns, on a terminal only; a context in which it is shown. Nothing at all when quiet."""

    def __init__(self, quiet: bool, *columns: progress.ProgressColumn) -> None:
        self.console = Console(stderr=True, quiet=quiet, emoji=False)
        self.bar = progress.Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        """Prints a line that stays, in one piece, for files and pipes have no width."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Progress(Bar):
    """A bar over all steps with loss, top-1, images/s and the time left."""

    def __init__(self, steps: int, done: int, quiet: bool) -> None:
        super().__init__(
            quiet,
            progress.TextColumn("training"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}  top-1 {task.fields[top1]} %"),
            progress.TextColumn("{task.fields[rate]} img/s"),
            progress.TimeRemainingColumn(),
        )
        fields: dict[str, Any] = {"loss": "-", "top1": "-", "rate": "-"}
        self.task = self.bar.add_task("training", total=steps, completed=done, **fields)
        self.images_per_step = 0

    def advance(self, images: int) -> None:
        """One step of so many images is done."""
        self.images_per_step = images
        self.bar.advance(self.task)

    def show(self, loss: float, top1: float) -> None:
        """Shows the mean loss and top-1 since the last call."""
        speed = self.bar.tasks[0].speed
        rate = "-" if speed is None else f"{speed * self.images_per_step:.0f}"
        self.bar.update(self.task, loss=f"{loss:.3f}", top1=f"{top1:.1f}", rate=rate)
