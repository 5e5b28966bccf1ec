"""The CPU path: passes.cpp, which setup.py builds where there is a C++ compiler.

A layer's forward pass is three calls into it and its backward pass two, so that a step costs about what nn.BatchNorm's
does even where activations are small. Threads are torch's: the library uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..functional import (
    Affine,
    Compensation,
    Gradient,
    InputGradient,
    Moments,
    Running,
    WindowStatistics,
    statistics_dtype,
)
from . import plain

_ACTS = {"": 0, "relu": 1, "relu6": 2}
ACTIVATIONS = frozenset(_ACTS) - {""}
_TRUE, _FALSE = torch.tensor(True), torch.tensor(False)
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_VERSION = 1  # of the signatures, as in passes.cpp
_p, _n, _i, _d = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES = {
    "statistics": [_p] * 3 + [_n] * 3 + [_i],
    "normalize": [_p] * 5 + [_n] * 3 + [_i] * 2,
    "backward": [_p] * 8 + [_d] + [_n] * 3 + [_i] * 2,
    "input_gradient": [_p] * 8 + [_n] * 3 + [_i] * 2,
    "window": [_p] * 16 + [_n] * 5 + [_i] + [_d] * 3 + [_i],
    "through_the_past": [_p] * 8 + [_n] * 5 + [_d] + [_i],
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
            function.argtypes, function.restype = arguments, _i if name == "window" else None
            functions[name, dtype] = function
    return functions


_functions = _load()


def suits(x: Tensor) -> bool:
    """Whether the library was built and x is laid out as it needs it."""
    # of tensors that only stand for one, as under FakeTensorMode, there is no memory to look at
    return bool(_functions) and type(x) in (Tensor, nn.Parameter) and x.is_contiguous() and x.dim() > 1


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `Kernels`."""
    xs = _dense(x, statistics_dtype(x))
    both = xs.new_empty(2, xs.shape[1])
    mean, var = both.unbind()
    _functions["statistics", xs.dtype](_at(xs), _at(mean), _at(var), *_sizes(xs), torch.get_num_threads())
    return mean, var, None


def window(
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
    """See `Kernels`."""
    if past is None or past.patch_covariance is not None or not _updates(running, mean.dtype):
        return plain.window(mean, var, past, newest_weight, theta, bias, compensation, gradient, running)
    channels, n = past.mean.shape
    slots = past.mean.stride(0)
    if theta is None or past.patch_mean is None:
        past, theta, bias = past._replace(anchor=None, explained=None, patch_mean=None, covariance=None), None, None
        width, groups = 0, 1
    else:
        theta, bias = _dense(theta, mean.dtype), None if bias is None else _dense(bias, mean.dtype)
        width, groups = theta.shape[1], past.patch_mean.shape[0]
    out = mean.new_empty(2 + 2 * n, channels)
    M, S = out[0], out[1]
    along, pull = out[2 : 2 + n].view(channels, n), out[2 + n :].view(channels, n)
    finite = _functions["window", mean.dtype](
        _at(mean), _at(var), _at(past.mean), _at(past.var), _at(past.anchor), _at(past.explained),
        _at(past.patch_mean), _at(past.covariance), _at(theta), _at(bias), _at(M), _at(S), _at(along), _at(pull),
        *((None, None) if running is None else (_at(running.mean), _at(running.var))),
        channels, width, channels // groups, n, slots, compensation == "taylor", newest_weight,
        *((0.0, 0.0) if running is None else (running.momentum, running.correction)), torch.get_num_threads(),
    )  # fmt: skip
    if running is not None:
        torch.autograd.graph.increment_version((running.mean, running.var))
    answer = WindowStatistics(M, S, 1.0 if gradient == "straight_through" else newest_weight)
    if gradient == "full" and theta is not None:
        w = (1 - newest_weight) / n
        answer = WindowStatistics(M, S, newest_weight, w, along, pull, past.covariance, past.patch_mean)
    return answer, _TRUE if finite else _FALSE


def normalize(x: Tensor, affine: Affine, spare: Tensor | None) -> Tensor:
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


def gradient_through_the_past(window: WindowStatistics, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels`."""
    _, _, _, w, along, pull, covariance, patch_mean = window
    assert along is not None
    assert pull is not None
    assert covariance is not None
    assert patch_mean is not None
    channels, n, width = covariance.shape
    if covariance.stride() != (patch_mean.stride(0), width, 1):
        return plain.gradient_through_the_past(window, grad_mean, grad_var)
    g_theta, g_b = grad_mean.new_empty(channels, width), grad_mean.new_empty(channels)
    _functions["through_the_past", g_theta.dtype](
        _at(covariance), _at(patch_mean), _at(along), _at(pull), _at(grad_mean), _at(grad_var), _at(g_theta), _at(g_b),
        channels, width, channels // len(patch_mean), n, covariance.stride(0) // width, w, torch.get_num_threads(),
    )  # fmt: skip
    return g_theta, g_b


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """N, C and the number of positions."""
    n, c = x.shape[:2]
    return n, c, x.numel() // (n * c) if n else 0


def _updates(running: Running | None, dtype: torch.dtype) -> bool:
    """Whether the library can update these running statistics."""
    return running is None or (
        running.mean.dtype == running.var.dtype == dtype
        and running.mean.is_cpu
        and running.mean.is_contiguous()
        and running.var.is_contiguous()
        and not isinstance(running.momentum, Tensor)
        and not isinstance(running.correction, Tensor)
    )
