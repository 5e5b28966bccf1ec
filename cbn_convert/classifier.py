"""The part of a timm model that is made anew for other classes."""

from __future__ import annotations

from typing import Any

from torch import nn


def classifier_names(model: Any) -> tuple[str, ...]:
    """Those that timm's config of the model has, of its layers that depend on the number of classes."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def classifiers(model: Any) -> list[nn.Module]:
    """These layers, several in a distilled model; what `get_classifier` gives where the config does not name them."""
    modules = dict(model.named_modules())
    named = [modules[name] for name in classifier_names(model) if name in modules]
    if named:
        return named
    found = model.get_classifier()
    return [head for head in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(head, nn.Module)]


def reset_head(model: Any) -> None:
    """Sets the classifier of a timm model to zero: all classes equally likely, no noise from random logits."""
    for module in (m for head in classifiers(model) for m in head.modules()):
        # a norm layer or a hidden layer in the head keeps its weights: zero there would block every gradient
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == model.num_classes:
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
