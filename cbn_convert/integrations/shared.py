"""What the callbacks of all frameworks share: converting a part of a model that may be wrapped, and what it gave."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from packaging.version import Version
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..conversion import ConversionReport, convert
from ..errors import CbnError
from ..norm import CrossIterationMixin, is_frozen

KEY = "cbn_convert"  # under which the state of the windows stands in a checkpoint

_logger = logging.getLogger(__name__)


def converted_layers(model: nn.Module) -> dict[str, CrossIterationMixin]:
    """The converted layers by the names that they have in the bare model."""
    found = {name: m for name, m in bare(model).named_modules() if isinstance(m, CrossIterationMixin)}
    return {name.replace("_orig_mod.", ""): layer for name, layer in found.items()}


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def convert_part(model: nn.Module, part: str, keywords: Mapping[str, Any]) -> ConversionReport | None:
    """Converts a module of the model by its name, all of it by default; None where it is converted already."""
    model = bare(model)
    try:
        module = model.get_submodule(part)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise CbnError(f"{type(model).__name__} has no module {part!r} to convert; it has {names}") from None
    if any(isinstance(m, CrossIterationMixin) for m in module.modules()):
        return None
    report = convert(module, **cast(Any, keywords))
    _logger.info("%s: %s", type(module).__name__, report)
    return report


def convert_late(model: nn.Module, part: str, keywords: Mapping[str, Any]) -> ConversionReport | None:
    """`convert_part` behind the making of the optimizer; refused where that would not know all parameters then."""
    if any(is_frozen(module) for name, module in bare(model).named_modules() if name.startswith(part)):
        raise CbnError(
            f"{type(bare(model)).__name__} has frozen BatchNorm layers, whose weights become parameters that the "
            "optimizer was made without; call cbn_convert.convert(model) where the model is made"
        )
    return convert_part(model, part, keywords)


def synchronize(model: nn.Module) -> None:
    """Lets the converted layers look at the images of all ranks, as convert(sync=True) does."""
    for layer in converted_layers(model).values():
        layer.window = replace(layer.window, sync=True)


def require(package: str, least: str) -> None:
    """Raises CbnError if the framework is not there, or older than the versions that its integration knows."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise CbnError(
            f"this needs {package} {least} or newer, which is not installed; pip install {package}"
        ) from None
    if Version(found) < Version(least):
        raise CbnError(f"this needs {package} {least} or newer, and {found} is installed; pip install -U {package}")
