"""Writes a model as a folder that plain timm loads: model.safetensors, config.json and a model card."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models._hub import save_config_for_hf
from torch import nn

from .. import __version__
from ..conversion import norm_layers
from ..damage import damaged_value
from ..errors import ExportError, first_line
from ..files import new_directory, read_json, write_json
from ..models import offline_if_unreachable, with_data_config
from .card import write_card
from .class_map import known_classes, write_class_map
from .converted import Conversion
from .features import FEATURE_ARGS, in_original_form
from .folding import FoldTarget
from .folding import fold as fold_model
from .graphs import check_onnx_installed, write_graphs


def export(
    model: nn.Module,
    output: str | Path,
    *,
    fold: FoldTarget = "bn",
    class_names: Sequence[str] | None = None,
    model_args: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    conversion: Conversion | None = None,
    onnx: bool = False,
    torch_export: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes `output`/model.safetensors, config.json and README.md, a model card; returns the folder.

    timm.create_model("local-dir:OUTPUT", pretrained=True) loads it. A backbone of features_only=True gets the keys of
    the architecture that it was cut from: timm loads it with features_only=True or another num_classes. The folder
    appears complete or not at all.

    Args:
        model: a model of an architecture that timm registers; it does not change.
        output: the folder.
        fold: `into` of `cbn_convert.fold`; with "affine" or "conv" the BatchNorm keys stay, as identities.
        class_names: by default those in the model's pretrained_cfg. With names there is class_map.txt, by which timm's
            reader of image folders takes the classes in this order, unless such a file cannot hold the names, as the
            card then says.
        model_args: the keyword arguments the model was created with beside num_classes, for what timm has not recorded
            itself.
        data_config: overrides input_size, mean, std, interpolation, crop_pct and crop_mode; other sizes and crops that
            timm would evaluate with then go.
        metadata: added to the safetensors metadata and shown in the card.
        conversion: adds conversion.json, and to the card what can be done with a model that is yet to be trained.
        onnx: adds model.onnx, for any number of images of the input size, folded into the convs whatever `fold` says;
            its outputs are checked.
        torch_export: adds model.pt2 (torch.export.load), likewise.
        overwrite: whether an export that is in the folder may be replaced.

    Raises ExportError if the model is not one that timm registers, holds values that are not finite, is not as
    `model_args` or `class_names` say or has no such graph, or if `onnx` lacks its packages; RunError if the folder is
    not empty and `overwrite` is False.
    """
    if onnx:
        check_onnx_installed()
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or cfg.get("architecture") not in timm.list_models():
        raise ExportError(
            f"{type(model).__name__} is not an architecture that timm registers, so plain timm could not load it; "
            "save its state_dict instead, the keys are those of the original model"
        )
    cfg = with_data_config(cfg, data_config or {})
    folded: Any = fold_model(model, fold, keep_bn=True)
    folded.pretrained_cfg = cfg
    model_args = {k: v for k, v in (model_args or {}).items() if k not in FEATURE_ARGS}
    described, state = in_original_form(folded, model_args)
    names = _class_names(described, class_names)
    if class_names:  # what weights of other classes have brought along
        labels = ("label_names", "label_descriptions")
        described.pretrained_cfg = {k: v for k, v in described.pretrained_cfg.items() if k not in labels}
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    damaged = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if damaged:
        raise ExportError(f"{damaged[0]} holds values that are not finite; the model is damaged and was not exported")
    if (fault := damaged_value(model)) is not None:
        raise ExportError(f"{fault}; the model is damaged and was not exported")
    about = {**(metadata or {}), "version": __version__, "architecture": cfg["architecture"], "fold": fold}
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
        _write_config(folder, described, names, model_args)
        if described is folded and (eps := _eps_that_timm_changes(folder, folded)) is not None:
            _write_config(folder, described, names, {**model_args, "bn_eps": eps})
            if _eps_that_timm_changes(folder, folded) is not None:
                raise ExportError(
                    f"timm builds {cfg['architecture']} with another eps than this model's {eps:g}; "
                    "give the argument that sets it in model_args"
                )
        config = read_json(folder / "config.json", "model settings")
        if onnx or torch_export:
            write_graphs(model, folder, config, onnx=onnx, torch_export=torch_export)
        write_class_map(folder, names)
        if conversion is not None:
            write_json(folder / "conversion.json", conversion.to_dict())
        features = None if described is folded else folded.feature_info.out_indices
        write_card(folder, output.name, config, about, features, conversion)
    return output


def _class_names(model: Any, class_names: Sequence[str] | None) -> list[str]:
    """The given names, or those of the classes that the weights were trained for; empty if nobody knows."""
    if class_names:
        if len(class_names) != model.num_classes:
            raise ExportError(
                f"class_names has {len(class_names)} names and the model {model.num_classes} classes; give one for each"
            )
        return list(class_names)
    return known_classes(model)


def _write_config(folder: Path, model: Any, names: list[str], model_args: dict[str, Any]) -> None:
    """folder/config.json as timm writes it. Raises ExportError for arguments that are not the model's."""
    labels: dict[str, Any] = {"label_names": names} if names else {}
    try:
        save_config_for_hf(model, folder / "config.json", model_config=labels, model_args=model_args)
    except ValueError as error:
        raise ExportError(f"timm cannot describe this model: {str(error).rstrip('.')}; check model_args") from error


def _eps_that_timm_changes(folder: Path, model: nn.Module) -> float | None:
    """The eps of the first norm layer that has another one when timm loads the folder; None if all are the same.

    A few architectures (fbnetc_100) take another default with pretrained=True. Raises ExportError if timm cannot load,
    unless the model has no BatchNorm: a GroupNorm run is kept in this form, and not for timm.
    """
    norms = norm_layers(model)
    if not norms:
        return None
    try:
        with torch.device("meta"), warnings.catch_warnings(), offline_if_unreachable():
            warnings.simplefilter("ignore")  # that weights are not copied to the meta device
            plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (LocalEntryNotFoundError, HfHubHTTPError):
        return None  # a few (vit_base_resnet50d_224) get weights of their backbone from the hub as well, whoever loads
    except Exception as error:  # whatever a constructor raises
        raise ExportError(
            f"timm would not load the exported model ({first_line(error)[:200]}); "
            "give the arguments that it was created with as model_args"
        ) from error
    modules = dict(plain.named_modules())
    for name, norm in norms.items():
        if name in modules and getattr(modules[name], "eps", norm.eps) != norm.eps:
            return float(cast(float, norm.eps))
    return None
