"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..functional import LEAST_AXIS, LEAST_PART, LEAST_VARIANCE, NO_SQUARE, TINY, Affine, OptTensor, statistics_dtype
from .direct import Direct, fit, has_memory, is_dense
from .formulas import PatchAxis

if TYPE_CHECKING:
    from ..carried import Carried
    from ..distributed import JoinedMoments
    from .direct import Both
    from .formulas import Share

_ONE = PatchAxis(size=1, memory=0, kernel=1, stride=1, padding=0, dilation=1, first=0, step=1, positions=1)
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 13  # of what the functions take, as in passes.cpp
# addresses, sizes and numbers, as they lie side by side
_ARGUMENTS = {
    "statistics": struct.Struct("3Q4q").pack,
    "scale": struct.Struct("3Q4q").pack,
    "patch_moments": struct.Struct("5Q25q").pack,
    "pool": struct.Struct("4Q2qdq").pack,
    "join": struct.Struct("17Q4q7dq").pack,
    "fold": struct.Struct("12Q4q2dq").pack,
    "folded_gradient": struct.Struct("10Q4q2dq").pack,
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
    for name in _ARGUMENTS:
        for dtype, suffix in _DTYPES.items():
            function = getattr(library, f"cbn_{name}_{suffix}")
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int if name in ("join", "pool") else None
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
        _call("statistics", xs, (xs, mean, var), n, c, positions)
        return mean, var

    def scale(self, x: Tensor, scale: Tensor, shift: Tensor) -> None:
        """See `Kernels`."""
        last = x.movedim(1, -1)  # as the channels of channels_last lie
        first = x.is_contiguous()
        if x.dtype != scale.dtype or not (first or last.is_contiguous()) or not (is_dense(scale) and is_dense(shift)):
            super().scale(x, scale, shift)
            return
        channels = x.shape[1]
        outer = x.shape[0] if first else x.numel() // max(1, channels)
        inner = x.numel() // max(1, outer * channels)
        _call("scale", x, (x, scale, shift), outer, channels, inner)
        increment_version(x)

    def patch_moments(
        self, y: Tensor, axes: Sequence[PatchAxis], probes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Kernels`; of convs with one axis or two."""
        if y.dtype not in _DTYPES or len(axes) > 2 or not (is_dense(probes) and probes.dtype == y.dtype):
            return None
        groups, count, width = probes.shape
        both, along = (_ONE, *axes)[-2:], torch.empty_like(probes)
        mean, var = y.new_empty(2, groups, width).unbind()
        sizes = (*y.shape[:2], *y.stride()[:2], groups, count)
        _call("patch_moments", y, (y, mean, var, probes, along), *sizes, *both[0], *both[1])
        return mean, var, along

    def pool(self, state: Carried, found: JoinedMoments, share: Share) -> tuple[Carried, Tensor | bool]:
        """See `Kernels`."""
        table, mean, var = state.table, found.mean, found.var
        if isinstance(share, Tensor) or not all(is_dense(t) and t.dtype == table.dtype for t in (table, mean, var)):
            return super().pool(state, found, share)
        out = torch.empty_like(table)
        finite = _call("pool", table, (table, mean, var, out), *table.shape, share)
        return state._replace(table=out), bool(finite)

    def join(
        self, state: Carried, theta: Tensor, bias: OptTensor, found: JoinedMoments, shares: tuple[Share, Share]
    ) -> tuple[Carried, Tensor | bool]:
        """See `Kernels`."""
        (table, *known), (mean, var, _, looked), (share, of_patches) = state, found, shares
        assert looked is not None
        if isinstance(share, Tensor) or isinstance(of_patches, Tensor) or not fit(state, theta, bias, mean, var):
            return super().join(state, theta, bias, found, shares)
        channels, width, rank, per_group = sizes = _sizes(state, theta)
        flat, deep = (channels // per_group, width), (channels // per_group, rank, width)
        for t, shape in zip((*known, *looked), (flat, flat, deep, flat, flat, deep, deep), strict=True):
            if t is None or t.shape != shape or t.dtype != theta.dtype or not is_dense(t):
                return super().join(state, theta, bias, found, shares)
        out, (patch_mean, patch_rest) = theta.new_empty(5, channels), theta.new_empty(2, *flat).unbind()
        axes, scratch = theta.new_empty(2, *deep).unbind()
        limits = (LEAST_VARIANCE, TINY, LEAST_AXIS, LEAST_PART, NO_SQUARE)
        tensors = (theta, bias, *known, table, mean, var, *looked, out, patch_mean, patch_rest, axes, scratch)
        finite = _call("join", theta, tensors, *sizes, share, of_patches, *limits)
        return type(state)(out, patch_mean, patch_rest, axes), bool(finite)

    def write_fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor, running: Both | None
    ) -> Tensor:
        """See `Direct`."""
        out = theta.new_empty(7, theta.shape[0])
        table, *patches = state
        gamma, beta, eps = affine
        running_mean, running_var = running or (None, None)
        tensors = (theta, bias, *patches, table, gamma, beta, out, rows, running_mean, running_var)
        _call("fold", theta, tensors, *_sizes(state, theta), eps, NO_SQUARE)
        return out

    def write_gradient(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> Tensor:
        """See `Direct`."""
        g_gamma = theta.new_empty(theta.shape[0])
        table, *patches = state
        tensors = (theta, bias, *patches, table, affine.gamma, g, g_shift, g_gamma)
        _call("folded_gradient", theta, tensors, *_sizes(state, theta), affine.eps, NO_SQUARE)
        return g_gamma


def _call(name: str, like: Tensor, tensors: tuple[OptTensor, ...], *numbers: float) -> int | None:
    """A function of the library, in the dtype of a tensor."""
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    result: int | None = _functions[name, like.dtype](_ARGUMENTS[name](*addresses, *numbers, torch.get_num_threads()))
    return result


def _sizes(state: Carried, theta: Tensor) -> tuple[int, int, int, int]:
    """C, F, the number of axes and how many channels share their patches."""
    channels, axes = theta.shape[0], state.patch_axes
    rank, groups = (0, 1) if axes is None else (axes.shape[1], axes.shape[0])
    return channels, theta.numel() // channels, rank, channels // groups
