"""Converts the BatchNorm layers of a model to Cross-Iteration Batch Normalization, in place, and back.

A layer is converted by changing its class: parameters, buffers, children, hooks and every reference to it stay the
same objects, as in torch.nn.utils.parametrize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import ConversionError
from ..norm import (
    CONVERTED,
    CrossIterationFrozenBatchNorm2d,
    CrossIterationMixin,
    OutputChannels,
    adopt,
    check_window_options,
    damaged_statistic,
    frozen_eps,
    is_frozen,
    modes_kept,
)
from ..norm.distributed import world_size
from ..norm.functional import Compensation, Gradient, is_measured
from ..norm.history import HistoryKind, Start
from ..norm.modes import tensors_kept
from ..norm.moments import exact_is_possible
from ..norm.producers import groups_of, is_transposed, learns, out_channels
from .lazy import ADVICE, is_lazy, materialize
from .report import ConversionReport, ReportRow
from .trace import OWN_FORWARD, NormCall, Part, trace_norms

# Where a window starts from running statistics that are worth keeping, it is to carry them along with the weights, and
# takes up new ones slowly: so many images, at least so many for layers without a weight of their own (docs/method.md).
CARRIED_IMAGES, LEAST_CARRIED_IMAGES = 8192, 64
# Without such statistics, training from scratch often fails with longer windows (docs/method.md).
NEW_WINDOW = 2
RING_WINDOW = 8  # the paper's
DEFAULT_HISTORY: HistoryKind = "ema"
# How the statistics respond to the weights changes slowly: a part of it, estimated in turn, is enough
# (docs/performance.md).
MOMENTS_EVERY = 8
MOMENTS_POSITIONS = 512

Selector = str | Iterable[str] | Callable[[str, nn.Module], bool]


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm of the model by name: plain, converted, frozen, scripted or unknown; shared ones once."""
    return {name: m for name, m in model.named_modules() if _is_batch_norm(m)}


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises by running statistics; known by its class or its buffers as InplaceAbn is."""
    if isinstance(module, torch.jit.ScriptModule):
        return _is_scripted(module)
    if isinstance(module, _BatchNorm):
        return True
    statistics = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    return all(t is not None and t.dim() == 1 for t in statistics) and not isinstance(module, _InstanceNorm)


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in getattr(module, "original_name", "")


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    *,
    window: int | None = None,
    batch_size: int = 2,
    compensation: Compensation = "projection",
    gradient: Literal["full", "current"] = "full",
    history: HistoryKind = DEFAULT_HISTORY,
    burn_in: int = 0,
    start: Start | None = None,
    sync: bool = False,
    moments_every: int | None = None,
    moments_positions: int | None = MOMENTS_POSITIONS,
    example_input: Any | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
) -> ConversionReport:
    """Converts the model's BatchNorm layers in place; returns one row per norm layer.

    The model runs on `example_input` (a tensor, a tuple or a dict of arguments; by default random images of a small
    size, or of that in its pretrained_cfg, or a sequence, image or volume as its first conv takes it), in training mode
    where it can, to find the modules that feed each layer. Lazy layers get their shapes by it. Its eval output,
    state_dict keys and module tree do not change. `include` and `exclude` choose layers by glob
    pattern on the name, or by a predicate (name, module). Layers that are converted already stay as they are. The other
    arguments are those of CrossIterationBatchNorm2d. By default, with history "ema", layers start from their running
    statistics ("running"), but for those of a new BatchNorm ("empty"), and moments_every is 8, the layers taking turns.
    The default window holds 8192 images, in batches of `batch_size` (on every rank, with `sync`), where a layer starts
    from running statistics that are not those of a new one, and 2 batches elsewhere; it is 8 with history "ring". So
    load pretrained weights before. With gradient "full", layers without a weight of their own get gradient
    "straight_through" and a window of at most 2, unless they start from such statistics and have a window of at least
    64 images; with compensation "none", which makes all layers such, any window is left to them. `sync` shares the
    statistics of each batch among the ranks of a process group.

    Raises ConversionError for a model without BatchNorm, for an unknown subclass of BatchNorm that is not excluded, for
    running statistics that are not finite or a variance below zero, for an argument out of range, or if the model
    cannot run; the model is then left as it was.
    """
    if moments_every is None:
        moments_every = MOMENTS_EVERY if history == "ema" else 1
    try:
        check_window_options(
            1 if window is None else window, compensation, gradient, history, burn_in, moments_every, moments_positions,
            start or "empty",
        )  # fmt: skip
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConversionError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    include, exclude = (s if s is None or isinstance(s, str) or callable(s) else tuple(s) for s in (include, exclude))
    materialize(model, example_input)
    norms = norm_layers(model)
    if not norms:
        raise ConversionError(
            f"{type(model).__name__} has no BatchNorm layer, so there is nothing to convert; "
            "choose a model with BatchNorm"
        )
    chosen = {n: m for n, m in norms.items() if _selected(n, m, include, True) and not _selected(n, m, exclude, False)}
    for name, norm in chosen.items():
        _check_known(name, norm)
        _check_statistics(name, norm)
    todo = {n: m for n, m in chosen.items() if not isinstance(m, CrossIterationMixin) and not _is_scripted(m)}
    calls = _calls(model, todo, example_input)
    plans = {name: _plan(model, name, norm, calls[name], compensation) for name, norm in todo.items()}
    if compensation == "exact":
        for name, row in plans.items():
            for part in calls[name].parts if row.status == "compensated" else ():
                if not exact_is_possible(model.get_submodule(part.module)):
                    raise ConversionError(
                        f'compensation "exact" is not known for {part.module!r}, a transposed conv; use "projection" '
                        f"or leave its norm as it is with exclude={name!r}"
                    )
    rows = {n: plans[n] if n in todo else _untouched(model, n, m) for n, m in norms.items()}
    for index, (name, norm) in enumerate(norms.items()):
        row = rows[name]
        if name not in todo or row.status == "kept":
            continue
        layer, own_gradient, own_window = adopt(norm), cast(Gradient, gradient), window
        measured = history == "ema" and (layer.FROZEN or is_measured(layer.running_mean, layer.running_var))
        own_start: Start = start or ("running" if measured else "empty")
        own_sync = sync or isinstance(norm, nn.SyncBatchNorm)
        per_step = batch_size * (world_size() if own_sync else 1)
        carried = own_start == "running" and measured
        if own_window is None and history == "ring":
            own_window = RING_WINDOW
        elif own_window is None:
            own_window = max(1, CARRIED_IMAGES // per_step) if carried else NEW_WINDOW
        is_long = carried and own_window * per_step >= LEAST_CARRIED_IMAGES
        if row.status != "compensated" and gradient == "full" and not is_long:
            own_gradient = "straight_through"
            own_window = own_window if compensation == "none" else min(own_window, NEW_WINDOW)
        layer.set_window(
            own_window, compensation, own_gradient, history, burn_in, own_sync, moments_every, moments_positions,
            own_start, phase=index,
        )  # fmt: skip
        if row.status == "compensated":
            layer.bind(*_outputs(model, calls[name].parts))
        if isinstance(layer, CrossIterationFrozenBatchNorm2d) and layer.producers:
            # γ and β of a stage that is frozen as a whole stay as they are
            for parameter in (layer.weight, layer.bias):
                parameter.requires_grad_(any(map(learns, layer.producers)))
        reason = row.reason if own_window == window else f"{row.reason}; window {own_window}"
        rows[name] = replace(row, reason=reason, history_bytes=layer.history_bytes)
    return ConversionReport(tuple(rows.values()))


def revert(model: nn.Module) -> nn.Module:
    """Turns every converted layer back into the BatchNorm it was, in place; returns the model.

    Parameters and running statistics are the same tensors, so the state_dict is that of the converted model.
    """
    layers = [m for m in model.modules() if isinstance(m, CrossIterationMixin)]
    for layer in layers:
        if type(layer) not in CONVERTED.values() and not isinstance(layer, CrossIterationFrozenBatchNorm2d):
            raise ConversionError(f"{type(layer).__name__} is a subclass with no known plain form; replace it yourself")
    for layer in layers:
        layer.restore()
    return model


@torch.no_grad()
def warm_up(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Begins the history by forward passes under fixed weights; about 64 images are enough.

    A window that starts empty is filled by `window` - 1 batches; one that starts from the running statistics learns how
    these respond to the weights.

    `batches` yields what the model takes: a tensor, a mapping of keyword arguments, or a tuple or list whose first
    element is one of these (labels are ignored). For models that are called otherwise, `forward` takes the model and
    the whole batch. Tensors, in containers too, are moved to the model's device. Runs in training mode under no_grad;
    modes, parameters and all buffers are afterwards what they were, such as running statistics and the vectors of
    spectral_norm. Random numbers are drawn as in any forward pass. Raises ConversionError for running statistics that
    are not finite or a variance below zero.
    """
    for name, norm in norm_layers(model).items():
        _check_statistics(name, norm)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with modes_kept(model), tensors_kept(model):
        model.train()
        for batch in batches:
            (forward or _called)(model, send_to_device(batch, device))


