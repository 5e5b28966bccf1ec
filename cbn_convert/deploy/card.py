"""README.md of an exported folder: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch

from .class_map import CLASS_MAP, unwritable_class
from .converted import Conversion

_FRONT = "---\ntags:\n- timm\n- {task}\nlibrary_name: timm\n---\n"
_SHOWN_CLASSES = 10
_FOLDS = {
    "bn": "BatchNorm with running statistics",
    "affine": "BatchNorm that only scales and shifts, the running statistics are folded into its weight and bias",
    "conv": "folded into the weights of the convs; BatchNorm is an identity where it could be folded",
}
_GRAPHS = {
    "model.onnx": "ONNX, input `images`; size, mean, std and classes are in its metadata",
    "model.pt2": "for `torch.export.load`",
}
_NAMES = {"top1": "validation top-1 [%]", "epoch": "best epoch", "lr": "peak learning rate"}


def write_card(
    folder: Path,
    name: str,
    config: dict[str, Any],
    about: dict[str, Any],
    features: Iterable[int] | None = None,
    conversion: Conversion | None = None,
) -> None:
    """Writes folder/README.md for the folder that will be called `name`.

    Args:
        folder: where the card goes; graphs that are there already are named in it.
        name: what the folder will be called.
        config: the exported config.json.
        about: the metadata of the safetensors file; version, architecture and fold must be among them.
        features: the out_indices of a features_only backbone; None for other models.
        conversion: what a folder is for that was not trained yet; None for others.
    """
    about = dict(about)
    version, architecture, fold = about.pop("version"), about.pop("architecture"), about.pop("fold")
    data = config["pretrained_cfg"]
    if features is None:
        what, task, choice = f"{config['num_classes']} classes", "image-classification", ""
        if not config["num_classes"]:  # a model without its classifier
            what, task = "backbone without a head", "image-feature-extraction"
    else:
        what, task = "backbone without a head", "image-feature-extraction"
        choice = f", features_only=True, out_indices={tuple(features)}"
    source = json.dumps(f"local-dir:{name}", ensure_ascii=False)
    group_norm = about.get("norm") == "gn"
    usage = [
        "```python",
        "import timm",
        "",
        f"model = timm.create_model({source}, pretrained=True{choice}).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "```",
    ]
    if group_norm:
        usage = ["GroupNorm is in the place of BatchNorm, which timm does not build; `cbn evaluate RUN` reads the run."]
    lines = [
        f"{_FRONT.format(task=task)}# {architecture}, {what}",
        "",
        *usage,
        "",
        f"- **architecture:** {architecture}",
        *_classes(config.get("label_names", [])),
        f"- **input:** {' × '.join(map(str, data['input_size']))}, mean {_text(data['mean'])}, "
        f"std {_text(data['std'])}, {data['interpolation']} interpolation",
        *_images(data["input_size"][0]),
        f"- **crop for evaluation:** {data['crop_mode']}, {_text(data['crop_pct'])} of the resized image",
        f"- **normalization:** {'GroupNorm' if group_norm else _FOLDS[fold]}",
        *(f"- **{_NAMES.get(key, key.replace('_', ' '))}:** {_text(value)}" for key, value in about.items()),
        f"- **versions:** cbn_convert {version}, timm {timm.__version__}, torch {torch.__version__}",
    ]
    names = config.get("label_names", [])
    if names and not group_norm:
        lines += ["", _timm_reader(name, names, data["input_size"][0])]
    if conversion is not None:
        lines += ["", *conversion.card(name)]
    graphs = [f"- `{file}`: {what}" for file, what in _GRAPHS.items() if (folder / file).exists()]
    if graphs:
        lines += ["", "The same model, folded into the convs, for any number of images:", "", *graphs]
    text = "\n".join(lines) + "\n"
    # a name of a class may be of a folder in another encoding
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _images(channels: int) -> list[str]:
    """What timm's transforms are to be given, where that is not an RGB image."""
    if channels == 1:
        return ['- **images:** greyscale, `PIL.Image.open(FILE).convert("L")`']
    return [f"- **images:** tensors [{channels}, H, W] with values from 0 to 1"] * (channels != 3)


def _timm_reader(folder: str, names: list[str], channels: int) -> str:
    """How timm evaluates the folder, whose reader sorts names naturally and without case, and takes photos for RGB."""
    if channels not in (1, 3):
        return f"timm's reader of image folders has no images of {channels} channels; `cbn evaluate` reads them."
    if (odd := unwritable_class(names)) is not None:
        return (
            f"timm's reader of image folders orders classes in its own way, and class_map.txt, which would tell it the "
            f"order here, cannot hold the name {odd!r}; `cbn evaluate` reads them all."
        )
    path = json.dumps(f"{folder}/{CLASS_MAP}", ensure_ascii=False)
    mode = ', input_img_mode="L"' * (channels == 1)
    return (
        f"timm's reader of image folders orders classes in its own way; {CLASS_MAP} tells it the order here: "
        f'`timm.data.create_dataset("", root="DATA", split="val", class_map={path}{mode}, transform=transform)`, or '
        f"`--class-map` of its validate.py."
    )


def _classes(names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return [f"- **classes:** {', '.join(_text(name) for name in names[:_SHOWN_CLASSES])}{more}"]


def _text(value: Any) -> str:
    """The value on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{_text(v)} {k}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return " ".join(str(value).split())
