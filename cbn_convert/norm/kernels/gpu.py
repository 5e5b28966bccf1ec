"""The CUDA path: each pass over weights is one launch of a kernel of triton_passes.py."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import NO_SQUARE, Affine, OptTensor
from .direct import Direct, is_dense

if TYPE_CHECKING:
    from ..carried import Carried
    from .direct import Both

LONGEST_BLOCK = 512  # of which a program holds one for each axis, too


@cache
def _passes() -> Any:
    """The kernels; they are defined where they are first needed, as importing Triton takes a while."""
    from . import triton_passes

    return triton_passes


@cache
def _run_on(device: torch.device) -> bool:
    """Whether Triton is installed, knows the device and finds the C compiler that its launcher needs: it is tried."""
    from ..carried import Carried

    if find_spec("triton") is None:
        return False
    try:
        for dtype in (torch.float32, torch.float64):
            theta, vector = torch.ones(2, 2, dtype=dtype, device=device), torch.ones(2, dtype=dtype, device=device)
            OnGpu().write_gradient(Carried(torch.ones_like(theta)), theta, None, Affine(None, None, 1.0), theta, vector)
    except Exception as error:
        warnings.warn(f"Triton does not run on {device}, so that CBN's steps take longer: {error}", stacklevel=2)
        return False
    return True


class OnGpu(Direct):
    """Contiguous weights on CUDA, in float32 and float64. Statistics of activations are torch's own."""

    @staticmethod
    def suits(x: Tensor) -> bool:
        """Whether the kernels run on the device of x, and x is laid out as they need it."""
        if not (x.is_cuda and x.dim() > 1 and x.dtype in (torch.float32, torch.float64) and is_dense(x)):
            return False
        return _run_on(x.device)

    def write_fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor, running: Both | None
    ) -> Tensor:
        """See `Direct`."""
        table, *patches = state
        out = theta.new_empty(7, len(theta))
        others = (bias, *patches, table, *affine[:2], out, rows, *(running or (None, None)))
        _launch(_passes().fold, theta, others, state.patch_axes, affine.eps)
        return out

    def write_gradient(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> Tensor:
        """See `Direct`."""
        table, *patches = state
        g_gamma = theta.new_empty(len(theta))
        others = (bias, *patches, table, affine.gamma, g, g_shift, g_gamma)
        _launch(_passes().folded_gradient, theta, others, state.patch_axes, affine.eps)
        return g_gamma


def _launch(kernel: Any, theta: Tensor, others: tuple[OptTensor, ...], axes: OptTensor, eps: float) -> None:
    """A program for each row of θ [C, ...]."""
    channels, (groups, rank) = theta.shape[0], (1, 1) if axes is None else axes.shape[:2]
    width = theta.numel() // channels
    block = min(LONGEST_BLOCK, 1 << (width - 1).bit_length())
    # Triton launches on the current device, whatever tensors are on
    with torch.cuda.device(theta.device) if theta.is_cuda else nullcontext():
        kernel[(channels,)](
            theta, *others, channels, width, rank, channels // groups, EPS=eps, LEAST=NO_SQUARE, BLOCK=block,
            AXES=1 << (rank - 1).bit_length(), num_warps=4 if block > 128 else 1,
        )  # fmt: skip
