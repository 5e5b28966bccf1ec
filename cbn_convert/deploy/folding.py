"""Folds normalization by running statistics into plain BatchNorm, a scale and shift, or the conv's weights."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves, tree_map

from ..conversion import NormCall, norm_layers, revert, run, trace_norms
from ..conversion.example import Arguments, outputs_on
from ..conversion.lazy import ADVICE, lazy_layers
from ..errors import ConversionError, FoldError
from ..norm import CONVERTED, frozen_eps, is_frozen
from ..norm.producers import applies_stored_weight, is_linear, is_producer, is_transposed, out_channels, own_forward

FoldTarget = Literal["bn", "affine", "conv"]
FOLD_TARGETS: tuple[str, ...] = ("bn", "affine", "conv")

NOISE = 1000  # a fold rounds every weight of every layer, a change of the images in the last bit is a single one

_logger = logging.getLogger(__name__)


class ChannelAffine(nn.Module):
    """y = weight · x + bias per channel of x [N, C, ...]; parameters [C]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Output like x in shape and dtype."""
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.weight.view(shape).to(x.dtype) + self.bias.view(shape).to(x.dtype)


@torch.no_grad()
def fold(
    model: nn.Module,
    into: FoldTarget = "conv",
    *,
    keep_bn: bool = False,
    example_input: Any | None = None,
) -> nn.Module:
    """Returns a copy of the model, in eval mode, with its norm layers folded; the model itself does not change.

    With "conv", a layer whose input is not the output of conv or linear layers, or is also read elsewhere, stays
    BatchNorm, as does one behind a standardised or parametrised weight or a grouped transposed conv. So does one whose
    place another norm, or whose conv's place another conv, may take in another call: one of as many channels that the
    example does not reach, as with norms for several domains. Their names are logged, with the reason. drop and act of
    BatchNormAct2d stay. The new weights are computed in float64.

    Args:
        model: any model with norm layers, converted or not.
        into: "bn" gives plain BatchNorm with the running statistics, the same outputs to the bit. "affine" replaces
            each layer by `ChannelAffine`. "conv" multiplies it into the weight and bias of the conv or linear layers
            that feed it, after timm's reparameterize_model has merged the branches of those blocks that know how to
            (RepVGG, MobileOne, ...).
        keep_bn: with "affine" and "conv", leave BatchNorm modules as identities (mean 0, var 1 - eps, γ 1, β what has
            no other place) and branches as they are, so that state_dict keys are those of the original architecture.
            Without it, `load_folded` takes the state_dict into a new model of the architecture.
        example_input: as in `convert`; what the outputs of model and copy are compared on, but for "bn".

    Raises FoldError if a folded tensor would not be finite, if the copy's outputs on `example_input` are not the
    model's, or for another `into`; ConversionError if the model cannot run on it.
    """
    if into not in FOLD_TARGETS:
        raise FoldError(f"fold must be one of {', '.join(FOLD_TARGETS)}, got {into!r}")
    if lazy := lazy_layers(model):
        raise FoldError(f"layer {next(iter(lazy))!r} has no weights yet, so there is nothing to fold; {ADVICE}")
    folded = revert(_copy(model)).eval()
    if into == "bn":
        return folded
    if any(p.is_meta for p in folded.parameters()):
        raise FoldError("the model is on the meta device and has no weights to fold; load it on another one")
    before, (args, kwargs) = run(folded, example_input)
    example: Any = kwargs or args
    if into == "conv" and not keep_bn:
        merge_branches(folded)
    norms: dict[str, Any] = {}
    for name, norm in norm_layers(folded).items():
        if (type(norm) in CONVERTED or is_frozen(norm)) and norm.running_mean is not None:
            norms[name] = norm
    calls, unreached = _traced(folded, example) if into == "conv" else ({}, _Unreached())
    holders = Counter(id(p) for m in folded.modules() for p in m.parameters(recurse=False))
    left: dict[str, list[str]] = {}  # names of layers that stay, by the reason
    for name, norm in norms.items():
        if into == "affine":
            scale, shift = _scale_and_shift(name, norm)
            if keep_bn:
                _make_identity(norm, scale, shift)
            else:
                replace_norm(folded, norm, ChannelAffine(scale.to(_dtype(norm)), shift.to(_dtype(norm))))
        elif not calls[name].calls:
            left.setdefault("the example does not reach them", []).append(name)
        elif (producers := _foldable(folded, calls[name], holders)) is None:
            left.setdefault("they are not fed by convs alone", []).append(name)
        elif reason := unreached.against(calls[name], producers):
            left.setdefault(reason, []).append(name)
        else:
            _fold_into(name, norm, producers, keep_bn)
            if not keep_bn:
                replace_norm(folded, norm, None)
    for reason, names in left.items():
        _logger.warning(
            "%d of %d norm layers stay BatchNorm, since %s: %s", len(names), len(norms), reason, _few(names)
        )
    _check_same(folded, (args, kwargs), before)
    return folded


@dataclass
class _Unreached:
    """Modules that another call may put in the place of those that the example reaches."""

    readers: dict[str, list[str]] = field(default_factory=dict)  # norms, by the module that feeds them in training
    norms: dict[int, list[str]] = field(default_factory=dict)  # others, by their channels
    producers: dict[tuple[int, int], list[str]] = field(default_factory=dict)  # by channels and axes of the weight

    def against(self, call: NormCall, producers: Sequence[nn.Module]) -> str:
        """Why a norm must not be folded into its producers; empty if nothing speaks against it."""
        channels = [out_channels(cast(Any, producer)) for producer in producers]
        readers = [name for part in call.parts for name in self.readers.get(part.module, [])]
        readers += [name for count in {*channels, sum(channels)} for name in self.norms.get(count, [])]
        if readers:
            return f"the example does not reach {_few(readers)}, which may read the same convs"
        kinds = {(c, cast(Tensor, producer.weight).dim()) for c, producer in zip(channels, producers, strict=True)}
        feeding = [name for kind in kinds for name in self.producers.get(kind, [])]
        return f"the example does not reach {_few(feeding)}, which may feed them" if feeding else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _traced(model: nn.Module, example: Any) -> tuple[dict[str, NormCall], _Unreached]:
    """How the example reaches norms and producers, and those that it does not reach in training either."""
    watched = {
        name: m for name, m in model.named_modules()
        if not isinstance(m, torch.jit.ScriptModule) and (_feeds(m) or _norm_channels(m))
    }  # fmt: skip
    calls = trace_norms(model, watched, example)
    rest = {name: m for name, m in watched.items() if not calls[name].calls}
    in_training = calls
    if rest:
        try:  # which shows where norms of auxiliary heads belong
            in_training = trace_norms(model, rest, example, training=True)
        except ConversionError:
            in_training = calls
    unreached = _Unreached()
    for name, module in rest.items():
        if in_training[name].calls:
            for part in in_training[name].parts if _norm_channels(module) else ():
                unreached.readers.setdefault(part.module, []).append(name)
        elif _feeds(module):
            feeding: Any = module
            unreached.producers.setdefault((out_channels(feeding), feeding.weight.dim()), []).append(name)
        else:
            for channels in _norm_channels(module):
                unreached.norms.setdefault(channels, []).append(name)
    return calls, unreached


def _feeds(module: nn.Module) -> bool:
    """Whether the module is a conv or linear layer, whatever its forward pass does."""
    return is_producer(module) or own_forward(module) is not None


def _norm_channels(module: nn.Module) -> set[int]:
    """The channels that a normalisation of any kind may take; empty for other modules."""
    if isinstance(module, nn.GroupNorm):
        return {module.num_channels}
    if isinstance(shape := getattr(module, "normalized_shape", None), tuple):
        return {shape[0], shape[-1]}  # [C, H, W], or channels last
    if isinstance(module, _NormBase):
        return {module.num_features}
    mean = module._buffers.get("running_mean")
    return set() if mean is None else {mean.numel()}


def merge_branches(model: nn.Module) -> None:
    """Merges the branches of timm's blocks by its reparameterize_model, which may be called once more afterwards."""
    if not type(model).__module__.startswith("timm."):
        for child in model.children():
            merge_branches(child)  # methods of these names mean something else in other modules
        return
    reference = next(model.parameters(), None)
    if reference is None:
        return
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(reference.dtype)  # that of the modules that timm creates in the place of branches
        with reference.device:
            reparameterize_model(model, inplace=True)
    except Exception as error:  # whatever a block says to a part that somebody put into it
        raise FoldError(
            f"timm cannot merge the branches of {type(model).__name__} ({str(error) or type(error).__name__}); fold "
            'with keep_bn=True, which leaves them as they are, or into "bn"'
        ) from error
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        for method in ("reparameterize", "switch_to_deploy"):
            if hasattr(type(module), method):
                setattr(module, method, _merged_already)  # a second call fails in some of timm's blocks


