"""cbn bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .session import Session

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_NORMS = "bn,frozen,tune,gn,cbn,cbn-paper"
LABELS = {
    "bn": "BN",
    "frozen": "frozen BN",
    "tune": "frozen BN, folded",
    "cbn": "CBN (default)",
    "cbn-unfolded": "CBN, not folded",
    "cbn-paper": "CBN as published",
    "gn": "GroupNorm",
}


def bench(
    arch: Annotated[str, typer.Option(help="timm name; random weights.", rich_help_panel=o.WEIGHTS)] = "resnet50",
    norms: Annotated[
        str, typer.Option(help=f"Any of {', '.join(LABELS)}; BN is always there.", rich_help_panel=o.METHOD)
    ] = DEFAULT_NORMS,
    batch_size: o.BatchSize = 2,
    img_size: Annotated[
        int, typer.Option(min=1, help="Height and width of the input.", rich_help_panel=o.WEIGHTS)
    ] = 224,
    steps: Annotated[int, typer.Option(min=1, help="Rounds that count.", rich_help_panel=o.TRAINING)] = 10,
    device: o.Device = "auto",
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.", rich_help_panel=o.TRAINING)] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Memory format of images and weights.", rich_help_panel=o.TRAINING)
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile.", rich_help_panel=o.TRAINING)] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Time and memory of a training step with each norm, beside BN and the method as published.

    All take turns in one process, a step each, so that a busy machine disturbs all alike; medians, and median and
    quartiles of the ratios to BN's step of the same round; --json has forward, backward and optimizer apart. Kept is
    what the graph holds for the backward pass; over BN's, what the window remembers between steps is counted with it.
    """
    with Session(as_json, debug, quiet) as session:
        import torch
        from rich import progress

        from cbn_convert.bench import StepSettings, bench_step
        from cbn_convert.training.evaluation import resolve_device
        from cbn_convert.training.progress import Bar

        place = str(resolve_device(device))
        dtype = torch.bfloat16 if amp else torch.float32
        settings = StepSettings(batch_size, img_size, place, dtype, channels_last, compile)
        columns = [n.strip() for n in norms.split(",") if n.strip()]
        shown = (progress.TextColumn("rounds"), progress.BarColumn(bar_width=None), progress.MofNCompleteColumn())
        with Bar(quiet, *shown, progress.TimeRemainingColumn()) as bar:
            task = bar.bar.add_task("", total=None)

            def after(done: int, rounds: int) -> None:
                bar.bar.update(task, completed=done, total=rounds)

            results = bench_step(arch, columns, settings, steps=steps, after_round=after)
        rows = [r._asdict() for r in results]
        session.print(_table(rows))
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        session.print(f"{arch}, batch {batch_size}, {img_size} px, {place}, {threads}")
        session.result({"arch": arch, "batch_size": batch_size, "img_size": img_size, "device": place, "norms": rows})


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("norm")
    for header in ("step [ms]", "over BN (quartiles)", "memory [MB]", "kept [MB]", "over BN"):
        table.add_column(header, justify="right")
    for row in rows:
        kept = (f"{row['kept']:.1f}", f"{row['kept_over_bn']:.2f}")
        low, high = row["over_bn_quartiles"]
        ratio = f"{row['over_bn']:.2f} ({low:.2f}-{high:.2f})"
        table.add_row(LABELS[row["column"]], f"{row['step']:.1f}", ratio, f"{row['memory']:.0f}", *kept)
    return table
