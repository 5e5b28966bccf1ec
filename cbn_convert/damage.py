"""Values that no training leaves behind: weights and statistics that are not finite, variances below zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def damaged_value(model: nn.Module) -> str | None:
    """What is wrong with the first weight or running statistic of the model that is damaged, with its name.

    None if there is none, or if they have no values, as on the meta device. Other buffers may hold anything: some
    architectures have those that nobody has written to yet.
    """
    for prefix, module in model.named_modules():
        fault = _first_fault(module, dict(module.named_parameters(recurse=False))) or damaged_statistic(module)
        if fault is not None:
            return f"{prefix}.{fault}" if prefix else fault
    return None


def damaged_statistic(module: nn.Module) -> str | None:
    """The same for the running statistics of one layer."""
    buffers = dict(module.named_buffers(recurse=False))  # also of scripted modules, whose _buffers are no dict
    return _first_fault(module, {name: buffers.get(name) for name in _STATISTICS})


def _first_fault(module: nn.Module, tensors: dict[str, Tensor | None]) -> str | None:
    for name, tensor in tensors.items():
        if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()) or not _has_values(tensor):
            continue
        value = tensor.detach()
        finite = torch.isfinite(value)
        if not finite.all():
            return f"{name} holds {int((~finite).sum())} of {value.numel()} values that are not finite"
        if name == "running_var" and (value < 0).any():
            return f"{name} holds {int((value < 0).sum())} of {value.numel()} values below zero, which no variance is"
    return None


def _has_values(tensor: Tensor) -> bool:
    """Not so on the meta device, or for the tensors that tracers put in the place of others."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return plain and not tensor.is_meta
