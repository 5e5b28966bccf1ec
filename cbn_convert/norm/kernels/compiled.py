"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..functional import Affine, FoldGradient, InputGradient, statistics_dtype
from . import plain

_ACTS = {"": 0, "relu": 1, "relu6": 2}
ACTIVATIONS = frozenset(_ACTS) - {""}
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 2  # of the signatures, as in passes.cpp
_p, _n, _i, _d = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES = {
    "statistics": [_p] * 3 + [_n] * 3 + [_i],
    "normalize": [_p] * 5 + [_n] * 3 + [_i] * 2,
    "backward": [_p] * 8 + [_d] + [_n] * 3 + [_i] * 2,
    "input_gradient": [_p] * 8 + [_n] * 3 + [_i] * 2,
    "respond": [_p] * 6 + [_n] * 3 + [_i],
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


def suits(x: Tensor) -> bool:
    """Whether the library was built and x is laid out as it needs it."""
    # of tensors that only stand for one, as under FakeTensorMode, there is no memory to look at
    return bool(_functions) and type(x) in (Tensor, nn.Parameter) and x.is_contiguous() and x.dim() > 1


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    xs = _dense(x, statistics_dtype(x))
    both = xs.new_empty(2, xs.shape[1])
    mean, var = both.unbind()
    _functions["statistics", xs.dtype](_at(xs), _at(mean), _at(var), *_sizes(xs), torch.get_num_threads())
    return mean, var


def normalize(x: Tensor, affine: Affine) -> Tensor:
    """See `Kernels`."""
    xs = _dense(x, affine.mean.dtype)
    y = torch.empty_like(xs)
    _functions["normalize", xs.dtype](
        _at(xs), _at(y), *map(_at, affine[:3]), *_sizes(xs), _ACTS[affine.act], torch.get_num_threads()
    )
    return y.to(x.dtype)


def backward(
    g: Tensor,
    x: Tensor,
    affine: Affine,
    inv_std: Tensor,
    share: float | Tensor | None,
    total: Callable[[Tensor], Tensor] | None,
) -> InputGradient:
    """See `Kernels`."""
    dtype, act, threads = affine.mean.dtype, _ACTS[affine.act], torch.get_num_threads()
    xs, gs = _dense(x, dtype), _dense(g, dtype)
    per_channel = xs.new_empty(4, xs.shape[1])
    g_x = None if share is None else torch.empty_like(xs)
    at_once = g_x is not None and total is None
    mean, scale, shift, _ = affine
    _functions["backward", dtype](
        _at(gs), _at(xs), _at(g_x) if at_once else None, _at(mean), _at(inv_std), _at(scale), _at(shift),
        _at(per_channel), 0.0 if share is None or not at_once else float(share), *_sizes(xs), act, threads,
    )  # fmt: skip
    g_gamma, g_beta, g_mean, twice_g_var = per_channel.unbind()
    if g_x is not None and total is not None and share is not None:
        constant, slope = (share * total(per_channel[2:])).unbind()
        _functions["input_gradient", dtype](
            _at(gs), _at(xs), _at(g_x), _at(mean), _at(scale), _at(shift), _at(slope), _at(constant),
            *_sizes(xs), act, threads,
        )  # fmt: skip
    return InputGradient(None if g_x is None else g_x.to(x.dtype), g_gamma, g_beta, g_mean, twice_g_var)


def respond(theta: Tensor, patch_mean: Tensor, patch_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels`."""
    (channels, width), groups = theta.shape, len(patch_mean)
    mean, spread, square = theta.new_empty(3, channels).unbind()
    patches = (t.contiguous() for t in (patch_mean, patch_var))
    _functions["respond", theta.dtype](
        _at(theta), *map(_at, patches), _at(mean), _at(spread), _at(square), channels, width, channels // groups,
        torch.get_num_threads(),
    )  # fmt: skip
    return mean, spread, square


def folded_gradient(theta: Tensor, g: Tensor, fold: FoldGradient) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    if not g.is_contiguous() or g.dtype != theta.dtype:
        return plain.folded_gradient(theta, g, fold)
    channels, width = theta.shape
    t = theta.new_empty(channels)
    vectors = [v.contiguous() for v in fold[:6]]
    patches = [None if p is None else p.contiguous() for p in fold[6:]]
    groups = 1 if patches[0] is None else len(patches[0])
    _functions["folded_gradient", theta.dtype](
        _at(theta), _at(g), *map(_at, patches), *map(_at, vectors), _at(t), channels, width, channels // groups,
        torch.get_num_threads(),
    )  # fmt: skip
    return t, g


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of positions."""
    n, c = x.shape[:2]
    return n, c, x.numel() // (n * c) if n else 0
