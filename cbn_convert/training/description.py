"""What a run's model was built with, so that it can be built again without its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import filter_pretrained_cfg

from ..conversion import norm_layers
from ..errors import ModelError, RunError
from ..models import ModelSpec, create_model, model_args
from .config import read_run

_KEYS = {"architecture": str, "model_args": dict, "pretrained_cfg": dict, "norm_eps": dict}


def describe(model: Any) -> dict[str, Any]:
    """Architecture, arguments, pretrained_cfg and eps of a model with its original norm layers, plain data for JSON.

    Raises ModelError for an argument that cannot be written as JSON.
    """
    args = model_args(model)
    for name, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ModelError(
                f"the model argument {name} is {value!r}, which cannot be stored with a run; give it as plain data"
            ) from None
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "state_dict"}
    return {
        "architecture": cfg["architecture"],
        "model_args": args,
        "pretrained_cfg": filter_pretrained_cfg(cfg, remove_source=True),
        # a few architectures (fbnetc_100) take another one with pretrained=True
        "norm_eps": {name: layer.eps for name, layer in norm_layers(model).items()},
    }


def stored_description(run: str | Path) -> dict[str, Any]:
    """What a run's config.json says of its model. Raises RunError if an older version wrote it."""
    stored = read_run(run).get("model")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), kind) for k, kind in _KEYS.items()):
        raise RunError(
            f"{run} was started by an older version, which did not store all that its model was built with; "
            "go on with that version (config.json names it), or start again"
        )
    return stored


def build_described(description: dict[str, Any], num_classes: int) -> Any:
    """A model as it was described, with random weights. Raises ModelError if this timm cannot build it."""
    cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in description["pretrained_cfg"].items()}
    args = {**description["model_args"], "pretrained_cfg": cfg}
    model = create_model(ModelSpec(description["architecture"], pretrained=False, model_kwargs=args), num_classes)
    norms, eps = norm_layers(model), description["norm_eps"]
    if list(norms) != list(eps):
        raise ModelError(
            f"timm {timm.__version__} builds {description['architecture']} with other norm layers than the run has; "
            "install the version that the run's config.json names"
        )
    for name, layer in norms.items():
        layer.eps = eps[name]
    return model
