"""The alternatives that CBN is compared with, put into a model in place of its BatchNorm layers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion import convert, norm_layers, revert
from ..errors import ConversionError
from ..norm import CONVERTED, CrossIterationMixin, Window, drop_and_act
from ..norm.functional import statistics_dtype
from ..norm.kernels import batch_statistics

# Ioffe 2017, section 4.1: the limits that training ends with, and the rate of the moving averages, which r and d need
# to be steadier than BatchNorm's
R_MAX, D_MAX, RATE = 3.0, 5.0, 0.01


class _Alternative(_BatchNorm):
    def normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = (
            self.normalize(x)
            if self.training
            else F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        )
        return drop_and_act(self, y)


class _Frozen(_Alternative):
    """Normalises by the running statistics in training too; γ and β go on learning."""

    def normalize(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _BatchRenorm(_Alternative):
    """Batch Renormalization (Ioffe 2017, algorithm 1), with the limits that training ends with from the start.

    The running statistics are pretrained here, so there is nothing to wait for.
    """

    def normalize(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            mean, var = batch_statistics(x.to(statistics_dtype(x)))
            running_std = torch.sqrt(self.running_var + self.eps)
            r = (torch.sqrt(var + self.eps) / running_std).clamp(1 / R_MAX, R_MAX)
            d = ((mean - self.running_mean) / running_std).clamp(-D_MAX, D_MAX)
            self.num_batches_tracked.add_(1)
        gamma = torch.ones_like(r) if self.weight is None else self.weight
        beta = torch.zeros_like(d) if self.bias is None else self.bias
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else RATE
        return F.batch_norm(
            x, self.running_mean, self.running_var, gamma * r, beta + gamma * d, True, momentum, self.eps
        )


def _subclasses(mixin: type[_Alternative]) -> dict[type[Any], type[Any]]:
    return {plain: type(f"{mixin.__name__[1:]}{plain.__name__}", (mixin, plain), {}) for plain in CONVERTED}


_CLASSES = {"frozen": _subclasses(_Frozen), "brn": _subclasses(_BatchRenorm)}


def apply_norm(model: nn.Module, norm: str, frozen: Collection[str] = (), **window: Any) -> None:
    """Puts `norm`, one of NORMS, in the place of the model's BatchNorm layers; "bn" leaves them as they are.

    Those named in `frozen` keep their running statistics. `window` goes to `convert` for "cbn". The state_dict keys
    stay, except with "gn". Raises ConversionError for a model without BatchNorm.
    """
    layers = norm_layers(model)
    if not layers:
        raise ConversionError(
            f"{type(model).__name__} has no BatchNorm layer, so there is nothing to replace; "
            "choose a model with BatchNorm"
        )
    if norm in ("cbn", "tune") and (len(frozen) == 0 or any(name not in frozen for name in layers)):
        own = {**window, "window": Window.TUNE} if norm == "tune" else window
        convert(model, exclude=lambda name, module: name in frozen, **own)
    for name, layer in layers.items():
        kind = "frozen" if name in frozen else norm
        if type(layer) not in CONVERTED:
            continue
        if kind == "gn":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _group_norm(layer))
        elif kind in _CLASSES:
            layer.__class__ = _CLASSES[kind][type(layer)]


def restore_norm(model: nn.Module) -> None:
    """Undoes `apply_norm` in place, except for GroupNorm: plain BatchNorm with the running statistics."""
    if any(isinstance(m, CrossIterationMixin) for m in model.modules()):
        revert(model)
    for module in model.modules():
        if isinstance(module, _Alternative):
            module.__class__ = type(module).__bases__[1]


def _group_norm(norm: Any) -> nn.Module:
    """GroupNorm of 32 groups, or as many as divide the channels, with the BatchNorm's γ, β, drop and act."""
    groups = math.gcd(32, norm.num_features)
    group_norm = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
    group_norm.load_state_dict({k: v for k, v in norm.state_dict().items() if k in ("weight", "bias")})
    if hasattr(norm, "act"):
        return nn.Sequential(group_norm, norm.drop, norm.act)
    return group_norm
