"""cbn compare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbn_convert.comparison.config import GRID, ComparisonConfig

from . import options as o
from .session import Session
from .settings import PLACE, Config, Data, given, read_values, require, resumed_refuses, with_settings

if TYPE_CHECKING:
    from rich.table import Table

    from cbn_convert.comparison.summary import Comparison

GRID_PANEL = "What is compared"
_DEFAULTS: dict[str, Any] = {name: field.default for name, field in ComparisonConfig.__dataclass_fields__.items()}
_AXES = ("norms", "batch_sizes", "lrs", "seeds", "reference", "jobs")  # what a resumed comparison may have otherwise


def _joined(name: str) -> str:
    return ",".join(map(str, _DEFAULTS[name]))


@with_settings(*GRID, first=(*_AXES, "images"))
def compare(
    ctx: typer.Context,
    data: Data,
    norms: Annotated[
        str,
        typer.Option(
            help="bn, frozen, tune, gn, brn, cbn; variants such as cbn:taylor, cbn:window=4, frozen:head_lr_scale=10.",
            rich_help_panel=GRID_PANEL,
        ),
    ] = _joined("norms"),
    batch_sizes: Annotated[
        str, typer.Option(help="Images per step and process.", rich_help_panel=GRID_PANEL)
    ] = _joined("batch_sizes"),
    lrs: Annotated[
        str,
        typer.Option(
            help="Peak learning rates to try; auto: those around finetune's, until the best is enclosed.",
            rich_help_panel=GRID_PANEL,
            metavar="RATE,..|auto",
        ),
    ] = "auto",
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Training images that each run sees; default: --epochs.", rich_help_panel=GRID_PANEL),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at the best rate.", rich_help_panel=GRID_PANEL)] = _DEFAULTS[
        "seeds"
    ],
    reference: Annotated[
        int, typer.Option(min=0, help="BN at this batch size, to measure against; 0: none.", rich_help_panel=GRID_PANEL)
    ] = _DEFAULTS["reference"],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.", rich_help_panel=GRID_PANEL)] = _DEFAULTS["jobs"],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=o.OUTPUT)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.MODEL_HELP, rich_help_panel=o.WEIGHTS)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Comparison to continue; it may get more norms, sizes, rates, seeds.", rich_help_panel=o.OUTPUT
        ),
    ] = None,
    config: Config = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
    **settings: Any,
) -> None:
    """Fine-tunes with several norms and batch sizes, each at its own best learning rate, and reports who is best.

    Every run sees the same number of images. Rates are chosen by validation top-1; the accuracies reported are those of
    DATA/test where there is one. All other settings are those of cbn finetune.
    """
    require(model, output, resume)
    if images is not None and given(ctx, ["epochs"]):
        raise typer.BadParameter("images and epochs say the same; give one of them", param_hint="--images")
    values = read_values(settings)
    grid: dict[str, Any] = {
        "norms": _list(norms, str, "--norms"), "batch_sizes": _list(batch_sizes, int, "--batch-sizes"),
        "lrs": None if lrs == "auto" else _list(lrs, float, "--lrs"), "images": images, "seeds": seeds,
        "reference": reference, "jobs": jobs,
    }  # fmt: skip
    with Session(as_json, debug, quiet) as session:
        from cbn_convert import FinetuneConfig
        from cbn_convert.comparison.plan import needed
        from cbn_convert.comparison.running import check
        from cbn_convert.comparison.running import compare as run_comparison
        from cbn_convert.comparison.store import read_comparison

        done: Any = {}
        if resume is not None:
            resumed_refuses(ctx, ("config", *values, "images", "model", "output"), PLACE)
            wanted, _, done = read_comparison(resume)
            wanted.run.data = str(data)
            for name in given(ctx, PLACE):
                setattr(wanted.run, name, values[name])
            for name in given(ctx, _AXES):
                setattr(wanted, name, grid[name])
        else:
            run = FinetuneConfig(data=str(data), model=str(model), output=str(output), **values)
            wanted = ComparisonConfig(run, **grid)
        if dry_run:
            from cbn_convert.comparison.estimate import estimated

            available = check(wanted, resume=resume is not None, overwrite=overwrite)
            cells = [cell for cell in needed(wanted, done) if cell not in done]
            session.print(estimated(wanted, done, available.of_a_run(wanted)) or "no run is left to do")
            session.print(f"{len(done)} runs are done; nothing written (--dry-run)")
            for cell in cells:
                session.print(f"  {cell.norm}, batch {cell.batch_size}, lr {cell.lr:g}, seed {cell.seed}")
            session.result({"cells": [cell._asdict() for cell in cells]})
            return
        result = run_comparison(wanted, resume=resume is not None, overwrite=overwrite, quiet=quiet)
        session.print(_table(result))
        session.print("\n".join(result.sentences()))
        session.print(f"top-1 of the {result.split} images; report: {Path(wanted.run.output) / 'report.html'}")
        session.print(_next_step(wanted, result))
        session.result(result.to_dict())


def _next_step(config: ComparisonConfig, result: Comparison) -> str:
    """The command that trains with the settings of the best runs, to be copied."""
    from cbn_convert.comparison.plan import Cell, score

    tops: dict[tuple[str, int, float], list[float]] = {}
    for cell, run in result.results.items():
        if (cell.norm, cell.batch_size, cell.lr) in {(row.norm, row.batch_size, row.lr) for row in result.compared}:
            tops.setdefault(cell[:3], []).append(score(run))
    if not tops:
        return "no run ended; the log in the folder says why"
    norm, batch_size, lr = max(tops, key=lambda key: sum(tops[key]) / len(tops[key]))
    cell = Cell(norm, batch_size, lr, config.run.seed)
    settings = Path(config.run.output) / "cells" / cell.name / "config.json"
    words = ["cbn", "finetune", config.run.data, "--config", str(settings), "-o", f"{config.run.output}-best"]
    return f"next, with the settings that validation found best, and as long:\n  {shlex.join(words)}"


def _list(text: str, kind: Any, flag: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{text!r} is no list of {what}, separated by commas", param_hint=flag) from None


def _table(result: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    headers, rows = result.table()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
