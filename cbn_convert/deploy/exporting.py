"""Writes a model as a folder that plain timm loads: model.safetensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import __version__
from ..errors import ExportError
from ..files import new_directory
from .features import FEATURE_ARGS, in_original_form
from .folding import FoldTarget
from .folding import fold as fold_model

_DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def export(
    model: nn.Module,
    output: str | Path,
    *,
    fold: FoldTarget = "bn",
    class_names: Sequence[str] | None = None,
    model_args: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `output`/model.safetensors and `output`/config.json; returns the folder.

    timm.create_model("local-dir:OUTPUT", pretrained=True) loads it. With fold "affine" or "conv" the BatchNorm keys
    stay, as identities. A backbone of features_only=True gets the keys of the architecture that it was cut from:
    timm loads it with features_only=True or another num_classes. `model_args` are the keyword arguments the model was
    created with beside num_classes, `data_config` overrides input_size, mean, std, interpolation, crop_pct. `metadata`
    is added to the safetensors metadata. The folder appears complete or not at all. Raises ExportError if the model is
    not one that timm registers or holds values that are not finite, RunError if the folder is not empty and
    `overwrite` is False.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or cfg.get("architecture") not in timm.list_models():
        raise ExportError(
            f"{type(model).__name__} is not an architecture that timm registers, so plain timm could not load it; "
            "save its state_dict instead, the keys are those of the original model"
        )
    folded: Any = fold_model(model, fold, keep_bn=True)
    data_config = {k: v for k, v in (data_config or {}).items() if k in _DATA_KEYS}
    folded.pretrained_cfg = {**cfg, **data_config}
    model_args = {k: v for k, v in (model_args or {}).items() if k not in FEATURE_ARGS}
    described, state = in_original_form(folded, model_args)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    damaged = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if damaged:
        raise ExportError(f"{damaged[0]} holds values that are not finite; the model is damaged and was not exported")
    about = {"version": __version__, "architecture": cfg["architecture"], "fold": fold, **(metadata or {})}
    output = Path(output)
    with new_directory(output, overwrite) as folder:
        # a state_dict may name one tensor twice (tied weights); safetensors wants one storage per name
        shared: set[int] = set()
        for name, t in tensors.items():
            if t.data_ptr() in shared:
                tensors[name] = t.clone()
            shared.add(t.data_ptr())
        safetensors.torch.save_file(
            tensors, folder / "model.safetensors", metadata={"format": "pt", "cbn_convert": json.dumps(about)}
        )
        labels = {"label_names": list(class_names)} if class_names else {}
        save_config_for_hf(described, folder / "config.json", model_config=labels, model_args=model_args)
    return output
