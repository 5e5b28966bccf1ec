"""The comparison: every cell of the grid through `finetune`, each result kept as soon as it is there."""

from __future__ import annotations

import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CbnError, RunError
from ..training.config import FinetuneConfig
from ..training.faults import StopSignals
from ..training.metrics import read_metrics
from ..training.setup import owned
from ..training.splits import read_splits, refuse_among_images, test_split
from .config import ComparisonConfig
from .display import Display
from .estimate import estimated
from .page import write_report
from .plan import Cell, needed
from .store import (
    CELLS,
    LOG,
    Cells,
    check_new,
    check_same,
    check_same_images,
    clear,
    delete_weights,
    discard_if_nothing_ran,
    read_comparison,
    write,
)
from .summary import Comparison
from .workers import WorkerDiedError, Workers


class ComparisonInterrupted(KeyboardInterrupt):
    """A comparison was told to stop by a signal; the runs at hand have saved a checkpoint."""

    def __init__(self, number: int, run: FinetuneConfig) -> None:
        command = shlex.join(["cbn", "compare", run.data, "--resume", run.output])
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with {command}")
        self.exit_code = 128 + number


class Images(NamedTuple):
    """How many images the data have: of each class, by split, and the training images in all."""

    counts: dict[str, Any]
    training: int
    tested: bool

    def of_a_run(self, config: ComparisonConfig) -> int:
        """Training images that each run sees."""
        return config.images or self.training * config.run.epochs


def compare(
    config: ComparisonConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Comparison:
    """Fine-tunes with every norm and batch size of the grid, and writes results, table, plots and report.

    Every run sees the same number of images, but for the incomplete last step of an epoch. A rate is chosen by
    validation top-1; where the data are a folder with train/ and test/, and the latter does not serve for validation,
    the accuracies reported are of test/.

    Args:
        config: the grid, and the settings that all runs share.
        resume: goes on with what `config.run.output` holds; norms, batch sizes, rates and seeds may be others.
        overwrite: whether a comparison that is in the folder may be replaced.
        quiet: shows no progress.

    Raises RunError, DataError or ModelError, ComparisonInterrupted after a signal.
    """
    output = Path(config.run.output)
    images = check(config, resume=resume, overwrite=overwrite)
    # before anything is written, and while Ctrl-C ends it at once
    about = "" if quiet else estimated(config, read_comparison(output)[2] if resume else {}, images.of_a_run(config))
    with owned(output):
        results: Cells = {}
        if resume:  # once more, now that nobody else writes
            stored, seen, results = read_comparison(output)
            check_same(config, stored, output)
            check_same_images(images.counts, seen, config.run.data, output)
        else:
            clear(output)
        grid = _Grid(config, output, images, results)
        grid.save()
        try:
            grid.run(quiet, about)
        except CbnError as error:
            if not isinstance(error, WorkerDiedError):  # after which --resume is the advice
                discard_if_nothing_ran(output, grid.results)
            raise
        comparison = Comparison.of(config, grid.results)
        write_report(comparison, output)
    return comparison


def check(config: ComparisonConfig, *, resume: bool, overwrite: bool) -> Images:
    """What is in the data. Raises RunError or DataError if the comparison cannot begin or go on; writes nothing."""
    config.check()
    output = Path(config.run.output)
    refuse_among_images(output, config.run.data)
    if not resume:
        check_new(output, overwrite)
    elif not output.is_dir():
        raise RunError(f"{output} does not exist; leave --resume out to start a comparison")
    training, validation = read_splits(config.run.data, config.run.val_fraction, config.run.seed)
    test = test_split(config.run.data, training.classes, config.run.val_fraction)
    splits = {"train": training, "val": validation, "test": test}
    counts = {name: split.counts() for name, split in splits.items() if split is not None}
    images = Images({"classes": training.classes, **counts}, len(training.samples), test is not None)
    if resume:
        stored, seen, _ = read_comparison(output)
        check_same(config, stored, output)
        check_same_images(images.counts, seen, config.run.data, output)
    return images


class _Grid:
    """The cells and what is known of them."""

    def __init__(self, config: ComparisonConfig, output: Path, images: Images, results: Cells) -> None:
        self.config, self.output, self.available, self.results = config, output, images, results
        self.images = images.of_a_run(config)

    def save(self) -> None:
        """Writes results.json."""
        write(self.output, self.config, self.available.counts, self.results)

    def _folder(self, cell: Cell) -> Path:
        return self.output / CELLS / cell.name

    def _todo(self) -> list[Cell]:
        return [cell for cell in needed(self.config, self.results) if cell not in self.results]

    def run(self, quiet: bool, about: str) -> None:
        """Runs all cells that are needed, after a line about them. Raises ComparisonInterrupted after a signal."""
        for cell in self.results:
            delete_weights(self.output, cell)  # kill -9 may have come between result and deletion
        with (
            StopSignals() as signals,
            Display(quiet, self.config.jobs) as display,
            Workers(self.config.jobs, self.output / LOG) as workers,
        ):
            if about:
                display.line(about)
            while todo := self._todo():
                for cell in todo:
                    if workers.free and cell not in workers.running:
                        display.begin(cell, self._done(cell))
                        workers.start(cell, self._settings(cell).to_dict(), self.available.tested)
                display.update(len(self.results), {cell: 1 - self._done(cell) for cell in todo}, self.images)
                finished = workers.finished(timeout=0.1)  # a signal is heeded after it
                if finished is not None:
                    self._keep(*finished, display)
                if signals.received:
                    workers.stop()
                    raise ComparisonInterrupted(signals.received, self.config.run)
            display.update(len(self.results), {}, self.images)

    def _settings(self, cell: Cell) -> FinetuneConfig:
        settings = replace(self.config.cell(*cell), output=str(self._folder(cell)))
        if self.config.images:
            per_update = cell.batch_size * settings.accumulate
            per_epoch = self.available.training // per_update * per_update or self.available.training
            settings.max_steps = max(1, self.images // per_update)
            settings.epochs = 1 + -(-self.images // per_epoch)
        return settings

    def _keep(self, cell: Cell, result: dict[str, Any], display: Display) -> None:
        what = result.get("error") or f"validation top-1 {result['top1']:.2f} %"
        text = f"{cell.norm}, batch {cell.batch_size}, lr {cell.lr:g}, seed {cell.seed}: {what}"
        result["seconds"] = round(display.end(cell, self.images, text), 2)
        self.results[cell] = result
        self.save()
        delete_weights(self.output, cell)

    def _done(self, cell: Cell) -> float:
        """The part of a run that its log knows of."""
        records = read_metrics(self._folder(cell))
        images = self.config.run.accumulate * cell.batch_size
        return min(1.0, records[-1]["step"] * images / self.images) if records else 0.0
