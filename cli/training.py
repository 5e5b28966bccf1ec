"""cbn finetune, cbn evaluate, cbn export."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .session import Session
from .settings import PLACE, Config, Data, given, read_values, require, resumed_refuses, with_settings

if TYPE_CHECKING:
    from rich.table import Table

    from cbn_convert import FinetuneConfig, FinetuneResult
    from cbn_convert.training.evaluation import Evaluation


@with_settings()
def finetune(
    ctx: typer.Context,
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder to write.", rich_help_panel=o.OUTPUT)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.MODEL_HELP, rich_help_panel=o.WEIGHTS)] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to continue, with its own settings.", rich_help_panel=o.OUTPUT)
    ] = None,
    config: Config = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
    **settings: Any,
) -> None:
    """Fine-tunes a model on a folder of images, with CBN in place of BatchNorm.

    Settings come from the flags, then from --config, then from the defaults shown here. A run that was interrupted goes
    on with --resume. Several GPUs: torchrun --nproc-per-node N -m cbn_convert.cli finetune ...
    """
    require(model, output, resume)
    if resume is not None and output is not None and output.resolve() != resume.resolve():
        raise typer.BadParameter(
            f"a resumed run goes on in {resume}; leave the output out", param_hint="'--output' / '-o'"
        )
    values = read_values(settings)
    with Session(as_json, debug, quiet) as session:
        from cbn_convert import FinetuneConfig
        from cbn_convert import finetune as run_finetune
        from cbn_convert import resume as resume_run

        if resume is not None:
            resumed_refuses(ctx, ("config", *values, "model"), PLACE)
            moved = {name: values[name] for name in given(ctx, PLACE)}
            wanted = replace(FinetuneConfig.of_run(resume), data=str(data), output=str(resume), **moved)
        else:
            wanted = FinetuneConfig(data=str(data), output=str(output), model=str(model), **values)
        if dry_run:
            from cbn_convert.training.planning import plan

            planned = plan(wanted)
            for key, value in planned.items():
                if value not in (None, ""):
                    shown = f"{value:.3g}" if isinstance(value, float) else value
                    session.print(f"{key.replace('_', ' ')}: {shown}")
            session.print("nothing written (--dry-run)")
            session.result(planned)
            return
        if resume is not None:
            result = resume_run(resume, data=str(data), quiet=quiet, **moved)
        else:
            result = run_finetune(wanted, overwrite=overwrite, quiet=quiet)
        session.print(_summary(result))
        session.print(_next_steps(wanted, result))
        session.result(result.to_dict())


def _summary(result: FinetuneResult) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    rows = {
        "best validation top-1": f"{result.best_top1:.2f} %, top-5 {result.best_top5:.2f} %",
        "reached in": f"epoch {result.best_epoch}, step {result.best_step} of {result.steps}"
        + (", stopped early" if result.stopped_early else ""),
    }
    if result.median_step_seconds:  # else this process has only looked at a run that was done
        rows["training"] = (
            f"{result.train_seconds:.0f} s, {result.images_per_second:.1f} images/s, "
            f"{1000 * result.median_step_seconds:.0f} ms per step"
        )
        rows["waiting for images"] = f"{100 * result.loader_wait:.0f} % of the time" + (
            "; more --workers may help" if result.loader_wait > 0.2 else ""
        )
    if result.peak_memory is not None:
        rows["GPU memory"] = f"{result.peak_memory:.0f} MB"
    if result.skipped:
        rows["updates left out"] = f"{result.skipped}, whose gradient was not finite"
    if result.bad_images:
        rows["unreadable images"] = f"{len(result.bad_images)}: {', '.join(result.bad_images[:5])}" + (
            ", .. (all with --json)" if len(result.bad_images) > 5 else ""
        )
    rows["run folder"] = result.output
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _next_steps(config: FinetuneConfig, result: FinetuneResult) -> str:
    """Commands for what comes after a run, to be copied."""
    run, data, folder = (shlex.quote(str(path)) for path in (result.output, config.data, f"{result.output}-deploy"))
    commands = [f"cbn evaluate {run} {data}"]
    if config.norm != "gn":  # whose layers timm has no place for
        commands.append(f"cbn export {run} -o {folder} --fold conv")
    return "next:\n" + "\n".join(f"  {command}" for command in commands)


def evaluate(
    trained: Annotated[Path, typer.Argument(help="Run folder or exported folder.", metavar="RUN", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of images, CLASS/* or with splits; or hfds/NAME, wds/FOLDER.",
            metavar="DATA",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Subfolder of DATA. Default: the first of val, valid, validation, test.")
    ] = None,
    batch_size: o.BatchSize = 32,
    workers: o.Workers = 2,
    device: o.Device = "auto",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also the accuracy of each class, and what it is taken for.")
    ] = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out unreadable images, and list them.")
    ] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Accuracy of a run's best model, or of an exported folder, on images."""
    with Session(as_json, debug, quiet) as session:
        from cbn_convert.training.trained import evaluate as run_evaluate
        from cbn_convert.training.trained import load_trained

        result = run_evaluate(
            trained, str(data), split=split, batch_size=batch_size, workers=workers, device=device,
            skip_bad_images=skip_bad_images,
        )  # fmt: skip
        session.print(
            f"{result.images} images: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f}"
        )
        for path in result.bad_images:
            session.print(f"not counted, unreadable: {path}")
        classes = load_trained(trained)[1]
        if per_class:
            session.print(_class_table(result, classes))
        confusion = {"confusion": result.confusion} if per_class else {}
        session.result({**result.to_dict(), "classes": classes, **confusion})


def _class_table(result: Evaluation, classes: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header, justify in (("class", "left"), ("images", "right"), ("top-1 [%]", "right"), ("most taken for", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for number, (name, row, top1) in enumerate(zip(classes, result.confusion, result.per_class, strict=True)):
        others = sorted(((n, other) for other, n in enumerate(row) if n and other != number), reverse=True)
        taken = ", ".join(f"{classes[other]} ×{n}" for n, other in others[:3])
        table.add_row(name, str(sum(row)), "-" if top1 is None else f"{top1:.1f}", taken)
    return table


def export(
    run: Annotated[Path, typer.Argument(help="Run folder or exported folder.", metavar="RUN", show_default=False)],
    output: o.Output,
    fold: Annotated[
        str, typer.Option(help="bn: as trained. affine: scale and shift. conv: into the conv weights.")
    ] = "bn",
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also model.onnx, folded into the convs, any batch size.")
    ] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Also model.pt2 for torch.export.load, likewise.")
    ] = False,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Writes a run's best model as a folder that plain timm loads, and checks that timm gives the same outputs."""
    with Session(as_json, debug, quiet) as session:
        from cbn_convert.training.run_export import export_run

        result: dict[str, Any] = export_run(
            run, output, fold, onnx=onnx, torch_export=torch_export, overwrite=overwrite, dry_run=dry_run
        )
        if dry_run:
            session.print(f"would write {', '.join(result['files'])} to {output}; nothing written (--dry-run)")
        else:
            session.print(
                f'written to {output}; timm.create_model("local-dir:{output}", pretrained=True) agrees to '
                f"{result['relative_difference']:.1e} relative"
            )
        session.result(result)