def _called(model: nn.Module, batch: Any) -> Any:
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(**images) if isinstance(images, Mapping) else model(images)


def _check_known(name: str, norm: nn.Module) -> None:
    kind = type(norm).__name__
    if is_lazy(norm):
        raise ConversionError(
            f"layer {name!r}, a {kind}, has no shape yet and the example does not reach it; {ADVICE}, or use "
            f"exclude={name!r}"
        )
    if is_frozen(norm):
        try:
            frozen_eps(norm)
        except TypeError as error:
            raise ConversionError(f"layer {name!r} cannot be converted: {error}; use exclude={name!r}") from None
    elif not (isinstance(norm, CrossIterationMixin) or type(norm) in CONVERTED or _is_scripted(norm)):
        raise ConversionError(
            f"layer {name!r} is a {kind}, a kind of BatchNorm that is not known here and whose behaviour a conversion "
            f"could lose; leave it as it is with exclude={name!r}"
        )


def _check_statistics(name: str, norm: nn.Module) -> None:
    if (fault := damaged_statistic(norm)) is not None:
        raise ConversionError(
            f"{name}.{fault}; load weights that are not damaged, or measure the statistics anew on your images"
        )


def _calls(model: nn.Module, norms: dict[str, nn.Module], example_input: Any | None) -> dict[str, NormCall]:
    """How the layers are reached in training, or in evaluation where training does not reach them or needs more."""
    if not norms:
        return {}
    try:
        calls = trace_norms(model, norms, example_input, training=True)
    except ConversionError:
        calls = {}
    rest = {name: norm for name, norm in norms.items() if name not in calls or not calls[name].calls}
    return {**calls, **trace_norms(model, rest, example_input)} if rest else calls


