"""What a training loop saves beside its state_dict.

    torch.save({"model": model.state_dict(), "cbn": training_state(model), ...}, path)

    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    load_training_state(model, checkpoint["cbn"])        last: loading weights empties the window

A run that goes on so is the uninterrupted one to the bit, on the CPU, as far as the loop itself is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import __version__
from ..errors import CbnError
from ..norm import CrossIterationMixin
from .shared import converted_layers

_FORMAT = 2  # of the state; another one is refused by its number


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


def _window(layer: CrossIterationMixin) -> str:
    return repr(replace(layer.window, sync=False))  # which other ranks' images are looked at may change