def _merged_already() -> None:
    pass


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; what a model caches of a computation with gradients (LeViT's biases) is copied without them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in tree_leaves({k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_modules")}):
            if isinstance(t, Tensor) and not t.is_leaf:
                memo[id(t)] = t.detach().clone()
    return deepcopy(model, memo)


def _check_same(folded: nn.Module, arguments: Arguments, before: list[Any]) -> None:
    """Raises FoldError unless the folded model's outputs are those of before, as far as rounding lets them."""
    after = outputs_on(folded, arguments)
    error, tolerance = _difference(after, before)
    if not error <= tolerance:
        # some networks answer a change of the last bit, which a fold makes everywhere, with a large one
        noise, _ = _difference(outputs_on(folded, tree_map(_changed_in_the_last_bit, arguments)), after)
        if math.isinf(error):
            raise FoldError(
                "the folded copy's outputs have another size than the model's, so they cannot be compared; fold a part "
                'of the model whose outputs have one size, such as the backbone, or fold into "bn"'
            )
        if not error <= NOISE * noise:
            raise FoldError(
                f"the folded copy's outputs differ by {error:.1e} from the model's, so a weight is used in a way that "
                'the trace does not show; fold into "bn" instead'
            )


def _difference(got: list[Any], expected: list[Any]) -> tuple[float, float]:
    """The largest difference among the outputs, and what rounding explains in a deep network.

    It is relative, by norms, for numbers and the share of those that differ for integers; infinite for other shapes.
    """
    worst, eps = 0.0, 0.0
    if len(got) != len(expected):
        return math.inf, eps
    for g, e in zip(got, expected, strict=True):
        if not isinstance(e, Tensor) or not e.numel():
            continue
        if not isinstance(g, Tensor) or g.shape != e.shape:
            return math.inf, eps
        real = e.is_floating_point() or e.is_complex()
        worst = max(worst, relative_difference(g, e) if real else float((g != e).double().mean()))
        eps = max(eps, torch.finfo(e.dtype if real else torch.float32).eps)
    return worst, eps**0.5


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in double precision; inf and NaN, as in masks, differ from all but themselves."""
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.to(dtype), expected.to(dtype)
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = torch.where(same, torch.zeros_like(got), got - expected).norm()
    size = expected[expected.isfinite()].norm().clamp_min(1e-12)
    return float((error / size).nan_to_num(nan=1.0, posinf=1.0))


def _changed_in_the_last_bit(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    sign = torch.ones_like(value)
    sign.view(-1)[::2] = -1
    return value * (1 + sign * torch.finfo(value.dtype).eps)


def _foldable(model: nn.Module, call: NormCall, holders: Counter[int]) -> list[nn.Module] | None:
    """The modules that a norm layer can be folded into, one behind the other; None where there are none."""
    if not call.parts or not call.calls == call.producer_calls == call.consumers == 1:
        return None
    producers = [model.get_submodule(part.module) for part in call.parts]
    for part, producer in zip(call.parts, producers, strict=True):
        if not (
            is_producer(producer)
            and applies_stored_weight(producer)
            and part.channels == out_channels(producer)
            and not (is_transposed(producer) and producer.groups > 1)
            and all(holders[id(p)] == 1 for p in producer.parameters())
        ):
            return None
    return producers


def _dtype(norm: Any) -> torch.dtype:
    dtype: torch.dtype = norm.running_mean.dtype
    return dtype


def _eps(norm: Any) -> float:
    return frozen_eps(norm) if is_frozen(norm) else float(norm.eps)


def _double(norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, var, γ and β in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return mean, var, gamma, beta


def _scale_and_shift(name: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, var, gamma, beta = _double(norm)
    scale = gamma / torch.sqrt(var + _eps(norm))
    return _finite(name, scale), _finite(name, beta - mean * scale)


def _finite(name: str, value: Tensor) -> Tensor:
    if not torch.isfinite(value).all():
        raise FoldError(
            f"folding {name!r} would give values that are not finite; its running statistics or weights are damaged, "
            "so recalibrate or train again before folding"
        )
    return value


def _fold_into(name: str, norm: nn.Module, producers: Sequence[nn.Module], keep_bn: bool) -> None:
    """Folds the norm into its producers, whose channels follow each other.

    With `keep_bn` an identity stays that adds what has no place in a producer, else these get a bias.
    """
    statistics = torch.stack(_double(norm))
    shift = torch.zeros_like(statistics[0])
    first = 0
    for producer in producers:
        weight: Any = producer.weight
        channels = slice(first, first + out_channels(cast(Any, producer)))
        first = channels.stop
        new_weight, new_bias = _fused(producer, statistics[:, channels], _eps(norm))
        weight.copy_(_finite(name, new_weight.to(weight.dtype)))
        new_bias = _finite(name, new_bias.detach().to(weight.dtype))
        if producer.bias is not None:
            cast(Tensor, producer.bias).copy_(new_bias)
        elif keep_bn:
            shift[channels] = new_bias.double()
        else:
            producer.bias = nn.Parameter(new_bias)
    if keep_bn:
        _make_identity(norm, torch.ones_like(shift), shift)


def _fused(producer: nn.Module, statistics: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64 with mean, var, γ and β [4, C] of a norm layer folded in."""
    weight: Any = producer.weight
    bias: Any = producer.bias
    mean, var, gamma, beta = statistics
    args = (weight.double(), None if bias is None else bias.double(), mean, var, eps, gamma, beta)
    if is_linear(producer):
        return fuse_linear_bn_weights(*args)
    return fuse_conv_bn_weights(*args, transpose=is_transposed(producer))


def _make_identity(norm: Any, scale: Tensor, shift: Tensor) -> None:
    """Makes the BatchNorm compute scale · x + shift, with mean 0 and var 1 - eps where it has γ and β."""
    if norm.weight is None:
        norm.running_var.copy_(scale**-2 - norm.eps)
    else:
        norm.running_var.fill_(1 - _eps(norm))
        norm.weight.copy_(scale)
    if norm.bias is None:
        norm.running_mean.copy_(-shift / scale)
    else:
        norm.running_mean.zero_()
        norm.bias.copy_(shift)


def replace_norm(model: nn.Module, norm: nn.Module, by: nn.Module | None) -> None:
    """Puts `by`, or nothing, in the place of the norm under each of its names; drop and act stay."""
    parts = [] if by is None else [by]
    children = [norm._modules.get(name) for name in ("drop", "act")]
    parts += [m for m in children if m is not None and not isinstance(m, nn.Identity)]
    new = nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is norm:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.eval())
