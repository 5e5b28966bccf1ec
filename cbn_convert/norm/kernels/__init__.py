"""The passes over activations that a layer makes where it does not train folded, and those over weights where it does.

`select` is the one place that chooses. On the CPU: "compiled", the C++ of passes.cpp, where it was built and the layout
is NCHW, else "cpu", ATen's own BatchNorm passes. On CUDA: "triton" where Triton is installed.
"plain", for everything else, is the reference for all.
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

from ..functional import Affine, FoldGradient, InputGradient
from . import compiled, cpu, plain

_forced: Kernels | None = None


class Kernels(Protocol):
    """x and g [N, C, ...] are of any float dtype; what is per channel is in float32 (float64 for float64 x)."""

    ACTIVATIONS: frozenset[str]

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C]."""
        ...

    def normalize(self, x: Tensor, affine: Affine) -> Tensor:
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

    def respond(self, theta: Tensor, patch_mean: Tensor, patch_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """θ·p̄, Σ d θ² and θ·θ [C] for weights [C, F], and p̄ and d [G, F]."""
        ...

    def folded_gradient(self, theta: Tensor, g: Tensor, fold: FoldGradient) -> tuple[Tensor, Tensor]:
        """t = θ·g + away·shift [C] and ∂L/∂θ [C, F], from g, the gradient of the rows s θ, which may be overwritten.

        ∂L/∂θ = s g + g_M (p̄ + along_length θ) + g_S along_spread d θ, with g_M = -s·shift and g_S = -½ s t / (S + eps).
        """
        ...


def select(x: Tensor) -> Kernels:
    """The kernels for a tensor, of activations or of weights [C, F]."""
    if _forced is not None:
        return _forced
    if x.is_cpu:
        return cast(Kernels, compiled if compiled.suits(x) else cpu)
    if x.is_cuda and x.dtype != torch.float64:
        return named("triton" if _triton_runs(x.get_device()) else "plain")
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
            f"Triton does not run on cuda:{device} ({type(error).__name__}: {error}); CBN uses plain operations there",
            stacklevel=2,
        )
        return False
    return True


def named(name: str) -> Kernels:
    """The kernels called "compiled", "cpu", "triton" or "plain"."""
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
    return select(x).statistics(x)
