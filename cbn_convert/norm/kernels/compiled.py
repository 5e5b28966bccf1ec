"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional import LEAST_VARIANCE, NO_SQUARE, TINY, Affine, OptTensor, statistics_dtype
from .direct import Direct, fit, has_memory, is_dense
from .plain import PatchAxis

if TYPE_CHECKING:
    from ..carried import Carried
    from ..distributed import JoinedMoments
    from .direct import Both
    from .plain import Share

_ONE = PatchAxis(size=1, memory=0, kernel=1, stride=1, padding=0, dilation=1, first=0, step=1, count=1)
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 7  # of the signatures, as in passes.cpp
_p, _n, _d, _i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_SIGNATURES = {
    "patch_moments": [_p] * 4 + [_i],
    "join": [_p] * 12 + [_n] * 3 + [_d] * 5 + [_i],
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
            function.argtypes, function.restype = arguments, _i if name == "join" else None
            functions[name, dtype] = function
    return functions


_functions = _load()


class Compiled(Direct):
    """Contiguous tensors on the CPU, in float32 and float64."""

    @staticmethod
    def suits(x: Tensor, in_any_order: bool = False) -> bool:
        """Whether the library was built and x is laid out as it needs it."""
        return bool(_functions) and x.is_cpu and (has_memory(x) if in_any_order else is_dense(x)) and x.dim() > 1

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        xs = x.to(statistics_dtype(x))
        n, c = xs.shape[:2]
        mean, var = xs.new_empty(2, c).unbind()
        positions = xs.numel() // (n * c) if n else 0
        _functions["statistics", xs.dtype](*_addresses(xs, mean, var), n, c, positions, torch.get_num_threads())
        return mean, var

    def patch_moments(self, y: Tensor, axes: Sequence[PatchAxis]) -> tuple[Tensor, Tensor] | None:
        """See `Kernels`; of convs with one axis or two."""
        if y.dtype not in _DTYPES or len(axes) > 2:
            return None
        both = (_ONE, *axes)[-2:]
        layout = (_n * (4 + 2 * len(_ONE)))(*y.shape[:2], *y.stride()[:2], *both[0], *both[1])
        mean, var = y.new_empty(2, y.shape[1] * both[0].kernel * both[1].kernel).unbind()
        threads = torch.get_num_threads()
        _functions["patch_moments", y.dtype](y.data_ptr(), layout, mean.data_ptr(), var.data_ptr(), threads)
        return mean, var

    def join(
        self, state: Carried, theta: Tensor, bias: OptTensor, found: JoinedMoments, shares: tuple[Share, Share]
    ) -> tuple[Carried, Tensor | bool]:
        """See `Kernels`."""
        (table, *patches), (mean, var, _, *of_patches) = state, found
        rows = (*patches, *of_patches)
        if (
            not all(isinstance(share, float) for share in shares)
            or not fit(state, theta, bias, mean, var)
            or not all(t is not None and is_dense(t) and t.dtype == theta.dtype for t in rows)
        ):
            return super().join(state, theta, bias, found, shares)
        out = theta.new_empty(5, len(theta))
        patch_mean, patch_var = theta.new_empty(2, *of_patches[0].shape).unbind()
        finite = _call(
            "join", state, theta, (*shares, LEAST_VARIANCE, TINY),
            bias, *patches, table, mean, var, *of_patches, out, patch_mean, patch_var,
        )  # fmt: skip
        return state._replace(table=out, patch_mean=patch_mean, patch_var=patch_var), bool(finite)

    def write_fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor, running: Both | None
    ) -> Tensor:
        """See `Direct`."""
        out = theta.new_empty(7, len(theta))
        table, patch_mean, patch_var = state
        _call(
            "fold", state, theta, (affine.eps,),
            bias, patch_mean, patch_var, table, *affine[:2], out, rows, *(running or (None, None)),
        )  # fmt: skip
        return out

    def write_gradient(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> Tensor:
        """See `Direct`."""
        g_gamma = theta.new_empty(len(theta))
        table, patch_mean, patch_var = state
        _call(
            "folded_gradient", state, theta, (affine.eps,),
            bias, patch_mean, patch_var, table, affine.gamma, g, g_shift, g_gamma,
        )  # fmt: skip
        return g_gamma


def _call(name: str, state: Carried, theta: Tensor, numbers: tuple[float, ...], *others: Tensor | None) -> int | None:
    """A function of the library, on θ [C, F] and what it takes beside."""
    (channels, width), groups = theta.shape, 1 if state.patch_mean is None else len(state.patch_mean)
    return _functions[name, theta.dtype](
        *_addresses(theta, *others), channels, width, channels // groups, *numbers, NO_SQUARE, torch.get_num_threads()
    )


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]
