"""Every path against float64: sums, normalisation, gradients by autograd, the window, and the layer as a whole.

Triton's kernels run on the GPU where there is one, else in its interpreter on the CPU (tests/conftest.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d
from cbn_convert.norm.functional import Affine, Moments, Running, WindowStatistics, window_statistics
from cbn_convert.norm.kernels import compiled, forced, named, plain, select

CUDA = torch.cuda.is_available()
NAMES = ["compiled", "cpu", "triton", *(["native"] if CUDA else [])]
ACTS = {
    "": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
LOW = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def device_of(name: str) -> str:
    return "cuda" if CUDA and name in ("triton", "native") else "cpu"


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
    mean, var, _ = kernels.statistics(x)
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
        y = kernels.normalize(x, affine, None)
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
        assert kernels.backward(g, x, affine, inv_std, None, None).x is None


@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_a_rank_without_images(name: str) -> None:
    kernels, x = named(name), torch.zeros(0, 3, 4, 5, device=device_of(name))
    ones = torch.ones(3, device=x.device)
    affine = Affine(ones, ones, ones)
    assert kernels.normalize(x, affine, None).shape == x.shape
    found = kernels.backward(x, x, affine, ones, 0.5, lambda t: t)
    assert found.x is not None
    assert found.x.shape == x.shape
    assert all(t.abs().max() == 0 for t in found[1:])


@pytest.mark.parametrize("name", NAMES)
def test_the_global_default_dtype_does_not_matter(name: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device_of(name))
    torch.set_default_dtype(torch.float64)
    try:
        mean, var, _ = named(name).statistics(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean.dtype == var.dtype == torch.float32
    close(mean, x.double().mean((0, 2, 3)))


@pytest.mark.parametrize("name", ["compiled", "cpu", "triton"])
@pytest.mark.parametrize("layout", ["strided", "expanded", "wide"])
def test_parameters_of_any_layout(name: str, layout: str) -> None:
    """What reaches a kernel as a bare pointer must be dense and of the kernel's dtype."""
    device = device_of(name)
    conv, norm = nn.Conv2d(3, 8, 1), CrossIterationBatchNorm2d(8, window=3)
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
    mean, var, _ = named(name).statistics(x)
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
    torch.testing.assert_close(kernels.normalize(x, affine, None), ACTS[activation](x), equal_nan=True)
    leaf = x[..., 1:-2].contiguous().requires_grad_()
    ACTS[activation](leaf).sum().backward()
    found = kernels.backward(torch.ones_like(leaf), leaf.detach(), affine, one, 0.0, None)
    torch.testing.assert_close(found.x, leaf.grad)


@pytest.mark.parametrize("name", ["compiled", "triton"])
@pytest.mark.parametrize("compensation", ["projection", "taylor", "none"])
@pytest.mark.parametrize("gradient", ["full", "current", "straight_through"])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (4, 7), (8, 9)])
@pytest.mark.parametrize(("n", "slots"), [(1, 1), (2, 3), (3, 3)])
def test_window(name, compensation, gradient, groups, width, n, slots) -> None:
    channels, device = 8, device_of(name)

    def vector() -> torch.Tensor:
        return torch.rand(channels, slots, device=device) + 0.5

    follows = compensation != "none"
    past = Moments(torch.randn(channels, slots, device=device), vector())
    theta = bias = None
    if follows:
        theta, bias = torch.randn(channels, width, device=device), torch.randn(channels, device=device)
        past = past._replace(
            anchor=vector(),
            explained=vector(),
            patch_mean=torch.randn(groups, slots, width, device=device),
            covariance=0.1 * torch.randn(channels, slots, width, device=device),
        )
    past = Moments(*(None if t is None else t[:, :n] for t in past))
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device)

    def double(t):
        return None if t is None else t.double()

    running = Running(torch.randn(channels, device=device), torch.rand(channels, device=device), 0.2, 1.5)
    running64 = Running(running.mean.double(), running.var.double(), 0.2, 1.5)
    for b in {None, bias}:
        args = (1 / 3, theta, b, compensation, gradient)
        got, finite = named(name).window(mean, var, past, *args, running)
        past64 = Moments(*map(double, past))
        want = window_statistics(
            mean.double(), var.double(), past64, 1 / 3, double(theta), double(b), compensation, gradient
        )
        running64.update(want.mean, want.var, torch.tensor(True))
        assert bool(finite)
        assert (got.share, got.w) == (want.share, want.w)
        for mine, other in zip((*got[:2], *got[4:], *running[:2]), (*want[:2], *want[4:], *running64[:2]), strict=True):
            assert (mine is None) == (other is None)
            if isinstance(mine, torch.Tensor):
                close(mine, other, 2e-5)
        if got.covariance is not None:
            grads = torch.randn(2, channels, device=device)
            mine = named(name).gradient_through_the_past(got, *grads)
            theirs = plain.gradient_through_the_past(WindowStatistics(*map(cast64, want)), *grads.double())
            for a, c in zip(mine, theirs, strict=True):
                close(a, c, 2e-5)


def cast64(t):
    return t.double() if isinstance(t, torch.Tensor) else t


@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_a_batch_that_is_not_finite_moves_nothing(name: str) -> None:
    device = device_of(name)
    past = Moments(torch.zeros(3, 1, device=device), torch.ones(3, 1, device=device))
    running = Running(torch.zeros(3, device=device), torch.ones(3, device=device), 0.1, 1.0)
    for bad in (float("nan"), float("inf")):
        mean = torch.tensor([0.0, bad, 0.0], device=device)
        _, finite = named(name).window(
            mean, torch.ones(3, device=device), past, 0.5, None, None, "none", "full", running
        )
        assert not finite
        assert running.mean.tolist() == [0, 0, 0]
        assert running.var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("kind", [CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d])
def test_layer_follows_float64(name, groups, history, kind) -> None:
    device = device_of(name)
    every = 2 if history == "ema" else 1
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    norm = kind(8, window=4, history=history, moments_every=every, moments_positions=40)
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
