"""cbn finetune, cbn evaluate, cbn export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .session import Session

Data = Annotated[
    Path, typer.Argument(help="Folder with train/CLASS/* and val/CLASS/*, or see --val-fraction.", show_default=False)
]


def finetune(
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder to write.", rich_help_panel=o.OUTPUT)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=o.MODEL_HELP, rich_help_panel=o.WEIGHTS)] = None,
    norm: Annotated[
        str,
        typer.Option(
            help="cbn; or, to compare: bn, frozen (fixed statistics), gn (GroupNorm), brn (Batch Renormalization).",
            rich_help_panel=o.METHOD,
        ),
    ] = "cbn",
    window: o.Window = 16,
    compensation: o.Compensation = "projection",
    gradient: o.Gradient = "full",
    history: o.History = "ema",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.", rich_help_panel=o.TRAINING)] = 10,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="End after so many steps.", rich_help_panel=o.TRAINING)
    ] = None,
    batch_size: o.BatchSize = 2,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; 3e-3 for sgd, 3e-4 for adamw.", rich_help_panel=o.TRAINING),
    ] = None,
    clip_grad: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradient; 0 for no limit.", rich_help_panel=o.TRAINING)
    ] = 5.0,
    opt: Annotated[str, typer.Option(help="sgd (momentum 0.9) or adamw.", rich_help_panel=o.TRAINING)] = "sgd",
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=o.TRAINING)] = 1e-4,
    label_smoothing: Annotated[float, typer.Option(min=0, rich_help_panel=o.TRAINING)] = 0.1,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Hold out this part of each class; for a folder without val/.", rich_help_panel=o.TRAINING),
    ] = None,
    no_aug: Annotated[
        bool, typer.Option("--no-aug", help="Resize and crop only, no random changes.", rich_help_panel=o.TRAINING)
    ] = False,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=o.TRAINING)] = 0,
    workers: o.Workers = 2,
    device: o.Device = "auto",
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to continue, with its own settings.", rich_help_panel=o.TRAINING),
    ] = None,
    arch: o.Arch = None,
    checkpoint: o.Checkpoint = None,
    pretrained: o.Pretrained = True,
    model_kwargs: o.ModelKwargs = None,
    mean: o.Mean = None,
    std: o.Std = None,
    img_size: o.ImgSize = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tunes a model on a folder of images, with CBN in place of BatchNorm."""
    if resume is None and (model is None or output is None):
        missing = "'--model' / '-m'" if model is None else "'--output' / '-o'"
        raise typer.BadParameter("required, unless --resume names a run", param_hint=missing)
    if resume is not None and output is not None and output.resolve() != resume.resolve():
        raise typer.BadParameter(
            f"a resumed run goes on in {resume}; leave the output out", param_hint="'--output' / '-o'"
        )
    spec = o.parse_model(model or "", arch, checkpoint, pretrained, model_kwargs, mean, std, img_size)
    with Session(as_json, debug, quiet) as session:
        from cbn_convert import FinetuneConfig
        from cbn_convert import finetune as run_finetune

        if resume is not None:
            config = FinetuneConfig.of_run(resume)
            config.data, config.output = str(data), str(resume)
        else:
            config = FinetuneConfig(
                data=str(data), output=str(output), norm=norm, window=window, compensation=compensation,
                gradient=gradient, history=history, epochs=epochs, max_steps=max_steps, batch_size=batch_size, lr=lr,
                clip_grad=clip_grad,
                opt=opt, weight_decay=weight_decay, label_smoothing=label_smoothing, val_fraction=val_fraction,
                no_aug=no_aug, seed=seed, workers=workers, device=device, **spec,
            )  # fmt: skip
        if dry_run:
            from cbn_convert.training.engine import plan

            planned = plan(config)
            for key, value in planned.items():
                session.print(f"{key}: {value}")
            session.print("nothing written (--dry-run)")
            session.result(planned)
            return
        result = run_finetune(config, resume=resume is not None, overwrite=overwrite, quiet=quiet)
        session.print(
            f"best validation top-1 {result.best_top1:.2f} % in epoch {result.best_epoch}, "
            f"{1000 * result.median_step_seconds:.0f} ms per step; run folder {result.output}"
        )
        session.result(result.to_dict())


def evaluate(
    trained: Annotated[Path, typer.Argument(help="Run folder or exported folder.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Folder of images, CLASS/* or with splits.", show_default=False)],
    split: Annotated[
        str | None, typer.Option(help="Subfolder of DATA, such as test. Default: val if there is one.")
    ] = None,
    batch_size: o.BatchSize = 32,
    workers: o.Workers = 2,
    device: o.Device = "auto",
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """Accuracy of a run's best model, or of an exported folder, on images."""
    with Session(as_json, debug, quiet) as session:
        from cbn_convert import evaluate as run_evaluate

        result = run_evaluate(trained, str(data), split=split, batch_size=batch_size, workers=workers, device=device)
        session.print(
            f"{result.images} images: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f}"
        )
        session.result(result.to_dict())


def export(
    run: Annotated[Path, typer.Argument(help="Run folder or exported folder.", show_default=False)],
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
        from cbn_convert.training.deploy import export_run

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
