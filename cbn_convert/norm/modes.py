"""Training modes, kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
