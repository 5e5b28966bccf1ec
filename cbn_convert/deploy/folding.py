"""Folds normalization by running statistics into plain BatchNorm, a scale and shift, or the conv's weights."""

from __future__ import annotations

import logging
from collections import Counter
from copy import deepcopy
from typing import Any, Literal

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._pytree import tree_leaves

from ..conversion import NormCall, norm_layers, revert, run, trace_norms
from ..conversion.converting import CONVERTED
from ..errors import FoldError
from ..norm.producers import applies_stored_weight, is_transposed

FoldTarget = Literal["bn", "affine", "conv"]
FOLD_TARGETS: tuple[str, ...] = ("bn", "affine", "conv")

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

    into: "bn" gives plain BatchNorm with the running statistics, the same outputs to the bit. "affine" replaces each
    layer by `ChannelAffine`. "conv" multiplies it into the weight and bias of the conv or linear layer that feeds it.
    A layer whose input is not the output of one such module, or is also read elsewhere, stays BatchNorm, as does one
    behind a standardised or parametrised weight or a grouped transposed conv; their names are logged. BatchNormAct2d
    keeps its drop and act. The new weights are computed in float64.

    keep_bn: with "affine" and "conv", leave BatchNorm modules as identities (mean 0, var 1 - eps, γ 1, β what has no
    other place), so that state_dict keys are those of the original architecture.

    Raises FoldError if a folded tensor would not be finite, if the copy's outputs on `example_input` (as in `convert`)
    are not the model's, or for another `into`; ConversionError if the model cannot run on it.
    """
    if into not in FOLD_TARGETS:
        raise FoldError(f"fold must be one of {', '.join(FOLD_TARGETS)}, got {into!r}")
    folded = revert(deepcopy(model)).eval()
    if into == "bn":
        return folded
    norms: dict[str, _BatchNorm] = {}
    for name, norm in norm_layers(folded).items():
        if isinstance(norm, _BatchNorm) and type(norm) in CONVERTED and norm.running_mean is not None:
            norms[name] = norm
    calls = trace_norms(folded, dict(norms), example_input) if into == "conv" else {}

    before = run(folded, example_input)

    holders = Counter(id(p) for m in folded.modules() for p in m.parameters(recurse=False))
    left = []
    for name, norm in norms.items():
        if into == "affine":
            scale, shift = _scale_and_shift(name, norm)
            if keep_bn:
                _make_identity(norm, scale, shift)
            else:
                _replace(folded, norm, ChannelAffine(scale.to(_dtype(norm)), shift.to(_dtype(norm))))
        elif (
            _foldable(calls[name])
            and (producer := folded.get_submodule(calls[name].producer or ""))
            and applies_stored_weight(producer)
            and not (is_transposed(producer) and producer.groups > 1)
            and all(holders[id(p)] == 1 for p in producer.parameters())
        ):
            _fold_into(name, norm, producer, keep_bn)
            if not keep_bn:
                _replace(folded, norm, None)
        else:
            left.append(name)
    if left:
        _logger.warning(
            "%d of %d norm layers stay BatchNorm, since they are not fed by one conv alone: %s%s",
            len(left), len(norms), ", ".join(left[:5]), ", ..." if len(left) > 5 else "",
        )  # fmt: skip
    _check_same(before, run(folded, example_input))
    return folded


def _check_same(before: Any, after: Any) -> None:
    for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if isinstance(old, Tensor) and old.is_floating_point():
            # what rounding explains, with room for deep networks; a wrong fold is off by the size of the output
            tolerance = torch.finfo(old.dtype).eps ** 0.5
            error = (new.double() - old.double()).norm() / old.double().norm().clamp_min(1e-12)
            if not error <= tolerance:
                raise FoldError(
                    f"the folded copy's outputs differ by {float(error):.1e} from the model's, so a weight is used in "
                    'a way that the trace does not show; fold into "bn" instead'
                )


def _foldable(call: NormCall) -> bool:
    return call.producer is not None and call.calls == call.producer_calls == call.consumers == 1


def _dtype(norm: _BatchNorm) -> torch.dtype:
    assert norm.running_mean is not None
    return norm.running_mean.dtype


def _double(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, var, γ and β in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    return mean, var, gamma, beta


def _scale_and_shift(name: str, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var, gamma, beta = _double(norm)
    scale = gamma / torch.sqrt(var + norm.eps)
    return _finite(name, scale), _finite(name, beta - mean * scale)


def _finite(name: str, value: Tensor) -> Tensor:
    if not torch.isfinite(value).all():
        raise FoldError(
            f"folding {name!r} would give values that are not finite; its running statistics or weights are damaged, "
            "so recalibrate or train again before folding"
        )
    return value


def _fold_into(name: str, norm: _BatchNorm, producer: nn.Module, keep_bn: bool) -> None:
    """Folds the norm into its producer; with `keep_bn` an identity stays, else the producer gets a bias."""
    mean, var, gamma, beta = _double(norm)
    weight: Any = producer.weight
    old_bias: Any = producer.bias
    args = (weight.double(), None if old_bias is None else old_bias.double(), mean, var, norm.eps, gamma, beta)
    new_weight: Tensor
    new_bias: Tensor
    if isinstance(producer, nn.Linear):
        new_weight, new_bias = fuse_linear_bn_weights(*args)
    else:
        new_weight, new_bias = fuse_conv_bn_weights(*args, transpose=is_transposed(producer))
    weight.copy_(_finite(name, new_weight.to(weight.dtype)))
    new_bias = _finite(name, new_bias.detach().to(weight.dtype))
    carried_by_conv = old_bias is not None or not keep_bn
    if old_bias is not None:
        old_bias.copy_(new_bias)
    elif not keep_bn:
        producer.bias = nn.Parameter(new_bias)
    if keep_bn:
        _make_identity(norm, torch.ones_like(mean), torch.zeros_like(mean) if carried_by_conv else new_bias.double())


def _make_identity(norm: _BatchNorm, scale: Tensor, shift: Tensor) -> None:
    """Makes the BatchNorm compute scale · x + shift, with mean 0 and var 1 - eps where it has γ and β."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.weight is None:
        norm.running_mean.copy_(-shift / scale)
        norm.running_var.copy_(scale**-2 - norm.eps)
        return
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.copy_(scale)
    norm.bias.copy_(shift)


def _replace(model: nn.Module, norm: _BatchNorm, by: nn.Module | None) -> None:
    """Puts `by`, or nothing, in the place of the norm under each of its names; drop and act stay."""
    parts = [] if by is None else [by]
    if isinstance(norm, BatchNormAct2d):
        parts += [m for m in (norm.drop, norm.act) if not isinstance(m, nn.Identity)]
    new = nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is norm:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.eval())
