"""The passes over weights that a layer makes in every step, and the statistics of a look, for each device.

`Kernels` has the formulas as they stand, for any device and dtype; a subclass overrides what it does faster: `Compiled`
by the C++ of passes.cpp, on the CPU, `OnGpu` by Triton. `select` is the one place that chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .compiled import Compiled
from .formulas import Folded, Kernels, PatchAxis
from .gpu import OnGpu

__all__ = ["KERNELS", "Folded", "Kernels", "PatchAxis", "batch_statistics", "forced", "select"]

KERNELS: dict[str, Kernels] = {"plain": Kernels(), "compiled": Compiled(), "gpu": OnGpu()}
_forced: Kernels | None = None


def select(x: Tensor, in_any_order: bool = False) -> Kernels:
    """The kernels for a tensor, of activations or of weights [C, F]; `patch_moments` and `scale` take any order."""
    if _forced is not None:
        return _forced
    if torch._C._len_torch_dispatch_stack():
        return KERNELS["plain"]  # what is made under a mode may have no memory, as under FakeTensorMode
    return KERNELS["compiled" if Compiled.suits(x, in_any_order) else "gpu" if OnGpu.suits(x) else "plain"]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Makes `select` answer with the kernels of that name, for tests and benchmarks."""
    global _forced
    before, _forced = _forced, KERNELS[name]
    try:
        yield
    finally:
        _forced = before


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, ...], in float32 (float64 for float64 x)."""
    return select(x).statistics(x)
