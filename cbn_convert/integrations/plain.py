"""What a training loop saves beside its state_dict, and what the callbacks of all frameworks share.

    torch.save({"model": model.state_dict(), "cbn": training_state(model), ...}, path)

    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    load_training_state(model, checkpoint["cbn"])        last: loading weights empties the window

A run that goes on so is the uninterrupted one to the bit, on the CPU, as far as the loop itself is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from .. import __version__
from ..conversion import ConversionReport, convert
from ..errors import CbnError
from ..norm import CrossIterationMixin, is_frozen

_FORMAT = 1  # of the state; another one is refused by its number
KEY = "cbn_convert"  # under which callbacks put the state into a checkpoint

_logger = logging.getLogger(__name__)


def training_state(model: nn.Module, *, gather: bool = False) -> dict[str, Any]:
    """What a resume to the bit needs beside the state_dict; tensors, numbers and strings only, on the CPU.

    `model` may be inside DistributedDataParallel or torch.compile. Under DDP each process has a window of its own:
    with `gather`, which all processes have to call, the state holds those of all; else that of this process.
    """
    layers = converted_layers(model)
    own: Any = {name: layer.history_state() for name, layer in layers.items()}
    own = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, own)
    ranks = [own]
    if gather and dist.is_available() and dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    windows = {name: _window(layer) for name, layer in layers.items()}
    return {"format": _FORMAT, "version": __version__, "windows": windows, "ranks": ranks}


def load_training_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores `training_state`, behind the weights, whose loading empties the window.

    The model is converted with the arguments of the run that saved. With another number of processes than then, each
    takes the window of its rank modulo the old number. Raises CbnError for a state of another version, another model
    or another window, and for a damaged one; then nothing has been restored.
    """
    if not isinstance(state, Mapping) or "format" not in state:
        raise CbnError("this is no state of cbn_convert's windows; give what training_state(model) returned")
    if state["format"] != _FORMAT:
        raise CbnError(
            f"the state was saved by cbn_convert {state.get('version')} in format {state['format']}, and this is "
            f"{__version__}, which reads format {_FORMAT}; resume with the version that saved it"
        )
    layers = converted_layers(model)
    with _intact():
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        saved, windows = state["ranks"][rank % len(state["ranks"])], state["windows"]
        _check_layers(layers, saved)
        for name, layer in layers.items():
            if windows[name] != _window(layer):
                raise CbnError(
                    f"layer {name!r} was trained with {windows[name]} and has {_window(layer)} now; convert with the "
                    "arguments of the run that saved the state"
                )
        before = {name: layer.history_state() for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.load_history_state(saved[name])
        except Exception:
            for name, layer in layers.items():
                layer.load_history_state(before[name])
            raise


@contextmanager
def _intact() -> Iterator[None]:
    try:
        yield
    except CbnError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise CbnError(
            f"the state of cbn_convert's windows cannot be restored ({type(error).__name__}: {error}); take another "
            "checkpoint, or resume without it, from the running statistics in the weights"
        ) from error


def _check_layers(layers: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if saved and not layers:
        raise CbnError(
            f"the state is of {len(saved)} converted layers, and the model has none; call cbn_convert.convert(model) "
            "before, with the arguments of the run that saved the state"
        )
    if odd := sorted(layers.keys() ^ saved.keys()):
        raise CbnError(
            f"the state is of other layers than the model's: {', '.join(odd[:5])} in one of them only; build and "
            "convert the model as in the run that saved the state"
        )


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
    if any(is_frozen(module) for module in bare(model).modules()):
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


def _window(layer: CrossIterationMixin) -> str:
    return repr(replace(layer.window, sync=False))  # which other ranks' images are looked at may change
