"""Converts the BatchNorm layers of a model to Cross-Iteration Batch Normalization, in place, and back.

A layer is converted by changing its class: parameters, buffers, children, hooks and every reference to it stay the
same objects, as in torch.nn.utils.parametrize.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import Unpack

from ..damage import damaged_statistic
from ..errors import CbnWarning, ConversionError
from ..modes import modes_kept, tensors_kept
from ..norm import (
    CONVERTED,
    CrossIterationFrozenBatchNorm2d,
    CrossIterationMixin,
    OutputChannels,
    Window,
    WindowKeywords,
    adopt,
    frozen_eps,
    is_frozen,
    window_of,
)
from ..norm.functional import is_measured
from ..norm.producers import learns
from ..norm.tap import InputTap, is_watched
from .lazy import ADVICE, is_lazy, materialize
from .others import lacks_any, refuse_fusing, remove_orphaned_hooks
from .policy import LayerFacts, decide
from .report import ConversionReport, ReportRow
from .trace import NormCall, Part, trace_norms

# see `_is_hardly_measured`
LEAST_LEFT, MOST_SPREAD = 0.05, 0.3  # of the ones that variances begin with; of their logarithms

Selector = str | Iterable[str] | Callable[[str, nn.Module], bool]


class ConvertKeywords(WindowKeywords, total=False):
    """The settings of a window one by one, and what `convert` still accepts."""

    batch_size: int | None


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
    window: Window | int | None = None,
    example_input: Any | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> ConversionReport:
    """Converts the model's BatchNorm layers in place; returns one row per norm layer.

    The model runs on `example_input`, in training mode where it can, to find the modules that feed each layer. Its eval
    output, state_dict keys and module tree do not change; convs that apply the layer behind them in training get a
    subclass of their class. Layers that are converted already stay as they are, and lazy ones get their shapes.

    Args:
        model: changed in place.
        window: a `Window`; by default the carried window of 8192 images: the running statistics, following weights and
            images. A number is the paper's window of so many iterations (1 is BatchNorm), or with history="ema" a
            carried one of so many images.
        example_input: a tensor, a tuple or a dict of arguments; by default random images of a small size, or of that
            in the model's pretrained_cfg, or a sequence, image or volume as its first conv takes it.
        include: the layers to convert, by glob pattern on the name or by a predicate (name, module); all by default.
        exclude: those to leave, likewise.
        keywords: the fields of `Window`, one by one: history, compensation, gradient, burn_in, start, sync,
            moments_every, moments_positions.

    Whether a layer has statistics to carry is decided when training begins, and again after load_state_dict; until
    there are some, it averages its own, the newest half. Raises ConversionError for a model without BatchNorm, for an
    subclass of BatchNorm that is not excluded, for running statistics that are not finite or a variance below zero, for
    an argument out of range, or if the model cannot run; the model is then left as it was.
    """
    if keywords.pop("batch_size", None) is not None:
        warnings.warn("the window counts images: convert needs no batch_size any more", DeprecationWarning, 3)
    try:
        chosen_window = window_of(window, cast(WindowKeywords, keywords))
    except ValueError as error:
        raise ConversionError(str(error)) from None
    model = getattr(model, "_orig_mod", model)  # torch.compile's is a shell around the module
    include, exclude = (s if s is None or isinstance(s, str) or callable(s) else tuple(s) for s in (include, exclude))
    remove_orphaned_hooks(model)
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
    feeds = Counter(part.module for name in todo for part in {p.module: p for p in calls[name].parts}.values())
    rows = {}
    for phase, (name, norm) in enumerate(norms.items()):
        if name not in todo:
            rows[name] = _untouched(model, name, norm)
            continue
        facts = _facts(model, norm, calls[name], chosen_window, feeds)
        rows[name] = _converted(name, norm, facts, chosen_window, phase)
    thawed = [norm for norm in todo.values() if isinstance(norm, CrossIterationFrozenBatchNorm2d)]
    if lacks_any([p for norm in thawed for p in norm.parameters() if p.requires_grad], model):
        warnings.warn(
            f"weight and bias of {len(thawed)} layers that were frozen are parameters now, which the optimizer does "
            "not have; make it after cbn.convert(model)",
            CbnWarning,
            stacklevel=3,
        )
    hardly = [name for name in todo if rows[name].statistics == "pretrained" and _is_hardly_measured(norms[name])]
    if hardly:
        warnings.warn(
            f"the running statistics of {len(hardly)} layers ({hardly[0]}, ..) are of a few batches and mostly the "
            "zeros and ones that a new BatchNorm has, as where a new network was tried in training mode; CBN would "
            "carry them: where the layers are new, call their reset_running_stats() before training",
            CbnWarning,
            stacklevel=3,
        )
    return ConversionReport(tuple(rows.values()))


def _is_hardly_measured(norm: nn.Module) -> bool:
    """Whether the variances are as a few steps from ones leave them: of those more than `LEAST_LEFT`, and much alike.

    So are those of random networks, and of a few layers in pretrained ones whose steps a file has not counted.
    """
    steps, var = norm._buffers.get("num_batches_tracked"), norm._buffers.get("running_var")
    momentum = getattr(norm, "momentum", None)
    if not (type(steps) is type(var) is Tensor) or var.is_meta or not isinstance(momentum, float):
        return False
    left = (1 - momentum) ** int(steps)
    if not LEAST_LEFT < left < 1:
        return False
    rounding = 16 * torch.finfo(var.dtype).eps
    return bool((var >= left * (1 - rounding)).all() and var.float().log().std(correction=0) < MOST_SPREAD)


def _facts(model: nn.Module, norm: nn.Module, call: NormCall, window: Window, feeds: Counter[str]) -> LayerFacts:
    outputs = tuple(_outputs(model, call.parts))
    group = getattr(norm, "process_group", None)
    measured = is_frozen(norm) or is_measured(norm._buffers.get("running_mean"), norm._buffers.get("running_var"))
    return LayerFacts(
        call=call,
        outputs=outputs,
        in_part_of_group=group is not None and group is not getattr(dist.group, "WORLD", None),
        watched=any(map(is_watched, [norm, *(output.module for output in outputs)])),
        is_new=not measured or window.start == "empty",
        has_statistics=norm._buffers.get("running_mean") is not None,
        shared=any(feeds[part.module] > 1 for part in call.parts)
        or any(isinstance(hook, InputTap) for o in outputs for hook in o.module._forward_hooks.values()),
    )


def _converted(name: str, norm: nn.Module, facts: LayerFacts, window: Window, phase: int) -> ReportRow:
    """Converts one layer as `decide` says; returns its row."""
    decision = decide(facts, window)
    of_no_use = decision.status == "kept" or facts.call.producer_calls > 1
    fed_by = None if of_no_use else ", ".join(dict.fromkeys(part.module for part in facts.call.parts)) or None
    row = _row(name, norm, fed_by, decision.status, decision.reason)
    if decision.status == "kept":
        return row
    layer = adopt(norm)
    sync = window.sync or isinstance(layer, nn.SyncBatchNorm)
    layer.set_window(replace(decision.window, sync=sync), phase, name)
    if decision.status == "compensated":
        layer.bind(*facts.outputs, folded=decision.folded)
        refuse_fusing(layer)
    if isinstance(layer, CrossIterationFrozenBatchNorm2d) and layer.producers:
        # γ and β of a stage that is frozen as a whole stay as they are
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad_(any(map(learns, layer.producers)))
    return _described(row, layer)


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
    remove_orphaned_hooks(model)
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
    if not isinstance(images, Mapping):
        return model(images)
    try:
        inspect.signature(model.forward).bind(**images)
    except TypeError as error:
        raise ConversionError(
            f"warm_up cannot call {type(model).__name__} with a batch's {', '.join(map(str, images))} ({error}); pass "
            "forward=, a function of the model and the batch"
        ) from None
    return model(**images)


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


def _described(row: ReportRow, layer: CrossIterationMixin) -> ReportRow:
    """A row with what the converted layer itself says."""
    folded = layer.trains_folded and (layer.window.is_fixed or not layer.is_new)
    return replace(
        row, form="folded" if folded else "unfolded", statistics="new" if layer.is_new else "pretrained",
        history_bytes=layer.history_bytes,
    )  # fmt: skip


def _outputs(model: nn.Module, parts: Iterable[Part]) -> list[OutputChannels]:
    return [OutputChannels(cast(Any, model.get_submodule(p.module)), p.first, p.channels) for p in parts]


def _untouched(model: nn.Module, name: str, norm: nn.Module) -> ReportRow:
    if isinstance(norm, CrossIterationMixin):
        names = {id(m): n for n, m in model.named_modules()}
        fed_by = ", ".join(dict.fromkeys(names[id(m)] for m in norm.producers if id(m) in names)) or None
        status = "window" if fed_by is None else "compensated"
        row = _row(name, norm, fed_by, status, "converted already, left as it is")
        return _described(row, norm)
    if _is_scripted(norm):
        return _row(name, norm, None, "kept", "inside a scripted module, which runs without Python")
    return _row(name, norm, None, "kept", "not selected by include and exclude")
