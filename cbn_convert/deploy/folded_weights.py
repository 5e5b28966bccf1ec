"""The weights of a folded model in a new one of the same architecture, which has norm layers where that has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..conversion import norm_layers, revert
from ..errors import FoldError
from ..norm.producers import is_producer
from .folding import ChannelAffine, merge_branches, replace_norm


@torch.no_grad()
def load_folded(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Loads what `fold` has made of a model of this architecture, in place; returns the model, in eval mode.

    Norm layers that the weights have no statistics for go, and convs and linear layers get a bias where the weights
    have one, so that the model is what `fold` returned, to the bit:

        safetensors.torch.save_file(cbn.fold(model).state_dict(), "folded.safetensors")
        model = cbn.load_folded(build(), safetensors.torch.load_file("folded.safetensors"))

    Weights of all three forms load, with and without `keep_bn`; those with BatchNorm load without this function, too.
    Raises FoldError if a tensor is absent, too many, or of another shape; the model is of no use then.
    """
    revert(model).eval()
    norms = norm_layers(model)
    of_norms = {f"{name}.{key}" for name, norm in norms.items() for key in norm.state_dict()}
    if not model.state_dict().keys() - of_norms <= state_dict.keys():
        merge_branches(model)  # weights are gone, not just norms
        norms = norm_layers(model)
    for name, norm in norms.items():
        mean = norm._buffers.get("running_mean")
        if mean is None or f"{name}.running_mean" in state_dict:
            continue
        # in front of an activation that the norm has brought along, the scale and shift is the first of a sequence
        affine = any(f"{name}.{at}weight" in state_dict for at in ("", "0."))
        replace_norm(model, norm, ChannelAffine(torch.ones_like(mean), torch.zeros_like(mean)) if affine else None)
    for name, module in model.named_modules():
        bias = state_dict.get(f"{name}.bias")
        if bias is not None and is_producer(module) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(bias, dtype=module.weight.dtype, device=module.weight.device))
    _load(model, state_dict)
    return model


def _load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads all of it. Tied weights need to be there under one of their names only."""
    own = cast(dict[str, Tensor], model.state_dict(keep_vars=True))
    there = {id(t) for name, t in own.items() if name in state_dict}
    faults = [f"{name} is absent" for name, t in own.items() if name not in state_dict and id(t) not in there]
    faults += [f"{name} is none of its tensors" for name in state_dict if name not in own]
    faults += [
        f"{name} has the shape {tuple(state_dict[name].shape)} in place of {tuple(t.shape)}"
        for name, t in own.items() if name in state_dict and state_dict[name].shape != t.shape
    ]  # fmt: skip
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise FoldError(
            f"these are no weights of a folded {type(model).__name__}: {faults[0]}{more}; build the model with the "
            "arguments of the one that was folded"
        )
    model.load_state_dict(state_dict, strict=False)
