"""Every path against float64: statistics, what weights make of patches, gradients, and the layer as a whole."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.kernels import NAMES, close, some_patches
from helpers.models import randomize_norms
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d
from cbn_convert.norm.carried import Carried
from cbn_convert.norm.distributed import JoinedMoments, PatchMoments
from cbn_convert.norm.functional import Affine, probes_of
from cbn_convert.norm.kernels import KERNELS, batch_statistics, forced, gpu, select
from cbn_convert.norm.moments import InputPatches


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors are made where the kernels of a test are to run."""
    gpu = "callspec" in dir(request.node) and request.node.callspec.params.get("name") == "gpu"
    with torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"):
        yield


RINGS = [{"window": 4, "moments_positions": 40}, {"window": 4, "gradient": "straight_through"}]
CARRIED = {"window": 16, "history": "ema", "moments_every": 2, "moments_positions": 40}


def spread_of(theta: torch.Tensor, rest: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """θ·Σ·θ of rows θ [C, F], from what each has, or all have, of `rest` [.., F] and `axes` [.., K, F]."""
    return (theta.square() * rest).sum(-1) + (axes * theta[:, None]).sum(-1).square().sum(-1)


def test_the_library_was_built() -> None:
    """CI has a compiler: without this, everything below could pass without compiled kernels."""
    assert select(torch.zeros(1, 2, 3, 3)) is KERNELS["compiled"]


def test_the_choice_is_by_layout_and_can_be_forced() -> None:
    x = torch.zeros(1, 2, 3, 3)
    with forced("plain"):
        assert select(x) is KERNELS["plain"]
    assert select(x) is KERNELS["compiled"]
    assert select(x.to(memory_format=torch.channels_last)) is KERNELS["plain"]
    with FakeTensorMode():
        assert select(torch.zeros(1, 2, 3, 3)) is KERNELS["plain"]
        assert select(x) is KERNELS["plain"]  # what would be made for it has no memory


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_for_gpus_compile_without_one(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py")],
        capture_output=True, text=True, timeout=200, env={**environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len({tuple(line.split()[:3]) for line in lines}) == 8  # two GPUs, two kernels, two dtypes
    assert len(lines) == 24  # with all, without what is optional, and with a single weight per channel


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_that_do_not_run_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_on = gpu._run_on.__wrapped__  # without what was found before
    assert run_on(device)

    def broken(*arguments: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "_launch", broken)
    with pytest.warns(UserWarning, match="Triton does not run on .*: Failed to find C compiler"):
        assert not run_on(device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (70, 71)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (1, 257), (3, 5)])
def test_statistics(name, dtype, size, batch, channels) -> None:
    x = (3 + 2 * torch.randn(batch, channels, *size)).to(dtype)
    mean, var = KERNELS[name].statistics(x)
    wide = x.double()
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(mean, wide.mean((0, 2, 3)))
    close(var, wide.var((0, 2, 3), correction=0), 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_default_dtype_does_not_matter(name: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    torch.set_default_dtype(torch.float64)
    try:
        mean, var = KERNELS[name].statistics(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean.dtype == var.dtype == torch.float32
    close(mean, x.double().mean((0, 2, 3)))


@pytest.mark.parametrize("kind", ["ring", "ema", "ema, folded"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["strided", "expanded", "wide"])
def test_parameters_of_any_layout(name: str, layout: str, kind: str) -> None:
    """What reaches a kernel as a bare pointer must be dense and of the kernel's dtype."""
    history, _, folded = kind.partition(", ")
    conv, norm = nn.Conv2d(3, 8, 1), randomize_norms(CrossIterationBatchNorm2d(8, window=30, history=history))
    net = nn.Sequential(conv, norm)
    norm.bind(conv, folded=bool(folded))
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
        x = torch.randn(2, 3, 5, 5)
        with forced(name):
            got = torch.func.functional_call(net, values, (x,))
        with forced("plain"):
            want = torch.func.functional_call(reference, values, (x,))
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_another_length_are_an_error(name: str) -> None:
    """And not memory that belongs to others."""
    state, theta = Carried(torch.rand(5, 6), *some_patches(1, 9)), torch.rand(6, 9)
    kernels, short, affine = KERNELS[name], torch.rand(4), Affine(torch.rand(6), torch.rand(6), 1e-5)
    for call in (
        lambda: kernels.fold(state, theta, short, affine),
        lambda: kernels.fold(state, theta, None, affine._replace(gamma=short)),
        lambda: kernels.fold(state, theta, None, affine._replace(beta=short)),
        lambda: kernels.fold(state, theta[:, :7].contiguous(), None, affine),
        lambda: kernels.fold(state, theta[:4], None, Affine(None, None, 1e-5)),
        lambda: kernels.move(state, theta, short),
        lambda: kernels.folded_gradient(state, theta, None, affine, theta.clone(), short),
        lambda: kernels.folded_gradient(state, theta, None, affine._replace(gamma=short), theta.clone(), torch.rand(6)),
    ):
        with pytest.raises(RuntimeError, match="size"):
            call()


class Elsewhere(torch.Tensor):
    """Has no memory of its own, as DTensor has none."""

    @staticmethod
    def __new__(cls, t: torch.Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.parametrize("elsewhere", [Elsewhere, lambda t: t.to("meta")], ids=["wrapped", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_memory_is_not_taken_for_none(name: str, elsewhere) -> None:
    affine = Affine(elsewhere(torch.rand(6)), None, 1e-5)
    with pytest.raises(RuntimeError):
        KERNELS[name].fold(Carried(torch.rand(2, 6)), torch.rand(6, 9), None, affine)


@pytest.mark.parametrize("name", NAMES)
def test_variance_beside_a_large_mean(name: str) -> None:
    x = 1000 + torch.randn(2, 5, 40, 41)
    mean, var = KERNELS[name].statistics(x)
    close(mean, x.double().mean((0, 2, 3)), 1e-6)
    close(var, x.double().var((0, 2, 3), correction=0), 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (1, 2500), (4, 7), (8, 9)])
def test_gradient_of_folded_weights(name, dtype, through, groups, width) -> None:
    """Oracle: autograd through M and S of a carried window, as written in carried.py."""
    channels, eps = 8, 1e-3
    theta, g = torch.randn(2, channels, width, dtype=dtype)
    mean, gamma, beta, bias, shift = torch.randn(5, channels, dtype=dtype)
    var = torch.rand(channels, dtype=dtype) + 0.5
    patches = [t / width for t in some_patches(groups, width, dtype)]

    start, m, v, gm, bt, b = (t.double() for t in (theta, mean, var, gamma, beta, bias))
    p, d, u = (t.double().repeat_interleave(channels // groups, 0) for t in patches)
    anchor, spread = (start * p).sum(1) + b, spread_of(start, d, u)
    leaf = start.clone().requires_grad_()
    M, S = m, v
    if through:
        growth = leaf.norm(dim=1) / start.norm(dim=1)
        M = m + ((leaf - start) * p).sum(1) + (growth - 1) * (m - anchor)
        S = v * spread_of(leaf, d, u) / spread
    scale = gm * torch.rsqrt(S + eps)
    loss = (g.double() * scale[:, None] * leaf).sum() + (shift.double() * (bt + scale * (b - M))).sum()
    (want,) = torch.autograd.grad(loss, leaf)

    table = torch.stack([m, v, anchor, spread, start.square().sum(1)]).to(dtype)
    state = Carried(table, *(patches if through else ()))
    affine = Affine(gamma, None, eps)
    got, got_gamma = KERNELS[name].folded_gradient(state, theta, bias, affine, g.clone(), shift)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    close(got_gamma, ((start * g.double()).sum(1) + (b - m) * shift.double()) * torch.rsqrt(v + eps), tolerance)
    close(got, want, tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (1, 5000), (4, 7), (8, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_statistics_at_other_weights(name, dtype, groups, width, bias) -> None:
    """Oracle: float64, a row at a time; the weights of one channel were zero, of another they are."""
    start, theta = torch.randn(2, 8, width, dtype=dtype)
    start[1], theta[2] = 0, 0
    patches = some_patches(groups, width, dtype)
    mean, b_then, b = torch.randn(3, 8, dtype=dtype)
    given, given_then = (b, b_then) if bias else (None, None)
    var = torch.rand(8, dtype=dtype) + 0.5
    state = Carried(torch.stack([mean, var]), *patches).placed(mean, var, start, given_then)
    gamma, beta = torch.randn(2, 8, dtype=dtype)
    affine = Affine(gamma, beta, 1e-3) if bias else Affine(None, None, 1e-3)
    found = KERNELS[name].move(state, theta, given)
    folded = KERNELS[name].fold(state, theta, given, affine)
    close(folded.state.table, found, 1e-12)
    scale = torch.rsqrt(found[1].double() + 1e-3) * (gamma.double() if bias else 1)
    close(folded.scale, scale, 1e-5 if dtype == torch.float32 else 1e-12)
    close(folded.weight, scale[:, None] * theta.double(), 1e-5 if dtype == torch.float32 else 1e-12)
    shift = scale * (b.double() - found[0].double()) + beta.double() if bias else -scale * found[0].double()
    close(folded.shift, shift, 1e-5 if dtype == torch.float32 else 1e-12)
    then, now, p, d, u = (t.double() for t in (start, theta, *patches))
    for c in range(8):
        group = c * groups // 8
        anchors = [rows[c] @ p[group] + (float(t[c]) if bias else 0.0) for rows, t in ((then, b_then), (now, b))]
        spreads = [spread_of(rows[c : c + 1], d[group], u[group])[0].clamp_min(1e-24) for rows in (then, now)]
        squares = [rows[c].square().sum().clamp_min(1e-24) for rows in (then, now)]
        growth = (squares[1] / squares[0]).sqrt()
        M = mean[c].double() + anchors[1] - anchors[0] + (growth - 1) * (mean[c].double() - anchors[0])
        S = var[c].double() * spreads[1] / spreads[0]
        if c == 1:
            M, S = anchors[1], spreads[1]
        # beside what they are differences of
        size = torch.stack([mean[c].double(), *anchors, growth * (mean[c].double() - anchors[0]), S]).abs().max()
        for got, expected in zip(found, (M, S, anchors[1], spreads[1], squares[1]), strict=True):
            error = (got[c].double() - expected).abs()
            assert error <= (1e-4 if dtype == torch.float32 else 1e-10) * torch.maximum(size, expected.abs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "width"), [(1, 33), (1, 2500), (4, 7), (8, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_look_adds(name, dtype, groups, width, bias) -> None:
    """Oracle: float64, moments of mixtures of the past and what was found; the variance of an entry has a least one."""
    theta, b = torch.randn(8, width, dtype=dtype), torch.randn(8, dtype=dtype)
    theta[2] = 0
    mean, new_mean = 3 * torch.randn(2, 8, dtype=dtype)
    var, new_var = torch.rand(2, 8, dtype=dtype) + 0.1
    p, new_p = torch.randn(2, groups, width, dtype=dtype)
    _, d, u = some_patches(groups, width, dtype)
    covariance = torch.rand(groups, width, 20, dtype=dtype)
    covariance = covariance @ covariance.mT / 20
    probes, new_d = probes_of(u, groups, width, u), covariance.diagonal(dim1=1, dim2=2).contiguous()
    given, share, of_patches = b if bias else None, 0.01, 0.25
    before = Carried(torch.stack([mean, var]), p, d, u).placed(mean, var, theta, given)
    kept = [t.clone() for t in before]
    found = JoinedMoments(new_mean, new_var, 2, PatchMoments(new_p, new_d, probes, probes @ covariance))
    after, finite = KERNELS[name].join(before, theta, given, found, (share, of_patches))
    assert finite
    assert all(torch.equal(t, u) for t, u in zip(before, kept, strict=True))  # others keep it

    w, b, mean, new_mean, var, new_var, p, new_p, d, new_d, u, V, covariance = (
        t.double() for t in (theta, b, mean, new_mean, var, new_var, p, new_p, d, new_d, u, probes, covariance)
    )
    P = p + of_patches * (new_p - p)
    own = new_d + (1 - of_patches) * (new_p - p).square()
    own = own + 0.05 * own.mean(1, keepdim=True) + 1e-12
    total = (1 - of_patches) * (d + u.square().sum(1)) + of_patches * own
    step = new_p - p
    between = (1 - of_patches) * step[:, :, None] * step[:, None]
    along = V @ ((1 - of_patches) * u.mT @ u + of_patches * (covariance + between))
    U = torch.linalg.solve_triangular(torch.linalg.cholesky(along @ V.mT), along, upper=False)
    most = (total - 0.05 / 1.05 * total.mean(1, keepdim=True)).clamp_min(0)
    U = U * (most / U.square().sum(1)).clamp_max(1).sqrt()[:, None]  # the least that entries keep to themselves
    D = total - U.square().sum(1)
    M = (1 - share) * mean + share * new_mean
    S = (1 - share) * (var + mean.square()) + share * (new_var + new_mean.square()) - M.square()
    rows_p, rows_d, rows_u = (t.repeat_interleave(8 // groups, 0) for t in (P, D, U))
    anchor = (w * rows_p).sum(1) + (b if bias else 0)
    spread, square = spread_of(w, rows_d, rows_u).clamp_min(1e-24), w.square().sum(1).clamp_min(1e-24)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-11  # of an inverse
    for got, want in zip([*after.table, *after[1:]], [M, S, anchor, spread, square, P, D, U], strict=True):
        close(got, want, tolerance)


@pytest.mark.parametrize("name", ["plain", "compiled"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("groups", "width"), [(1, 54), (4, 9)])
def test_no_axes_come_of_rounding(name, scale, rank, groups, width) -> None:
    """Patches that vary along fewer directions than there are axes, as of gray images: their variance stays."""
    directions = torch.randn(groups, rank, width)
    directions[:, 0] = (torch.arange(width) + 9).div(9, rounding_mode="floor")  # all alike, with groups
    theta, state = torch.randn(8, width), Carried(torch.ones(2, 8))
    for look in range(120):
        patches = scale * torch.randn(groups, 64, rank) @ directions + scale
        mean = patches.mean(1, keepdim=True)
        probes = probes_of(state.patch_axes, groups, width, theta)
        along = ((patches - mean) @ probes.mT).mT @ (patches - mean) / 64
        found = PatchMoments(mean[:, 0], (patches - mean).square().mean(1), probes, along)
        if state.patch_mean is None:
            state = state.with_patches(found, 1.0, theta, None)
        joined = JoinedMoments(torch.zeros(8), torch.ones(8), 2, found)
        state, finite = KERNELS[name].join(state, theta, None, joined, (0.01, max(0.01, 1 / (look + 1))))
        assert finite
    truth = scale**2 * directions.square().sum(1)
    total = state.patch_rest + state.patch_axes.square().sum(1)
    assert (total < 1.5 * truth + 0.1 * truth.mean(1, keepdim=True)).all()
    assert (total > 0.7 * truth).all()
    axes, covariance = state.patch_axes.double(), scale**2 * (directions.mT @ directions).double()
    explained = axes.square().sum((1, 2)) / covariance.diagonal(dim1=1, dim2=2).sum(1)
    assert ((explained > 0.8) & (explained < 1.2)).all()


def test_patches_of_what_lies_in_memory_with_the_other_sign() -> None:
    """torch negates some tensors where they are read only."""
    conv = nn.Conv2d(3, 4, 3)
    y = torch.complex(torch.randn(2, 3, 9, 9), torch.rand(2, 3, 9, 9) + 1).conj().imag
    assert y.is_neg()
    for given in (y, torch._neg_view(torch.rand(2, 3, 9, 9))):
        probes = probes_of(None, 1, 27, given)
        found = InputPatches(conv, given, torch.Size([7, 7]), torch.float32, 20, 0).moments(probes)
        want = InputPatches(conv, given.resolve_neg(), torch.Size([7, 7]), torch.float32, 20, 0).moments(probes)
        assert found[0].max() < 0
        torch.testing.assert_close(found, want)
        close(batch_statistics(given)[0], given.double().resolve_neg().mean((0, 2, 3)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("groups", "kernel"), [(1, 1), (1, 3), (2, 3), (24, 3)])
def test_covariance_of_many_patches_in_one_pass(
    groups: int, kernel: int, order: torch.memory_format, threads: int
) -> None:
    """Strips of positions that end within lines, and those that threads share, beside the formulas."""
    conv = nn.Conv2d(24, 24, kernel, padding=kernel - 1, stride=kernel, dilation=kernel, groups=groups)
    y = (torch.randn(3, 24, 41, 53, dtype=torch.float64) + 5).to(memory_format=order)
    patches = InputPatches(conv, y, conv(y.float()).shape[2:], torch.float64, 400, 5)
    assert patches.positions > 200
    probes = torch.randn(groups, 5, patches.width, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = patches.moments(probes)
    finally:
        torch.set_num_threads(before)
    want = (*patches.mean_and_var(), patches.covariance_along(probes))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_one_value_far_off_that_is_not_looked_at() -> None:
    conv = nn.Conv2d(1, 2, 1)
    y = torch.randn(2, 1, 64, 64)
    y[0, 0, 0, 0] = 1e9
    patches = InputPatches(conv, y, torch.Size([64, 64]), torch.float32, 512, 1)
    looked_at = patches.outputs(y).double()
    assert looked_at.max() < 10
    _, var, along = patches.moments(torch.ones(1, 1, 1))
    close(var, looked_at.var(unbiased=False).view(1, 1))
    close(along, looked_at.var(unbiased=False).view(1, 1, 1))


def test_a_conv_that_gets_other_groups_starts_with_other_patches() -> None:
    """The weight may have the same shape, and the patches fewer rows."""
    conv, norm = nn.Conv2d(8, 8, 3, groups=4), randomize_norms(CrossIterationBatchNorm2d(8, **CARRIED))
    norm.bind(conv, folded=True)
    for _ in range(3):
        norm(conv(torch.randn(2, 8, 9, 9)))
    assert norm._sources[0].state.state.patch_mean.shape == (4, 18)
    state, weights = norm.history_state(), copy.deepcopy(norm.state_dict())
    conv.groups, conv.in_channels = 2, 4
    for _ in range(3):
        y = norm(conv(torch.randn(2, 4, 9, 9)))
    assert norm._sources[0].state.state.patch_mean.shape == (2, 18)
    assert y.isfinite().all()
    norm.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"patch_mean has shape \(4, 18\), this one's has \(2, 18\)"):
        norm.load_history_state(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["mean", "var", "patches.mean", "patches.var", "patches.along"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_look_at_what_is_not_finite_is_told(name: str, of: str, value: float) -> None:
    theta, mean, var = torch.randn(4, 9), torch.randn(4), torch.rand(4)
    state = Carried(torch.stack([mean, var]), *some_patches(1, 9)).placed(mean, var, theta, None)
    patches = PatchMoments(torch.randn(1, 9), torch.rand(1, 9), F.normalize(torch.rand(1, 8, 9)), torch.rand(1, 8, 9))
    found = JoinedMoments(torch.randn(4), torch.rand(4), 2, patches)
    attrgetter(of)(found).view(-1)[-1] = value
    _, finite = KERNELS[name].join(state, theta, None, found, (0.01, 0.25))
    assert not finite


@pytest.mark.parametrize(
    ("name", "options"),
    # a ring has no passes over weights, and interpreting takes long
    [(name, options) for name in NAMES for options in (CARRIED, *RINGS) if name != "gpu" or options is CARRIED],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("kind", [CrossIterationBatchNorm2d, CrossIterationBatchNormAct2d])
def test_layer_follows_float64(name, groups, options, kind) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    norm = randomize_norms(kind(8, **options))
    if isinstance(norm, CrossIterationBatchNormAct2d):
        norm.act = nn.ReLU6(inplace=True)
    net = nn.Sequential(conv, norm)
    net64 = copy.deepcopy(net).double()
    norm.bind(conv)
    net64[1].bind(net64[0])
    for _ in range(6):
        y = torch.randn(2, 8, 9, 9)
        with forced(name):
            out = net(y)
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
                p += change
                p64 += change.double()
