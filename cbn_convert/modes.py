"""Training modes and tensors, kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def what_lasts_may_be_made() -> Iterator[None]:
    """Makes normal tensors under inference_mode too, for what training goes on with."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Gives every module below `module` its training mode back at the end."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        module.train(modes[0][1])  # for those that do something there
        for m, training in modes:
            m.training = training


@contextmanager
def tensors_kept(module: nn.Module) -> Iterator[None]:
    """Undoes what forward passes do to the parameters and buffers of `module` and those below it.

    Buffers that were replaced by other tensors, or registered meanwhile, are undone too.
    """
    values = [(t, t._version, t.clone()) for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]
    buffers = [(m, dict(m._buffers)) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    try:
        yield
    finally:
        for m, own in buffers:
            m._buffers.clear()
            m._buffers.update(own)
        with torch.no_grad():
            for t, version, value in values:
                # what is written by way of t.data is not counted
                if t._version != version or (_has_values(t) and not torch.equal(t, value)):
                    t.copy_(value)


def _has_values(t: Tensor) -> bool:
    """Whether a tensor can be compared, unlike one that only stands for another."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta and t.layout is torch.strided
