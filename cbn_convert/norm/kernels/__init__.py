"""The passes over activations that a layer makes, and the per-channel work between them, for each device.

`select` is the one place that chooses. On the CPU: "compiled", the C++ of passes.cpp, where it was built and the layout
is NCHW, else "cpu", ATen's own BatchNorm passes. On CUDA: "triton" where Triton is installed, else "native", the
kernels of torch's SyncBatchNorm. "plain", for everything else, is the reference for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from ..functional import Affine, Compensation, Gradient, InputGradient, Moments, Running, WindowStatistics
from . import compiled, cpu, plain

_forced: Kernels | None = None


class Kernels(Protocol):
    """x and g [N, C, ...] are of any float dtype; what is per channel is in float32 (float64 for float64 x)."""

    ACTIVATIONS: frozenset[str]

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean and biased variance [C], and perhaps a tensor like x that `normalize` may overwrite."""
        ...

    def window(
        self,
        mean: Tensor,
        var: Tensor,
        past: Moments | None,
        newest_weight: float,
        theta: Tensor | None,
        bias: Tensor | None,
        compensation: Compensation,
        gradient: Gradient,
        running: Running | None,
    ) -> tuple[WindowStatistics, Tensor]:
        """`window_statistics`, `Running.update`, and whether mean and var are all finite."""
        ...

    def normalize(self, x: Tensor, affine: Affine, spare: Tensor | None) -> Tensor:
        """act((x - mean)·scale + shift) in x's dtype."""
        ...

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        affine: Affine,
        inv_std: Tensor,
        share: float | Tensor | None,
        total: Callable[[Tensor], Tensor] | None,
    ) -> InputGradient:
        """∂L/∂x = g'·scale + share·(2 ∂L/∂S (x - mean) + ∂L/∂M) and what it is made of, g' being g through act.

        No gradient for x where share is None; `total` sums ∂L/∂M and ∂L/∂S, for x alone, over the ranks.
        """
        ...

    def gradient_through_the_past(
        self, window: WindowStatistics, grad_mean: Tensor, grad_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`functional.gradient_through_the_past`."""
        ...


def select(x: Tensor) -> Kernels:
    """The kernels for a tensor."""
    if _forced is not None:
        return _forced
    if x.is_cpu:
        return cast(Kernels, compiled if compiled.suits(x) else cpu)
    if x.is_cuda and x.dtype != torch.float64:
        return named("triton" if _triton_runs(x.get_device()) else "native")
    return cast(Kernels, plain)


@lru_cache
def _triton_runs(device: int) -> bool:
    """Whether Triton is installed and can compile for this GPU, which takes a C compiler; warns if it cannot."""
    if find_spec("triton") is None:
        return False
    try:
        named("triton").statistics(torch.zeros(1, 1, 1, 1, device=f"cuda:{device}"))
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(
            f"Triton does not run on cuda:{device} ({type(error).__name__}: {error}); CBN uses torch's kernels there",
            stacklevel=2,
        )
        return False
    return True


def named(name: str) -> Kernels:
    """The kernels called "compiled", "cpu", "triton", "native" or "plain"."""
    return cast(Kernels, import_module(".fused" if name == "triton" else f".{name}", __name__))


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Makes `select` answer with the kernels of that name, for tests and benchmarks."""
    global _forced
    before, _forced = _forced, named(name)
    try:
        yield
    finally:
        _forced = before


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x [N, C, ...], in float32 (float64 for float64 x)."""
    return select(x).statistics(x)[:2]
