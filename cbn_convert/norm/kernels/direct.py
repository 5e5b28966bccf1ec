"""What the paths have in common that are given the memory of tensors and cannot tell what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..functional import Affine, OptTensor
from .formulas import Folded, Kernels

if TYPE_CHECKING:
    from ..carried import Carried
    from .formulas import Running

Both = tuple[Tensor, Tensor]


class Direct(Kernels):
    """Passes over dense weights in float32 and float64, by what a subclass calls; the formulas for all else."""

    def write_fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, rows: OptTensor, running: Both | None
    ) -> Tensor:
        """Returns [7, C]: the table at θ, if there are patches, then s and the shift; fills rows and running.

        Args:
            state, theta, bias, affine: as in `Kernels.fold`.
            rows: memory for s θ, of θ's shape; None where it is not wanted.
            running: memory for M and S [C]; None likewise.
        """
        raise NotImplementedError

    def write_gradient(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> Tensor:
        """Makes of g the gradient of θ, in place; returns that of γ.

        Args:
            state, theta, bias, affine, g, g_shift: as in `Kernels.folded_gradient`.
        """
        raise NotImplementedError

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> Tensor:
        """See `Kernels`."""
        learns = theta.requires_grad or (bias is not None and bias.requires_grad)
        if (learns and torch.is_grad_enabled()) or not fit(state, theta, bias):
            return super().move(state, theta, bias)
        return self.write_fold(state, theta, bias, Affine(None, None, 1.0), None, None)[:5]

    def fold(
        self, state: Carried, theta: Tensor, bias: OptTensor, affine: Affine, running: Running = None,
        with_weight: bool = True,
    ) -> Folded:  # fmt: skip
        """See `Kernels`."""
        if not fit(state, theta, bias, *affine[:2]):
            return super().fold(state, theta, bias, affine, running, with_weight)
        rows, written = torch.empty_like(theta) if with_weight else None, None
        if running is not None and fit(state, theta, running.mean, running.var):
            written = running.begin_write()
        out = self.write_fold(state, theta, bias, affine, rows, written)
        if running is not None and written is None:
            running.write(out[0], out[1])
        at = state if state.patch_mean is None else state._replace(table=out[:5])
        return Folded(at, out[5], out[6], rows)

    def folded_gradient(
        self, state: Carried, theta: Tensor, bias: Tensor | None, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if not (g.is_contiguous() and g.dtype == theta.dtype and fit(state, theta, bias, affine.gamma, g_shift)):
            return super().folded_gradient(state, theta, bias, affine, g, g_shift)
        return g, self.write_gradient(state, theta, bias, affine, g, g_shift)


def has_memory(t: Tensor) -> bool:
    """Whether there is memory that holds the values: not a FakeTensor's, nor a DTensor's, nor those of another sign."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_neg()


def is_dense(t: Tensor) -> bool:
    """Whether that memory holds what the shape says, in its order."""
    return has_memory(t) and t.is_contiguous()


def fit(state: Carried, theta: Tensor, *vectors: Tensor | None) -> bool:
    """Whether all are of θ [C, ...]'s size, dtype and device, and dense."""
    channels, table, patch_mean = theta.shape[0], state.table, state.patch_mean
    if patch_mean is not None and patch_mean.shape[1] * channels != theta.numel():
        return False
    dtype, device = theta.dtype, theta.device
    for t in (table, *vectors):  # `is_dense`, in place: this is asked several times for each layer and step
        if t is None:
            continue
        if (type(t) is not Tensor and type(t) is not nn.Parameter) or not t.is_contiguous() or t.is_neg():
            return False
        if t.shape[-1] != channels or t.dtype is not dtype or t.device != device:
            return False
    return True
