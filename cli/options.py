"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cbn_convert.training.config import FinetuneConfig, panel
from cbn_convert.training.settings import MethodSettings, ModelSettings, TrainingSettings

METHOD, TRAINING, WEIGHTS, OUTPUT = MethodSettings.PANEL, TrainingSettings.PANEL, ModelSettings.PANEL, "Output"


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
SETTINGS = {f.name: f for f in fields(FinetuneConfig)}
_METAVARS = {"int": "N", "float": "X"}


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def option(name: str, under: str | None = None) -> Any:
    """The option of a setting of `cbn finetune`, for other commands under a heading of theirs."""
    setting = SETTINGS[name]
    rules = setting.metadata
    kind = rules.get("type")  # as it is typed, where that is not what the setting is
    limits = {"min": rules["least"]} if "least" in rules and not kind else {}
    metavar = rules.get("metavar", _METAVARS.get(str(setting.type).partition(" ")[0]))
    return typer.Option(
        *rules.get("flags", (flag(name),)), help=rules["help"], rich_help_panel=under or panel(name),
        metavar=metavar, show_default=not kind and setting.default is not None, **limits,
    )  # fmt: skip


Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Arch = Annotated[str | None, option("arch")]
Checkpoint = Annotated[Path | None, option("checkpoint")]
Pretrained = Annotated[bool, option("pretrained")]
ModelKwargs = Annotated[str | None, option("model_kwargs")]
Mean = Annotated[str | None, option("mean")]
Std = Annotated[str | None, option("std")]
InChans = Annotated[int | None, option("in_chans")]
ImgSize = Annotated[int | None, option("img_size")]

Window = Annotated[int | None, option("window")]
Compensation = Annotated[str, option("compensation")]
Gradient = Annotated[str, option("gradient")]
History = Annotated[str | None, option("history")]

BatchSize = Annotated[int, option("batch_size", TRAINING)]
Workers = Annotated[int, option("workers", TRAINING)]
Device = Annotated[str, option("device", TRAINING)]

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write nothing.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Last line of output: one JSON object.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT)]
