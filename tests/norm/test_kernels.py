"""Every path against float64: sums, normalisation, gradients by autograd, and the layer as a whole.

Triton's kernels run on the GPU where there is one, else in its interpreter on the CPU (tests/conftest.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_norms
from torch import nn

from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d
from cbn_convert.norm.functional import Affine, FoldGradient
from cbn_convert.norm.kernels import compiled, forced, named, plain, select

CUDA = torch.cuda.is_available()
NAMES = ["compiled", "cpu", "triton"]
ACTS = {
    "": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
LOW = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def device_of(name: str) -> str:
    return "cuda" if CUDA and name == "triton" else "cpu"


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    want = want.detach()
    scale = max(1e-6, float(want.abs().max()))
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=tolerance, atol=tolerance * scale)


def test_the_library_was_built() -> None:
    """CI has a compiler: without this, everything below could pass without compiled kernels."""
    assert compiled.suits(torch.zeros(1, 2, 3, 3))
    assert select(torch.zeros(1, 2, 3, 3)) is compiled


def test_the_choice_can_be_forced() -> None:
    x = torch.zeros(1, 2, 3, 3)
    with forced("plain"):
        assert select(x) is plain
    assert select(x) is not plain
    assert select(x.to(memory_format=torch.channels_last)) is not compiled
    with pytest.raises(ModuleNotFoundError):
        named("fastest")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", list(LOW))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 7)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (1, 257), (3, 5)])
def test_passes(name, dtype, channels_last, size, batch, channels) -> None:
    kernels = named(name)
    device = device_of(name)
    x = (3 + 2 * torch.randn(batch, channels, *size)).to(device, dtype)
    g = torch.randn(batch, channels, *size).to(device, dtype)
    if channels_last:
        if name == "compiled":
            pytest.skip("compiled kernels are for NCHW; select gives channels_last to others")
        x = x.to(memory_format=torch.channels_last)
    mean, var = kernels.statistics(x)
    wide = x.double()
    assert mean.dtype == var.dtype == torch.float32
    close(mean, wide.mean((0, 2, 3)))
    close(var, wide.var((0, 2, 3), correction=0), 2e-5)

    M, S = mean + 0.3, var + 0.5
    gamma, beta = torch.randn(channels).to(device), torch.randn(channels).to(device)
    for act in ["", *sorted(kernels.ACTIVATIONS if batch == 3 else ())]:
        leaves = [t.double().requires_grad_() for t in (x, gamma, beta, M, S)]
        x64, gamma64, beta64, M64, S64 = leaves
        m64, s64, gm64, bt64 = (t.view(1, -1, 1, 1) for t in (M64, S64, gamma64, beta64))
        want = ACTS[act]((x64 - m64) * torch.rsqrt(s64 + 1e-5) * gm64 + bt64)
        held, g_gamma, g_beta, g_M, g_S = torch.autograd.grad((want * g.double()).sum(), leaves)

        inv_std = torch.rsqrt(S + 1e-5)
        affine = Affine(M, gamma * inv_std, beta, act)
        y = kernels.normalize(x, affine)
        assert y.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride()
        close(y, want, LOW[dtype])
        share = 0.25 / (x.numel() / channels)
        found = kernels.backward(g, x, affine, inv_std, share, None)
        for got, expected in zip(found[1:], (g_gamma, g_beta, g_M, 2 * g_S), strict=True):
            close(got, expected, 1e-4)
        through = 2 * g_S.view(1, -1, 1, 1) * (x64 - m64) + g_M.view(1, -1, 1, 1)
        close(found.x, held + share * through, LOW[dtype])
        if batch == 3:
            summed = kernels.backward(g, x, affine, inv_std, share, lambda t: 3 * t)
            close(summed.x, held + 3 * share * through, LOW[dtype])
            close(summed.mean, g_M, 1e-4)
        # a number of values that only the device knows, as where ranks see batches of different sizes
        counted = kernels.backward(g, x, affine, inv_std, torch.tensor(share, device=x.device), lambda t: t)
        close(counted.x, held + share * through, LOW[dtype])
        # a window that the batch has no part in
        close(kernels.backward(g, x, affine, inv_std, 0.0, None).x, held, LOW[dtype])
        assert kernels.backward(g, x, affine, inv_std, None, None).x is None


@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_a_rank_without_images(name: str) -> None:
    kernels, x = named(name), torch.zeros(0, 3, 4, 5, device=device_of(name))
    ones = torch.ones(3, device=x.device)
    affine = Affine(ones, ones, ones)
    assert kernels.normalize(x, affine).shape == x.shape
    found = kernels.backward(x, x, affine, ones, 0.5, lambda t: t)
    assert found.x is not None
    assert found.x.shape == x.shape
    assert all(t.abs().max() == 0 for t in found[1:])


@pytest.mark.parametrize("name", NAMES)
def test_the_global_default_dtype_does_not_matter(name: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device_of(name))
    torch.set_default_dtype(torch.float64)
    try:
        mean, var = named(name).statistics(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean.dtype == var.dtype == torch.float32
    close(mean, x.double().mean((0, 2, 3)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["strided", "expanded", "wide"])
def test_parameters_of_any_layout(name: str, layout: str) -> None:
    """What reaches a kernel as a bare pointer must be dense and of the kernel's dtype."""
    device = device_of(name)
    conv, norm = nn.Conv2d(3, 8, 1), randomize_norms(CrossIterationBatchNorm2d(8, window=3))
    net = nn.Sequential(conv, norm).to(device)
    norm.bind(conv)
    given = {
        "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "expanded": lambda t: t[:1].expand(t.shape),
        "wide": lambda t: t.double(),
    }[layout]
    values = {k: given(torch.rand_like(v) + 0.5) for k, v in net.named_parameters() if "0.weight" not in k}
    if layout == "wide":
        values = {k: v for k, v in values.items() if k.startswith("1.")}
    reference = copy.deepcopy(net)
    reference[1].bind(reference[0])
    for _ in range(3):
        x = torch.randn(2, 3, 5, 5, device=device)
        with forced(name):
            got = torch.func.functional_call(net, values, (x,))
        with forced("plain"):
            want = torch.func.functional_call(reference, values, (x,))
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_variance_beside_a_large_mean(name: str) -> None:
    x = (1000 + torch.randn(2, 5, 40, 41)).to(device_of(name))
    mean, var = named(name).statistics(x)
    close(mean, x.double().mean((0, 2, 3)), 1e-6)
    close(var, x.double().var((0, 2, 3), correction=0), 1e-4)