def _selected(name: str, module: nn.Module, selector: Selector | None, default: bool) -> bool:
    if selector is None:
        return default
    if callable(selector):
        return bool(selector(name, module))
    patterns = [selector] if isinstance(selector, str) else selector
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _row(name: str, norm: nn.Module, fed_by: str | None, status: Any, reason: str) -> ReportRow:
    if _is_scripted(norm):
        kind, channels = str(norm.original_name), len(cast(Tensor, norm.running_mean))
    else:
        kind = type(norm).__name__
        channels = norm.num_features if isinstance(norm, _BatchNorm) else len(norm.get_buffer("running_mean"))
    return ReportRow(name, kind, channels, fed_by, status, reason)


def _outputs(model: nn.Module, parts: Iterable[Part]) -> list[OutputChannels]:
    return [OutputChannels(cast(Any, model.get_submodule(p.module)), p.first, p.channels) for p in parts]


def _plan(model: nn.Module, name: str, norm: nn.Module, call: NormCall, compensation: str) -> ReportRow:
    """What becomes of a layer that is to be converted."""
    if call.calls == 0:
        return _row(name, norm, None, "kept", "not reached on the example input")
    if call.calls > 1:
        why = ", one history cannot serve all"
        if call.split:
            why = f" for {call.samples} samples, a part of them each time; a smaller example_input shows it called once"
        return _row(name, norm, None, "kept", f"called {call.calls} times per forward pass{why}")
    group = getattr(norm, "process_group", None)
    if group is not None and group is not getattr(dist.group, "WORLD", None):
        return _row(name, norm, None, "kept", "synchronises over a part of the processes only")
    if not call.parts:
        known = "" if call.origin.endswith(OWN_FORWARD) else ", not directly from a conv or linear layer"
        return _row(name, norm, None, "window", f"input comes from {call.origin}{known}")
    outputs = _outputs(model, call.parts)
    fed_by = ", ".join(dict.fromkeys(part.module for part in call.parts))
    kinds = " and ".join(dict.fromkeys(type(output.module).__name__ for output in outputs))
    if call.producer_calls > 1:
        return _row(name, norm, None, "window", f"{kinds} {fed_by} runs {call.producer_calls} times per forward pass")
    if any(not o.whole and (groups_of(o.module) > 1 or is_transposed(o.module)) for o in outputs):
        return _row(name, norm, fed_by, "window", f"fed by some channels of a {kinds} with groups or transposed")
    if compensation == "none":
        return _row(name, norm, fed_by, "window", "compensation is off")
    if len(outputs) > 1:
        return _row(name, norm, fed_by, "compensated", f"fed by a concatenation of {len(outputs)} {kinds}")
    if not outputs[0].whole:
        of = f"{outputs[0].channels} of {out_channels(outputs[0].module)} channels of {kinds}"
        return _row(name, norm, fed_by, "compensated", f"fed by {of}")
    return _row(name, norm, fed_by, "compensated", f"fed by {kinds}")


def _untouched(model: nn.Module, name: str, norm: nn.Module) -> ReportRow:
    if isinstance(norm, CrossIterationMixin):
        names = {id(m): n for n, m in model.named_modules()}
        fed_by = ", ".join(dict.fromkeys(names[id(m)] for m in norm.producers if id(m) in names)) or None
        status = "window" if fed_by is None else "compensated"
        row = _row(name, norm, fed_by, status, "converted already, left as it is")
        return replace(row, history_bytes=norm.history_bytes)
    if _is_scripted(norm):
        return _row(name, norm, None, "kept", "inside a scripted module, which runs without Python")
    return _row(name, norm, None, "kept", "not selected by include and exclude")
