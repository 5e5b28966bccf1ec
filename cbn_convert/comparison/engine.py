"""The comparison: every cell of the grid through `finetune`, each result kept as soon as it is there."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__
from ..errors import RunError
from ..files import check_output, read_json, remove_directory, write_json
from ..training.config import FinetuneConfig
from ..training.data import read_splits
from ..training.faults import StopSignals
from ..training.metrics import read_metrics
from ..training.setup import owned
from .config import PLACE, ComparisonConfig
from .display import Display
from .plan import Cell, needed
from .report import write_report
from .summary import Comparison
from .workers import Workers

RESULTS = "results.json"
_CELLS = "cells"


class ComparisonInterrupted(KeyboardInterrupt):
    """A comparison was told to stop by a signal; the runs at hand have saved a checkpoint."""

    def __init__(self, number: int, output: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume {output}")
        self.exit_code = 128 + number


def compare(
    config: ComparisonConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> Comparison:
    """Fine-tunes with every norm and batch size of the grid, and writes results, table, plots and report.

    Every run sees the same number of images, but for the incomplete last step of an epoch. A rate is chosen by
    validation top-1; where the data have a test/ folder, the accuracies reported are of that. `resume` goes on with
    what `config.run.output` holds; norms, batch sizes, rates and seeds may have become more. Raises RunError, DataError
    or ModelError, ComparisonInterrupted after a signal.
    """
    config.check()
    output = Path(config.run.output)
    stored = None
    if resume:
        stored = read_comparison(output)
        _check_same(config, stored[0], output)
    else:
        _check_new(output, overwrite)
    training, _ = read_splits(config.run.data, config.run.val_fraction, config.run.seed)
    with owned(output):
        if stored is None:
            _clear(output)
        grid = _Grid(config, output, len(training.samples), {} if stored is None else stored[1])
        grid.save()
        grid.run(quiet)
        comparison = Comparison.of(config, grid.results)
        write_report(comparison, output)
    return comparison


def read_comparison(output: Path) -> tuple[ComparisonConfig, dict[Cell, dict[str, Any]]]:
    """Settings and finished cells of a comparison. Raises RunError if the folder has none."""
    path = output / RESULTS
    if not path.is_file():
        raise RunError(f"{output} is no comparison: it has no {RESULTS}; leave --resume out to start one")
    try:
        config, cells = parse(read_json(path, "results"))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not that of a comparison ({error}); choose another folder") from error
    config.run = replace(config.run, output=str(output))
    return config, cells


def parse(stored: dict[str, Any]) -> tuple[ComparisonConfig, dict[Cell, dict[str, Any]]]:
    """Settings and finished cells of what results.json holds. Raises KeyError, TypeError or RunError for another."""
    cells = (dict(cell) for cell in stored["cells"])
    return ComparisonConfig.from_dict(stored["config"]), {
        Cell(*(cell.pop(name) for name in Cell._fields)): cell for cell in cells
    }


def _check_same(config: ComparisonConfig, stored: ComparisonConfig, output: Path) -> None:
    """Raises RunError if the cells would not be those of the same comparison."""
    own, other = ({**c.run.to_dict(), "images": c.images} for c in (config, stored))
    if changed := sorted(name for name in own if name not in PLACE and own[name] != other[name]):
        name = changed[0]
        raise RunError(
            f"the comparison in {output} has {name} {other[name]}, not {own[name]}; leave it out, or start another one"
        )


def _check_new(output: Path, overwrite: bool) -> None:
    check_output(output, overwrite)
    if overwrite and (output / _CELLS).exists():
        read_comparison(output)  # so that nobody else's folder of that name is deleted


def _clear(output: Path) -> None:
    if (output / _CELLS).is_dir():
        remove_directory(output / _CELLS)


class _Grid:
    """The cells and what is known of them."""

    def __init__(
        self, config: ComparisonConfig, output: Path, available: int, results: dict[Cell, dict[str, Any]]
    ) -> None:
        self.config, self.output, self.available, self.results = config, output, available, results
        self.images = config.images or available * config.run.epochs  # that each run sees

    def save(self) -> None:
        """Writes results.json."""
        cells = [{**cell._asdict(), **self.results[cell]} for cell in sorted(self.results)]
        versions = {"cbn_convert": __version__, "torch": torch.__version__, "timm": timm.__version__}
        write_json(
            self.output / RESULTS,
            {"config": self.config.to_dict(), "images": self.images, "versions": versions, "cells": cells},
        )

    def _folder(self, cell: Cell) -> Path:
        return self.output / _CELLS / cell.name

    def _todo(self) -> list[Cell]:
        return [cell for cell in needed(self.config, self.results) if cell not in self.results]

    def run(self, quiet: bool) -> None:
        """Runs all cells that are needed. Raises ComparisonInterrupted after a signal."""
        with (
            StopSignals() as signals,
            Display(quiet, self.config.jobs) as display,
            Workers(self.config.jobs, self.output / "log.txt") as workers,
        ):
            while todo := self._todo():
                for cell in todo:
                    if workers.free and cell not in workers.running:
                        workers.start(cell, self._settings(cell).to_dict())
                        display.begin(cell)
                display.update(len(self.results), {cell: 1 - self._done(cell) for cell in todo}, self.images)
                finished = workers.finished(timeout=1.0)
                if finished is not None:
                    self._keep(*finished, display)
                if signals.received:
                    workers.stop()
                    raise ComparisonInterrupted(signals.received, self.output)

    def _settings(self, cell: Cell) -> FinetuneConfig:
        settings = replace(self.config.cell(*cell), output=str(self._folder(cell)))
        if self.config.images:
            per_update = cell.batch_size * settings.accumulate
            settings.max_steps = max(1, self.images // per_update)
            settings.epochs = 1 + -(-self.images // (self.available // per_update * per_update or self.available))
        return settings

    def _keep(self, cell: Cell, result: dict[str, Any], display: Display) -> None:
        what = result.get("error") or f"top-1 {result['top1']:.2f} %"
        text = f"{cell.norm}, batch {cell.batch_size}, lr {cell.lr:g}, seed {cell.seed}: {what}"
        result["seconds"] = round(display.end(cell, self.images, text), 2)
        self.results[cell] = result
        self.save()
        for name in ("checkpoints", "best"):
            if (self._folder(cell) / name).is_dir():
                remove_directory(self._folder(cell) / name)

    def _done(self, cell: Cell) -> float:
        """The part of a run that its log knows of."""
        records = read_metrics(self._folder(cell))
        images = self.config.run.accumulate * cell.batch_size
        return min(1.0, records[-1]["step"] * images / self.images) if records else 0.0
