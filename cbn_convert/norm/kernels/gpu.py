"""The CUDA path: each pass over weights is one launch of a kernel of triton_passes.py."""

from __future__ import annotations

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

LONGEST_BLOCK = 1024


@cache
def _passes() -> Any:
    """The kernels; they are defined where they are first needed, as importing Triton takes a while."""
    from . import triton_passes

    return triton_passes


class OnGpu(Direct):
    """Contiguous weights on CUDA, in float32 and float64. Statistics of activations are torch's own."""

    is_there = find_spec("triton") is not None

    @classmethod
    def suits(cls, x: Tensor) -> bool:
        """Whether Triton is installed and x is laid out as the kernels need it."""
        return cls.is_there and x.is_cuda and x.dim() > 1 and x.dtype in (torch.float32, torch.float64) and is_dense(x)

    def write_fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor, running: Both | None
    ) -> Tensor:
        """See `Direct`."""
        table, patch_mean, patch_var = state
        out = theta.new_empty(7, len(theta))
        vectors = (bias, patch_mean, patch_var, table, *affine[:2], out, rows, *(running or (None, None)))
        _launch(_passes().fold, theta, vectors, patch_mean, affine.eps)
        return out

    def write_gradient(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> Tensor:
        """See `Direct`."""
        table, patch_mean, patch_var = state
        g_gamma = theta.new_empty(len(theta))
        vectors = (bias, patch_mean, patch_var, table, affine.gamma, g, g_shift, g_gamma)
        _launch(_passes().folded_gradient, theta, vectors, patch_mean, affine.eps)
        return g_gamma


def _launch(kernel: Any, theta: Tensor, others: tuple[OptTensor, ...], patch_mean: OptTensor, eps: float) -> None:
    """A program for each row of θ [C, F]."""
    (channels, width), groups = theta.shape, 1 if patch_mean is None else len(patch_mean)
    block = min(LONGEST_BLOCK, 1 << (width - 1).bit_length())
    # Triton launches on the current device, whatever tensors are on
    with torch.cuda.device(theta.device) if theta.is_cuda else nullcontext():
        kernel[(channels,)](
            theta, *others, channels, width, channels // groups, EPS=eps, LEAST=NO_SQUARE, BLOCK=block,
            num_warps=4 if block > 128 else 1,
        )  # fmt: skip
