"""Converts the BatchNorm layers of a model to Cross-Iteration Batch Normalization, in place, and back.

A layer is converted by changing its class: parameters, buffers, children, hooks and every reference to it stay the
same objects, as in torch.nn.utils.parametrize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from ..errors import ConversionError
from ..norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    CrossIterationBatchNormAct2d,
    CrossIterationMixin,
    check_window_options,
)
from ..norm.functional import Compensation, Gradient
from ..norm.history import HistoryKind
from ..norm.moments import exact_is_possible
from .report import ConversionReport, ReportRow
from .trace import NormCall, trace_norms

# A long exponential window is the better default for pretrained networks (docs/method.md); the layer's own default, a
# ring of 8, is the paper's.
DEFAULT_WINDOW = 16
DEFAULT_HISTORY: HistoryKind = "ema"
# Without a weight of its own to follow, a layer learns best from the batch and the one before it (docs/method.md).
UNBOUND_WINDOW = 2
# How the statistics respond to the weights changes slowly: a part of it, estimated in turn, is enough
# (docs/performance.md).
MOMENTS_EVERY = 8
MOMENTS_POSITIONS = 512

Selector = str | Iterable[str] | Callable[[str, nn.Module], bool]

CONVERTED: dict[type[_BatchNorm], type[CrossIterationMixin]] = {
    nn.BatchNorm1d: CrossIterationBatchNorm1d,
    nn.BatchNorm2d: CrossIterationBatchNorm2d,
    nn.BatchNorm3d: CrossIterationBatchNorm3d,
    BatchNormAct2d: CrossIterationBatchNormAct2d,
}
PLAIN = {converted: plain for plain, converted in CONVERTED.items()}
_FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm of the model by name: plain, converted, frozen or of an unknown subclass; shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (_BatchNorm, *_FROZEN))}


def convert(
    model: nn.Module,
    *,
    window: int = DEFAULT_WINDOW,
    compensation: Compensation = "projection",
    gradient: Literal["full", "current"] = "full",
    history: HistoryKind = DEFAULT_HISTORY,
    burn_in: int = 0,
    sync: bool = False,
    moments_every: int | None = None,
    moments_positions: int | None = MOMENTS_POSITIONS,
    example_input: Any | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> ConversionReport:
    """Converts the model's BatchNorm layers in place; returns one row per norm layer.

    The model runs once on `example_input` (a tensor, a tuple or a dict of arguments; by default random images of the
    size in its pretrained_cfg) to find the module that feeds each layer. Its eval output, state_dict keys and module
    tree do not change. `include` and `exclude` choose layers by glob pattern on the name, or by a predicate
    (name, module). Layers that are converted already stay as they are. The other arguments are those of
    CrossIterationBatchNorm2d; moments_every is by default 8 for history "ema" and 1 for "ring", and the layers take
    turns. With gradient "full", layers without a weight of their own get gradient "straight_through" and, unless
    compensation is "none", a window of at most 2. `sync` shares the statistics of each batch among the ranks of a
    process group.

    Raises ConversionError for a model without BatchNorm, for an unknown subclass of BatchNorm that is not excluded,
    for an argument out of range, or if the model cannot run; the model is then left as it was.
    """
    if moments_every is None:
        moments_every = MOMENTS_EVERY if history == "ema" else 1
    try:
        check_window_options(window, compensation, gradient, history, burn_in, moments_every, moments_positions)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    norms = norm_layers(model)
    if not norms:
        raise ConversionError(
            f"{type(model).__name__} has no BatchNorm layer, so there is nothing to convert; "
            "choose a model with BatchNorm"
        )
    chosen = [n for n, m in norms.items() if _selected(n, m, include, True) and not _selected(n, m, exclude, False)]
    for name in chosen:
        known = isinstance(norms[name], (CrossIterationMixin, *_FROZEN)) or type(norms[name]) in CONVERTED
        if not known:
            raise ConversionError(
                f"layer {name!r} is a {type(norms[name]).__name__}, a kind of BatchNorm that is not known here and "
                f"whose behaviour a conversion could lose; leave it as it is with exclude={name!r}"
            )
    todo = {name: norms[name] for name in chosen if type(norms[name]) in CONVERTED}
    calls = trace_norms(model, todo, example_input) if todo else {}

    if compensation == "exact":
        for name, call in calls.items():
            if call.producer is not None and not exact_is_possible(model.get_submodule(call.producer)):
                raise ConversionError(
                    f'compensation "exact" is not known for {call.producer!r}, a transposed conv; use "projection" or '
                    f"leave its norm as it is with exclude={name!r}"
                )
    plans = {name: _plan(model, name, norm, calls[name], compensation) for name, norm in todo.items()}
    rows: list[ReportRow] = []
    for name, norm in norms.items():
        if name in todo:
            row = plans[name]
            if row.status != "kept":
                own_window, own_gradient = window, cast(Gradient, gradient)
                producer = model.get_submodule(row.fed_by) if row.status == "compensated" and row.fed_by else None
                if producer is None and gradient == "full":
                    own_gradient = "straight_through"
                    own_window = window if compensation == "none" else min(window, UNBOUND_WINDOW)
                norm.__class__ = CONVERTED[type(norm)]  # type: ignore[index]
                assert isinstance(norm, CrossIterationMixin)
                norm.set_window(
                    own_window, compensation, own_gradient, history, burn_in, sync, moments_every, moments_positions,
                    phase=len(rows),
                )  # fmt: skip
                if own_window != window:
                    row = replace(row, reason=f"{row.reason}; window {own_window}")
                if producer is not None:
                    norm.bind(producer)
        else:
            row = _untouched(model, name, norm)
        rows.append(row)
    return ConversionReport(tuple(rows))


def revert(model: nn.Module) -> nn.Module:
    """Turns every converted layer back into the BatchNorm it was, in place; returns the model.

    Parameters and running statistics are the same tensors, so the state_dict is that of the converted model.
    """
    for module in model.modules():
        if isinstance(module, CrossIterationMixin):
            if type(module) not in PLAIN:
                raise ConversionError(
                    f"{type(module).__name__} is a subclass with no known plain form; replace it yourself"
                )
            plain = PLAIN[type(module)]
            module.remove_window()
            module.__class__ = plain  # type: ignore[assignment]
    return model


@torch.no_grad()
def warm_up(model: nn.Module, batches: Iterable[Any]) -> None:
    """Fills the history by forward passes under fixed weights; `window` - 1 batches fill it completely.

    `batches` yields what the model takes: a tensor, or a tuple or list whose first element is the images (labels are
    ignored). Runs in training mode under no_grad; modes, parameters and the running statistics of every norm layer
    are afterwards what they were.
    """
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for m in norm_layers(model).values() for b in m.buffers(recurse=False)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model.train()
            model(images.to(device) if isinstance(images, Tensor) else images)
    finally:
        for module, training in modes:
            module.train(training) if isinstance(module, CrossIterationMixin) else setattr(module, "training", training)
        for buffer, value in buffers:
            buffer.copy_(value)


def _selected(name: str, module: nn.Module, selector: Selector | None, default: bool) -> bool:
    if selector is None:
        return default
    if callable(selector):
        return bool(selector(name, module))
    patterns = [selector] if isinstance(selector, str) else selector
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _row(name: str, norm: nn.Module, fed_by: str | None, status: Any, reason: str) -> ReportRow:
    channels = norm.num_features if isinstance(norm, _BatchNorm) else len(norm.state_dict()["weight"])
    return ReportRow(name, type(norm).__name__, channels, fed_by, status, reason)


def _plan(model: nn.Module, name: str, norm: nn.Module, call: NormCall, compensation: str) -> ReportRow:
    """What becomes of a layer that is to be converted."""
    if call.calls == 0:
        return _row(name, norm, None, "kept", "not reached on the example input")
    if call.calls > 1:
        return _row(
            name, norm, None, "kept", f"called {call.calls} times per forward pass, one history cannot serve all"
        )
    if call.producer is None:
        return _row(
            name, norm, None, "window", f"input comes from {call.origin}, not directly from a conv or linear layer"
        )
    kind = type(model.get_submodule(call.producer)).__name__
    if call.producer_calls > 1:
        return _row(
            name, norm, None, "window", f"{kind} {call.producer} runs {call.producer_calls} times per forward pass"
        )
    if compensation == "none":
        return _row(name, norm, call.producer, "window", "compensation is off")
    return _row(name, norm, call.producer, "compensated", f"fed by {kind}")


def _untouched(model: nn.Module, name: str, norm: nn.Module) -> ReportRow:
    if isinstance(norm, CrossIterationMixin):
        producer = norm.producer
        fed_by = next((n for n, m in model.named_modules() if m is producer), None) if producer is not None else None
        status = "compensated" if fed_by is not None else "window"
        return _row(name, norm, fed_by, status, "converted already, left as it is")
    if isinstance(norm, _FROZEN):
        return _row(name, norm, None, "kept", "frozen statistics")
    return _row(name, norm, None, "kept", "not selected by include and exclude")
