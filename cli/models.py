"""cbn inspect, cbn convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .session import Session

if TYPE_CHECKING:
    from rich.table import Table

    from cbn_convert import ConversionReport, ReportRow


def inspect(
    model: o.Model,
    arch: o.Arch = None,
    checkpoint: o.Checkpoint = None,
    model_kwargs: o.ModelKwargs = None,
    in_chans: o.InChans = None,
    img_size: o.ImgSize = None,
    window: o.Window = None,
    compensation: o.Compensation = "projection",
    history: o.History = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every layer: what feeds it, and why it is converted so.")
    ] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Shows what convert will do with the norm layers of a model, stage by stage, and what they will remember.

    A timm name is looked at without weights, so nothing is downloaded.
    """
    spec = o.parse_model(model, arch, checkpoint, False, model_kwargs, in_chans, img_size=img_size)
    with Session(as_json, debug, quiet) as session:
        import timm
        import torch

        import cbn_convert as cbn
        from cbn_convert.models import ModelSpec, create_model

        named = checkpoint is None and timm.is_model(model)
        with torch.device("meta" if named else "cpu"):  # the structure of the largest model takes no memory
            inspected = create_model(ModelSpec(**spec))
        report = cbn.convert(inspected, window=window, compensation=compensation, history=history)  # type: ignore[arg-type]
        session.print(_table(report) if every else _picture(report))
        session.print("\n".join([report.summary(), *report.exceptions()]))
        session.result({"model": model, "window": window, "history": history, **report.to_dict()})


def convert(
    model: o.Model,
    output: o.Output,
    arch: o.Arch = None,
    checkpoint: o.Checkpoint = None,
    pretrained: o.Pretrained = True,
    model_kwargs: o.ModelKwargs = None,
    in_chans: o.InChans = None,
    mean: o.Mean = None,
    std: o.Std = None,
    img_size: o.ImgSize = None,
    window: o.Window = None,
    compensation: o.Compensation = "projection",
    gradient: o.Gradient = "full",
    history: o.History = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Converts a model and writes a folder to train from, with a report of every norm layer.

    CBN is at work in training only: weights and outputs stay as they were, and plain timm loads the folder. It is good
    for seeing what becomes of each norm layer (README.md; all of it in conversion.json), for taking weights and
    settings to where the images are, and for training from it, by `cbn finetune DATA --model local-dir:DIR` with the
    same window options. README.md has that command as it is typed, and the lines for a training loop of your own.
    """
    spec = o.parse_model(
        model, arch, checkpoint, pretrained, model_kwargs, in_chans, mean=mean, std=std, img_size=img_size
    )
    window_options: dict[str, Any] = {
        **({} if window is None else {"window": window}), "compensation": compensation, "gradient": gradient,
        **({} if history is None else {"history": history}),
    }  # fmt: skip
    with Session(as_json, debug, quiet) as session:
        import cbn_convert as cbn
        from cbn_convert.deploy import Conversion
        from cbn_convert.files import check_output
        from cbn_convert.models import ModelSpec, create_model, model_args

        check_output(output, overwrite)
        converted = create_model(ModelSpec(**spec))
        report = cbn.convert(converted, **window_options)
        conversion = Conversion(model, window_options, report)
        if dry_run:
            session.print(_table(report))
            session.print(f"{report.summary()}; nothing written (--dry-run)")
        else:
            cbn.export(
                converted, output, model_args=model_args(converted), conversion=conversion,
                metadata={**window_options, "norm_layers": report.counts}, overwrite=overwrite,
            )  # fmt: skip
            session.print(f"{report.summary()}; written to {output}")
            session.print(f"next:\n  {conversion.command(str(output))}")
        session.result({**conversion.to_dict(), "output": None if dry_run else str(output)})


MARKS_WIDTH = 30  # in a terminal of 80 columns
# what a layer is shown as
MARKS = {
    "#": "trains folded into the conv in front of it", "+": "follows the conv in front of it, and trains unfolded",
    "o": "follows the images only", ".": "stays as it is",
}  # fmt: skip


def _mark(row: ReportRow) -> str:
    if row.status == "compensated":
        return "#" if row.form == "folded" else "+"
    return "o" if row.status == "window" else "."


def _picture(report: ConversionReport) -> Table:
    """A row for each stage, in which every layer is one mark."""
    from rich import box
    from rich.table import Table

    shown = dict.fromkeys(_mark(row) for row in report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = "; ".join(f"{mark} {MARKS[mark]}" for mark in MARKS if mark in shown)
    for header, justify in (("stage", "left"), ("norms", "right"), ("each layer", "left"), ("history [MB]", "right")):
        table.add_column(header, justify=justify, overflow="fold", max_width=MARKS_WIDTH)  # type: ignore[arg-type]
    for stage, rows in report.stages().items():
        history = sum(row.history_bytes for row in rows) / 1e6
        table.add_row(stage, str(len(rows)), "".join(map(_mark, rows)), f"{history:.2f}")
    return table


def _table(report: ConversionReport) -> Table:
    """A row for each layer; why it is so is said once below, by its number, and so is a class that all have."""
    from rich import box
    from rich.table import Table

    kinds = list(dict.fromkeys(row.norm for row in report))
    reasons = {reason: str(number) for number, reason in enumerate(dict.fromkeys(row.reason for row in report), 1)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = "\n".join(f"{number}: {reason}" for reason, number in reasons.items())
    if len(kinds) == 1:
        table.caption = f"all are {kinds[0]}\n{table.caption}"
    norm = ("norm",) if len(kinds) > 1 else ()
    for header in ("layer", *norm, "channels", "fed by", "becomes", "[MB]", "why"):
        numeric = header in ("channels", "[MB]", "why")
        table.add_column(header, overflow="fold", justify="right" if numeric else "left", no_wrap=numeric)
    for row in report:
        table.add_row(
            row.name, *([row.norm] if norm else []), str(row.channels), row.fed_by or "-",
            row.form if row.status == "compensated" else row.status, f"{row.history_bytes / 1e6:.2f}",
            reasons[row.reason],
        )  # fmt: skip
    return table
