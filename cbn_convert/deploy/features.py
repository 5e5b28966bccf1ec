"""Backbones that timm made with features_only=True, in the form of the architecture that they were cut from."""

from __future__ import annotations

import logging
from typing import Any

import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from ..classifier import classifier_names
from ..errors import ExportError

_logger = logging.getLogger(__name__)

# what chooses features and not weights; num_classes is left to the architecture, so that a loader's differs from it,
# without which timm asks for every key of the head
FEATURE_ARGS = frozenset(
    ("features_only", "out_indices", "feature_cls", "feature_cfg", "feature_location", "pretrained_strict")
)
_WRAPPERS = ("model.", "body.", "graph_module.")  # timm's getter, hook and fx


def in_original_form(model: Any, model_args: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The model that a config for timm describes, and the state_dict under its keys.

    For a features_only backbone the first is the whole architecture, on the meta device, with the backbone's
    pretrained_cfg; other models are returned themselves. `model_args` are keyword arguments beside those that timm
    recorded. Raises ExportError as `original_state_dict` does, or if the architecture cannot be built.
    """
    if not isinstance(getattr(model, "feature_info", None), FeatureInfo):
        return model, model.state_dict()
    architecture = model.pretrained_cfg["architecture"]
    args = {**getattr(model, "_model_args", {}), **model_args}
    args = {k: v for k, v in args.items() if k not in FEATURE_ARGS and k != "num_classes"}
    try:
        with torch.device("meta"):
            original = timm.create_model(architecture, **args)
    except Exception as error:  # whatever a constructor raises
        raise ExportError(
            f"timm cannot build {architecture!r} with the arguments of this backbone ({error}); "
            "give those that it takes as model_args"
        ) from error
    given = {k: v for k, v in model.pretrained_cfg.items() if v is not None}
    original.pretrained_cfg = {**original.pretrained_cfg, **given, "num_classes": original.num_classes}
    return original, original_state_dict(model, original)


def original_state_dict(backbone: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The backbone's state_dict under the keys of the model `original` that it was cut from.

    timm flattens Sequentials that are direct children (stages.0 becomes stages_0) and adds the name of a wrapper.
    Raises ExportError for the first key that has no counterpart of its shape.
    """
    expected = original.state_dict()
    flattened = {name for name, child in original.named_children() if isinstance(child, nn.Sequential)}
    known = {key.replace(".", "_", 1): key for key in expected if key.partition(".")[0] in flattened}
    known |= {key: key for key in expected}
    state = {}
    for key, value in backbone.state_dict().items():
        spellings = [key, *(key.removeprefix(wrapper) for wrapper in _WRAPPERS)]
        name = next((known[s] for s in spellings if s in known), None)
        if name is None or name in state or expected[name].shape != value.shape:
            raise ExportError(
                f"{key} of this {type(backbone).__name__} has no counterpart in {type(original).__name__}, so plain "
                "timm could not load it; create the backbone with timm.create_model(..., features_only=True)"
            )
        state[name] = value
    _warn_of_missing(original, [name for name in expected if name not in state])
    return state


def _warn_of_missing(original: Any, missing: list[str]) -> None:
    """Logs what timm will leave at random values in silence; a new classifier is nobody's surprise."""
    heads = tuple(f"{head}." for head in classifier_names(original))
    missing = [name for name in missing if not name.startswith(heads)]
    if missing:
        _logger.warning(
            "the backbone has no %s%s; timm gives them random values in models that have them",
            ", ".join(missing[:3]), f" and {len(missing) - 3} more" if len(missing) > 3 else "",
        )  # fmt: skip
