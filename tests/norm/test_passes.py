"""What the compiled passes take at a time, some channels, weights and axes, and in which order these lie in memory."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import NAMES, close, some_patches

from cbn_convert.norm.carried import Carried
from cbn_convert.norm.distributed import JoinedMoments
from cbn_convert.norm.functional import Affine
from cbn_convert.norm.kernels import KERNELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided", "tokens", "vectors", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_scaling_happens_in_place_in_every_layout(name: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = {
        "contiguous": lambda: torch.randn(3, 5, 40, 90),
        "channels last": lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(3, 5, 14, 9)[:, :, ::2],
        "tokens": lambda: torch.randn(3, 11, 5).movedim(-1, 1),
        "vectors": lambda: torch.randn(13, 5),
        "empty": lambda: torch.randn(0, 5, 7, 9),
    }[layout]().to(dtype)
    scale, shift = torch.randn(2, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    shape = (1, -1, *[1] * (x.dim() - 2))
    want = (x.double() * scale.double().view(shape) + shift.double().view(shape)).to(dtype)
    memory, writes = x.data_ptr(), x._version
    KERNELS[name].scale(x, scale, shift)
    torch.testing.assert_close(x, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert x.data_ptr() == memory
    assert x._version > writes  # or autograd would not know


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 17, 33, 2049])
@pytest.mark.parametrize(("groups", "per_group"), [(1, 1), (1, 2), (1, 3), (2, 4), (3, 1), (2, 8)])
def test_blocks_of_channels_and_vectors_leave_nothing_out(groups: int, per_group: int, width: int) -> None:
    """The compiled passes take some channels, weights and axes at a time, and what is left of each one by one."""
    torch.manual_seed(width)
    channels, dtype = groups * per_group, torch.float64
    patches = some_patches(groups, width, dtype)
    state = Carried(torch.rand(5, channels, dtype=dtype) + 0.5, *patches)
    theta, g = torch.randn(2, channels, width, dtype=dtype)
    bias, gamma, beta, g_shift, mean, var = torch.randn(6, channels, dtype=dtype)
    found = JoinedMoments(mean, var.square(), 2.0)
    made = {}
    for name in ("plain", "compiled"):
        kernels, affine = KERNELS[name], Affine(gamma, beta, 1e-3)
        folded = kernels.fold(state, theta, bias, affine)
        assert folded.weight is not None
        gradients = kernels.folded_gradient(folded.state, theta, bias, affine, g.clone(), g_shift)
        pooled, finite = kernels.pool(state, found, 0.1)
        assert finite
        made[name] = (folded.state.table, *folded[1:], *gradients, pooled.table, *kernels.statistics(theta[None]))
        assert kernels.fold(state, theta, bias, affine, with_weight=False).weight is None
        assert not kernels.pool(state, found._replace(mean=mean / 0), 0.1)[1]
    for got, want in zip(made["compiled"], made["plain"], strict=True):
        close(got, want, 1e-10)
