"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import NO_SQUARE, Affine, OptTensor, statistics_dtype
from .plain import Folded, Kernels

if TYPE_CHECKING:
    from ..carried import Carried
    from .plain import Running

_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 6  # of the signatures, as in passes.cpp
_p, _n, _d, _i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES = {
    "statistics": [_p] * 3 + [_n] * 3 + [_i],
    "fold": [_p] * 11 + [_n] * 3 + [_d] * 2 + [_i],
    "folded_gradient": [_p] * 9 + [_n] * 3 + [_d] * 2 + [_i],
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
        return bool(_functions) and _is_dense(x) and x.dim() > 1

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        xs = x.to(statistics_dtype(x))
        n, c = xs.shape[:2]
        mean, var = xs.new_empty(2, c).unbind()
        positions = xs.numel() // (n * c) if n else 0
        _functions["statistics", xs.dtype](*_addresses(xs, mean, var), n, c, positions, torch.get_num_threads())
        return mean, var

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> Tensor:
        """See `Kernels`."""
        learns = theta.requires_grad or (bias is not None and bias.requires_grad)
        if (learns and torch.is_grad_enabled()) or not _fit(state, theta, bias):
            return super().move(state, theta, bias)
        return self._fold(state, theta, bias, Affine(None, None, 1.0))[:5]

    def fold(self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, running: Running = None) -> Folded:
        """See `Kernels`."""
        if not _fit(state, theta, bias, *affine[:2]):
            return super().fold(state, theta, bias, affine, running)
        rows, written = torch.empty_like(theta), None
        if running is not None and _fit(state, theta, running.mean, running.var):
            written = running.begin_write()
        out = self._fold(state, theta, bias, affine, rows, written)
        if running is not None and written is None:
            running.write(out[0], out[1])
        at = state if state.patch_mean is None else state._replace(table=out[:5])
        return Folded(at, out[5], out[6], rows)

    @staticmethod
    def _fold(
        state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor = None, running: Any = None
    ) -> Tensor:
        (channels, width), (table, patch_mean, patch_var) = theta.shape, state
        out = theta.new_empty(7, channels)
        groups = 1 if patch_mean is None else len(patch_mean)
        _functions["fold", theta.dtype](
            *_addresses(theta, bias, patch_mean, patch_var, table, *affine[:2], out, rows, *(running or (None, None))),
            channels, width, channels // groups, affine.eps, NO_SQUARE, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def folded_gradient(
        self, state: Carried, theta: Tensor, bias: Tensor | None, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if not (g.is_contiguous() and g.dtype == theta.dtype and _fit(state, theta, bias, affine.gamma, g_shift)):
            return super().folded_gradient(state, theta, bias, affine, g, g_shift)
        (channels, width), (table, patch_mean, patch_var) = theta.shape, state
        g_gamma = theta.new_empty(channels)
        groups = 1 if patch_mean is None else len(patch_mean)
        _functions["folded_gradient", theta.dtype](
            *_addresses(theta, bias, patch_mean, patch_var, table, affine.gamma, g, g_shift, g_gamma),
            channels, width, channels // groups, affine.eps, NO_SQUARE, torch.get_num_threads(),
        )  # fmt: skip
        return g, g_gamma


def _is_dense(t: Tensor) -> bool:
    """Whether there is memory that holds what the shape says; none of a FakeTensor's or a DTensor's own does."""
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.is_contiguous()


def _fit(state: Carried, theta: Tensor, *vectors: Tensor | None) -> bool:
    """Whether all are of θ [C, F]'s size and dtype, and dense; the library cannot tell."""
    (channels, width), (table, patch_mean, _) = theta.shape, state
    if patch_mean is not None and patch_mean.shape[1] != width:
        return False
    for t in (table, *vectors):
        if t is not None and not (t.shape[-1] == channels and t.dtype == theta.dtype and _is_dense(t)):
            return False
    return True


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]
