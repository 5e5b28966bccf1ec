"""Kernels by name, and what tests compare of them."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from cbn_convert.norm.functional import AXES
from cbn_convert.norm.kernels import KERNELS

NAMES = [name for name in KERNELS if name != "gpu" or find_spec("triton")]  # in Triton's interpreter without a GPU


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    want = want.detach()
    scale = max(1e-6, float(want.abs().max()))
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=tolerance, atol=tolerance * scale)


def some_patches(groups: int, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Mean, variance beside the axes and axes."""
    mean, rest = torch.rand(2, groups, width, dtype=dtype)
    return [mean, rest, torch.randn(groups, min(AXES, width), width, dtype=dtype)]
