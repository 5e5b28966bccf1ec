"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

METHOD, TRAINING, WEIGHTS, OUTPUT = "Method", "Training", "Model and weights", "Output"


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Reads "k=v,k=v"; values are Python literals, everything else is a string. Raises typer.BadParameter."""
    if text and text.startswith("{"):  # a mapping, as --config hands it on
        try:
            mapping = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            mapping = None
        if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
            raise typer.BadParameter(f"{text!r} is not a mapping of names to plain values", param_hint="--model-kwargs")
        return mapping
    result: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise typer.BadParameter(f"{part!r} is not of the form name=value", param_hint="--model-kwargs")
        try:
            result[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            result[key.strip()] = value.strip()
    return result


def parse_channels(text: str | None, name: str) -> tuple[float, ...] | None:
    """Reads "0.5" or "0.5,0.5,0.5" as one number for all channels, or one for each. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (name == "--std" and min(values) <= 0):
        raise typer.BadParameter(
            f"{text!r} is not one number, or one for each channel, such as 0.485,0.456,0.406", param_hint=name
        )
    return values


def parse_model(
    model: str,
    arch: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    model_kwargs: str | None,
    in_chans: int | None,
    **images: Any,
) -> dict[str, Any]:
    """The arguments of cbn_convert.models.ModelSpec; `images`: mean, std, img_size as they were given."""
    kwargs = parse_kwargs(model_kwargs)
    if in_chans is not None:
        if "in_chans" in kwargs:
            raise typer.BadParameter("in_chans is in --model-kwargs, too; leave it out there", param_hint="--in-chans")
        kwargs["in_chans"] = in_chans
    return {
        "model": model,
        "arch": arch,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "pretrained": pretrained,
        "model_kwargs": kwargs,
        "mean": parse_channels(images.get("mean"), "--mean"),
        "std": parse_channels(images.get("std"), "--std"),
        "img_size": images.get("img_size"),
    }


MODEL_HELP = "timm name, hf-hub:OWNER/NAME, local-dir:DIR, or a .safetensors file"

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Arch = Annotated[str | None, typer.Option(help="timm name, for a .safetensors file.", rich_help_panel=WEIGHTS)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights: .safetensors or of torch.save, also of other tools.", rich_help_panel=WEIGHTS),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained/--no-pretrained", help="Pretrained or random weights.", rich_help_panel=WEIGHTS)
]
ModelKwargs = Annotated[
    str | None, typer.Option(help="For timm.create_model: k=v,k=v, e.g. pad_type=same.", rich_help_panel=WEIGHTS)
]
Mean = Annotated[str | None, typer.Option(help="Channel means, e.g. 0.5,0.5,0.5.", rich_help_panel=WEIGHTS)]
Std = Annotated[str | None, typer.Option(help="Channel standard deviations.", rich_help_panel=WEIGHTS)]
InChans = Annotated[
    int | None, typer.Option(min=1, help="Channels of the images; default: as the model has.", rich_help_panel=WEIGHTS)
]
ImgSize = Annotated[int | None, typer.Option(min=1, help="Height and width of the input.", rich_help_panel=WEIGHTS)]

Window = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Iterations of a ring, 1 is BN; with --history ema images; default: ema of 8192 images.",
        rich_help_panel=METHOD,
    ),
]
Compensation = Annotated[str, typer.Option(help="projection, taylor (the paper's), none.", rich_help_panel=METHOD)]
Gradient = Annotated[str, typer.Option(help="full, or current (the paper's code).", rich_help_panel=METHOD)]
History = Annotated[
    str | None,
    typer.Option(
        help="ema (running statistics that follow) or ring (the paper's); default: ring with --window, else ema.",
        rich_help_panel=METHOD,
    ),
]

BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per step.", rich_help_panel=TRAINING)]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images.", rich_help_panel=TRAINING)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=TRAINING)]

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write nothing.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Last line of output: one JSON object.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT)]