@pytest.mark.parametrize("name", ["compiled", "triton"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_edges_of_activations_are_torchs(name: str, activation: str) -> None:
    kernels, device = named(name), device_of(name)
    if activation not in kernels.ACTIVATIONS:
        pytest.skip(f"{name} does not fuse {activation}")
    values = [-float("inf"), -4.0, -3.0, -0.0, 0.0, 3.0, 6.0, 7.0, float("inf"), float("nan")]
    x = torch.tensor(values).view(1, 1, 1, -1).to(device)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    affine = Affine(zero, one, zero, activation)
    torch.testing.assert_close(kernels.normalize(x, affine), ACTS[activation](x), equal_nan=True)
    leaf = x[..., 1:-2].contiguous().requires_grad_()
    ACTS[activation](leaf).sum().backward()
    found = kernels.backward(torch.ones_like(leaf), leaf.detach(), affine, one, 0.0, None)
    torch.testing.assert_close(found.x, leaf.grad)


@pytest.mark.parametrize("name", [*NAMES, "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (1, 2500), (4, 7), (8, 9)])
def test_gradient_of_folded_weights(name, dtype, through, groups, width) -> None:
    """Oracle: autograd through M and S of a carried window, as written in carried.py."""
    if name == "triton" and dtype == torch.float64:
        pytest.skip("select gives float64 to others")
    channels, device, eps = 8, device_of(name), 1e-3
    theta, g = torch.randn(2, channels, width, dtype=dtype, device=device)
    mean, gamma, beta, bias, shift = torch.randn(5, channels, dtype=dtype, device=device)
    var = torch.rand(channels, dtype=dtype, device=device) + 0.5
    patch_mean, patch_var = torch.rand(2, groups, width, dtype=dtype, device=device) / width

    start, m, v, gm, bt, b, p, d = (t.double() for t in (theta, mean, var, gamma, beta, bias, patch_mean, patch_var))
    p, d = (t.repeat_interleave(channels // groups, 0) for t in (p, d))
    anchor, spread = (start * p).sum(1) + b, (start * start * d).sum(1)
    leaf = start.clone().requires_grad_()
    M, S = m, v
    if through:
        growth = leaf.norm(dim=1) / start.norm(dim=1)
        M = m + ((leaf - start) * p).sum(1) + (growth - 1) * (m - anchor)
        S = v * (leaf * leaf * d).sum(1) / spread
    scale = gm * torch.rsqrt(S + eps)
    loss = (g.double() * scale[:, None] * leaf).sum() + (shift.double() * (bt + scale * (b - M))).sum()
    (want,) = torch.autograd.grad(loss, leaf)

    inv_std = torch.rsqrt(var + eps)
    slopes = (m - anchor) / start.square().sum(1), 2 * v / spread
    fold = FoldGradient(
        gamma * inv_std, inv_std, bias - mean, shift, *(t.to(dtype) for t in slopes),
        *((patch_mean, patch_var) if through else ()),
    )  # fmt: skip
    t, got = named(name).folded_gradient(theta, g.clone(), fold)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    close(t, (start * g.double()).sum(1) + (b - m) * shift.double(), tolerance)
    close(got, want, tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (1, 5000), (4, 7), (8, 9)])
def test_responses_of_weights(name, dtype, groups, width) -> None:
    """Oracle: float64, a row at a time."""
    device = device_of(name)
    theta = torch.randn(8, width, dtype=dtype, device=device)
    patch_mean, patch_var = torch.rand(2, groups, width, dtype=dtype, device=device)
    found = named(name).respond(theta, patch_mean, patch_var)
    rows, p, d = theta.double(), patch_mean.double(), patch_var.double()
    for c in range(8):
        group = c * groups // 8
        want = (rows[c] @ p[group], rows[c].square() @ d[group], rows[c].square().sum())
        for got, expected in zip(found, want, strict=True):
            close(got[c], expected, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 4, "moments_positions": 40},
        {"window": 4, "gradient": "straight_through"},
        {"window": 16, "history": "ema", "moments_every": 2, "moments_positions": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d])
def test_layer_follows_float64(name, groups, options, kind) -> None:
    device = device_of(name)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    norm = randomize_norms(kind(8, **options))
    if isinstance(norm, CrossIterationBatchNormAct2d):
        norm.act = nn.ReLU6(inplace=True)
    net = nn.Sequential(conv, norm)
    net64 = copy.deepcopy(net).double()
    net.to(device)
    norm.bind(conv)
    net64[1].bind(net64[0])
    for _ in range(6):
        y = torch.randn(2, 8, 9, 9)
        with forced(name):
            out = net(y.to(device))
        with forced("plain"):
            want = net64(y.double())
        close(out, want, 1e-4)
        direction = torch.randn_like(out)
        grads = torch.autograd.grad((out * direction).sum(), list(net.parameters()))
        wanted = torch.autograd.grad((want * direction.double().cpu()).sum(), list(net64.parameters()))
        flat = [torch.cat([t.double().cpu().flatten() for t in side]) for side in (grads, wanted)]
        close(*flat, 1e-4)
        for key, value in net64.state_dict().items():
            close(net.state_dict()[key], value, 1e-4)
        with torch.no_grad():
            for p, p64 in zip(net.parameters(), net64.parameters(), strict=True):
                change = 0.05 * torch.randn(p.shape)
                p += change.to(device)
                p64 += change.double()
