"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional import NO_SQUARE, FoldGradient, statistics_dtype
from .plain import Kernels

if TYPE_CHECKING:
    from ..carried import Carried

_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 5  # of the signatures, as in passes.cpp
_p, _n, _i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "statistics": [_p] * 3 + [_n] * 3 + [_i],
    "move": [_p] * 10 + [_n] * 3 + [ctypes.c_double, _i],
    "folded_gradient": [_p] * 11 + [_n] * 3 + [_i],
}


def _load() -> dict[tuple[str, torch.dtype], Callable[..., int]]:
    """The functions of the library by name and dtype; none where it was not built or does not run here."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    if on_x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return {}  # built for AVX2
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name(f"_passes{sysconfig.get_config_var('EXT_SUFFIX')}")))
        if library.cbn_version() != _VERSION:
            raise AttributeError
    except (OSError, AttributeError):  # not built; for another machine; from another version of passes.cpp
        return {}
    functions = {}
    for name, arguments in _SIGNATURES.items():
        for dtype, suffix in _DTYPES.items():
            function = getattr(library, f"cbn_{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            functions[name, dtype] = function
    return functions


_functions = _load()


class Compiled(Kernels):
    """Contiguous tensors on the CPU, in float32 and float64."""

    @staticmethod
    def suits(x: Tensor) -> bool:
        """Whether the library was built and x is laid out as it needs it."""
        # of tensors that only stand for one, as under FakeTensorMode, there is no memory to look at
        real = type(x) in (Tensor, nn.Parameter) and x.is_cpu
        return bool(_functions) and real and x.is_contiguous() and x.dim() > 1

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        xs = x.to(statistics_dtype(x))
        n, c = xs.shape[:2]
        mean, var = xs.new_empty(2, c).unbind()
        positions = xs.numel() // (n * c) if n else 0
        _functions["statistics", xs.dtype](*map(_at, (xs, mean, var)), n, c, positions, torch.get_num_threads())
        return mean, var

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """See `Kernels`."""
        if theta.requires_grad and torch.is_grad_enabled():
            return super().move(state, theta, bias)
        mean, var, patch_mean, patch_var, anchor, spread, square = (
            None if t is None else t.contiguous() for t in state
        )
        (channels, width), out = theta.shape, theta.new_empty(5, len(theta))
        groups = 1 if patch_mean is None else len(patch_mean)
        given = (theta, None if bias is None else bias.contiguous(), patch_mean, patch_var, mean, var, anchor, spread)
        _functions["move", theta.dtype](
            *map(_at, (*given, square, out)), channels, width, channels // groups, NO_SQUARE, torch.get_num_threads()
        )
        return out.unbind()

    def folded_gradient(self, theta: Tensor, g: Tensor, fold: FoldGradient) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if not g.is_contiguous() or g.dtype != theta.dtype:
            return super().folded_gradient(theta, g, fold)
        (channels, width), t = theta.shape, theta.new_empty(len(theta))
        *vectors, patch_mean, patch_var = (None if v is None else v.contiguous() for v in fold)
        groups = 1 if patch_mean is None else len(patch_mean)
        _functions["folded_gradient", theta.dtype](
            *map(_at, (theta, g, patch_mean, patch_var, *vectors, t)), channels, width, channels // groups,
            torch.get_num_threads(),
        )  # fmt: skip
        return t, g


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
