"""The folder of a comparison: its settings and results, what may be overwritten, what is left over."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__
from ..errors import RunError
from ..files import check_output, read_json, remove_directory, write_json
from .config import GRID, PLACE, ComparisonConfig
from .plan import Cell

RESULTS, CELLS, LOG = "results.json", "cells", "log.txt"
PLOT = re.compile(r"(accuracy|(rates|loss)_batch\d+)\.(png|svg)")
_OWN = {RESULTS, CELLS, LOG, "table.md", "table.csv", "report.html"}
_NUMBERS = ("top1", "last_top1", "step_seconds")  # that every run which ended has

Cells = dict[Cell, dict[str, Any]]


def write(output: Path, config: ComparisonConfig, images: dict[str, Any], results: Cells) -> None:
    """Writes results.json.

    Args:
        output: folder of the comparison.
        config: its settings.
        images: `Images.counts` of running.py.
        results: what is known of each finished cell.
    """
    cells = [{**cell._asdict(), **results[cell]} for cell in sorted(results)]
    versions = {"cbn_convert": __version__, "torch": torch.__version__, "timm": timm.__version__}
    write_json(output / RESULTS, {"config": config.to_dict(), "images": images, "versions": versions, "cells": cells})


def read_comparison(output: Path) -> tuple[ComparisonConfig, dict[str, Any], Cells]:
    """Settings, images and finished cells of a comparison. Raises RunError if the folder has none, or it is damaged."""
    path = output / RESULTS
    if not path.is_file():
        raise RunError(f"{output} is no comparison: it has no {RESULTS}; leave --resume out to start one")
    stored = read_json(path, "results")
    try:
        config, cells = parse(stored)
        images = dict(stored["images"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{path} is not that of a comparison ({reason}); choose another folder") from error
    config.run = replace(config.run, output=str(output))
    return config, images, cells


def parse(stored: Any) -> tuple[ComparisonConfig, Cells]:
    """Settings and finished cells of what results.json holds. Raises KeyError, TypeError or ValueError for another."""
    config = ComparisonConfig.from_dict(stored["config"])
    config.check()
    cells: Cells = {}
    for entry in stored["cells"]:
        result = dict(entry)
        norm, batch_size, lr, seed = (result.pop(name) for name in Cell._fields)
        if not (isinstance(norm, str) and isinstance(batch_size, int) and isinstance(seed, int)):
            raise TypeError("a cell without norm, batch size and seed")
        if "error" not in result and not all(math.isfinite(result[name]) for name in _NUMBERS):
            raise ValueError("a run without numbers")
        cells[Cell(norm, batch_size, float(lr), seed)] = result
    return config, cells


def check_same(config: ComparisonConfig, stored: ComparisonConfig, output: Path) -> None:
    """Raises RunError if the runs would not be those of the same comparison."""
    own, other = ({**c.run.to_dict(), "images": c.images} for c in (config, stored))
    if changed := sorted(name for name in own if name not in (*PLACE, *GRID) and own[name] != other[name]):
        name = changed[0]
        raise RunError(
            f"the comparison in {output} has {name} {other[name]}, not {own[name]}; leave it out, or start another one"
        )


def check_same_images(images: dict[str, Any], stored: dict[str, Any], data: str, output: Path) -> None:
    """Raises RunError if the data are not those that the finished cells have seen.

    Args:
        images: `Images.counts` of the data as they are.
        stored: those in results.json.
        data, output: the data and the folder of the comparison, for the message.
    """
    if images != stored:
        raise RunError(f"{data} has other images than the comparison in {output}; resume with the data it began with")


def check_new(output: Path, overwrite: bool) -> None:
    """Raises RunError if a new comparison must not be written there."""
    check_output(output, overwrite)
    if not output.is_dir() or not any(output.iterdir()):
        return
    foreign = sorted(
        entry.name
        for entry in output.iterdir()
        if entry.name not in _OWN and not entry.name.startswith(".") and not PLOT.fullmatch(entry.name)
    )
    if foreign:
        raise RunError(f"{output} holds {foreign[0]}, which is not of a comparison; choose another output folder")
    if any((output / name).exists() for name in (RESULTS, CELLS)):
        read_comparison(output)  # nobody else's files of these names are deleted


def clear(output: Path) -> None:
    """Deletes what an overwritten comparison has left. Raises RunError if that fails."""
    delete(output / CELLS)
    try:
        for path in output.iterdir():
            if path.name in _OWN or PLOT.fullmatch(path.name):
                path.unlink()
    except OSError as error:
        raise RunError(f"cannot delete what is in {output}: {error.strerror}; choose another folder") from error


def discard_if_nothing_ran(output: Path, results: Cells) -> None:
    """Deletes a comparison that no run has begun in, and about which the log has nothing to say."""
    log = output / LOG
    said = log.is_file() and log.stat().st_size > 0
    if not (results or said or any(output.glob(f"{CELLS}/*/checkpoints/step-*"))):
        clear(output)
        with suppress(OSError):  # something else may be in the folder
            (output / ".lock").unlink()
            output.rmdir()


def delete_weights(output: Path, cell: Cell) -> None:
    """Deletes what takes space of a finished cell. Raises RunError if that fails."""
    for name in ("checkpoints", "best"):
        delete(output / CELLS / cell.name / name)


def delete(folder: Path) -> None:
    """Deletes a folder if it is there. Raises RunError if that fails."""
    if folder.is_dir():
        try:
            remove_directory(folder)
        except OSError as error:
            raise RunError(f"cannot delete {folder}: {error.strerror}; delete it, and go on with --resume") from error
