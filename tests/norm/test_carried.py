"""The carried window: running statistics that follow weights and images, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import bound_pair, normalised, perturb, pretrained, step
from helpers.models import randomize_norms
from helpers.ways import Net, X, batch, layers
from timm.layers import Conv2dSame
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    Window,
)
from cbn_convert.norm.carried import FIRST_LOOKS, LEAST_VARIANCE, PATCH_LOOKS, PATCH_TURNS, TINY
from cbn_convert.norm.functional import AXES, principal_axes, probes_of
from cbn_convert.norm.kernels import forced
from cbn_convert.norm.moments import InputPatches

DOUBLE = torch.float64


def at_least(var: Tensor) -> Tensor:
    return var + LEAST_VARIANCE * var.mean() + TINY


def waves(rank: int, width: int) -> Tensor:
    """The first probes [F, K]."""
    made = torch.cos(torch.outer(torch.arange(width) + 0.5, torch.arange(rank) * torch.pi / width).double())
    return made / made.norm(dim=0)


def nystrom(covariance: Tensor, probes: Tensor) -> Tensor:
    """Rows u with Σ_k u_k u_kᵀ = ΣV (VᵀΣV)⁻¹ VᵀΣ, by a Cholesky decomposition."""
    along = covariance @ probes
    return torch.linalg.solve_triangular(torch.linalg.cholesky(probes.T @ along), along.T, upper=False)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_ten_steps_against_the_definition(bias: bool, folded: bool) -> None:
    """Statistics, p̄, d and axes as module docstring and paper define them, from unfolded patches; one look in three."""
    conv, norm = bound_pair(bias=bias, folded=folded)
    M, S = norm.running_mean.clone(), norm.running_var.clone()
    p, total, axes, theta0, b0, looks, waiting = None, None, None, None, None, 0, 0
    for i in range(10):
        x = batch(i, n=2 + i % 2)
        theta = conv.weight.detach().flatten(1).clone()
        b = conv.bias.detach().clone() if bias else torch.zeros(4, dtype=DOUBLE)
        waiting += len(x)
        raw = F.conv2d(x, conv.weight.detach(), conv.bias)
        patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
        if p is not None:
            growth = theta.norm(dim=1) / theta0.norm(dim=1)
            M = M + (theta - theta0) @ p + b - b0 + (growth - 1) * (M - theta0 @ p - b0)
            covariance = axes.T @ axes + torch.diag(total - axes.square().sum(0))
            S = S * ((theta @ covariance) * theta).sum(1) / ((theta0 @ covariance) * theta0).sum(1)
        y = norm(conv(x))
        torch.testing.assert_close(y, normalised(norm, raw, M, S))
        if p is None or i % 3 == 0:
            own_p, own = patches.mean(0), patches.T.cov(correction=0)
            probes = waves(AXES, len(own)) if axes is None else (axes / axes.norm(dim=1, keepdim=True)).T
            if p is None:
                p, total, axes = own_p, at_least(own.diag()), nystrom(own, probes)
            share = 1 - (1 - 1 / 20) ** waiting
            of_patches = 1 / min(looks + 1, PATCH_LOOKS)
            own = own + (1 - of_patches) * torch.outer(own_p - p, own_p - p)
            total = (1 - of_patches) * total + of_patches * at_least(own.diag())
            axes = nystrom((1 - of_patches) * axes.T @ axes + of_patches * own, probes)
            p = p + of_patches * (own_p - p)
            mean, var = raw.mean((0, 2, 3)).detach(), raw.var((0, 2, 3), unbiased=False).detach()
            S = (1 - share) * S + share * var + share * (1 - share) * (mean - M) ** 2
            M = M + share * (mean - M)
            looks, waiting = looks + 1, 0
        torch.testing.assert_close(norm.running_mean, M)
        torch.testing.assert_close(norm.running_var, S)
        theta0, b0 = theta, b
        perturb(conv)


PRODUCERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=2, stride=2), (2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 8)),
    "pointwise padded": (lambda: nn.Conv2d(4, 6, 1, padding=1), (2, 4, 3, 3)),
    "grouped dilated": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1), (2, 4, 7, 8)),
    "depthwise same": (lambda: Conv2dSame(4, 4, 3, stride=2, groups=4), (2, 4, 7, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "linear": (lambda: nn.Linear(5, 6), (7, 3, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 4, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 4, 5)),
}


def outputs_of_entries(module: nn.Module, y: Tensor) -> Tensor:
    """Every entry of the patches of the first channel of each group [G, F, m]: what one weight of 1 makes of y."""
    module = copy.deepcopy(module)
    module.bias = None
    groups = getattr(module, "groups", 1)
    weight = module.weight
    transposed = isinstance(module, nn.ConvTranspose2d)
    rows = []
    for g in range(groups):
        channel = g * (weight.shape[1] if transposed else weight.shape[0] // groups)
        own = slice(g * weight.shape[0] // groups, (g + 1) * weight.shape[0] // groups)
        shape = weight[own, 0].shape if transposed else weight[channel].shape
        for index in range(shape.numel()):
            with torch.no_grad():
                weight.zero_()
                target = weight[own, 0] if transposed else weight[channel]
                target[tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))] = 1
            out = module(y)
            rows.append(out[..., channel].flatten() if isinstance(module, nn.Linear) else out[:, channel].flatten())
    return torch.stack(rows).view(groups, -1, rows[0].numel())


def entries_of(kind: str, offset: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A producer, an input of that mean, and every entry of its patches, in float64."""
    make, shape = PRODUCERS[kind]
    torch.manual_seed(0)
    module, y = make().double(), torch.randn(shape, dtype=DOUBLE) + offset
    return module, y, outputs_of_entries(module, y).detach()


def covariance_of(entries: Tensor) -> Tensor:
    centred = entries - entries.mean(2, keepdim=True)
    return centred @ centred.mT / entries.shape[2]


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_mean_and_variance_of_patches(kind: str, offset: float) -> None:
    """Those of the entries themselves, beside a large mean too, where float32 must not lose the variance."""
    module, y, entries = entries_of(kind, offset)
    out_size = module(y).shape[2:]
    mean, var = InputPatches(module, y, out_size, DOUBLE).mean_and_var()
    torch.testing.assert_close(mean, entries.mean(2))
    torch.testing.assert_close(var, entries.var(2, unbiased=False), rtol=1e-6, atol=1e-9)
    single = InputPatches(module.float(), y.float(), out_size, torch.float32).mean_and_var()
    torch.testing.assert_close(single[0].double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single[1].double(), var, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_covariance_of_patches_along_directions(kind: str, offset: float) -> None:
    """That of the entries themselves, beside a large mean too; of all positions and of some."""
    module, y, entries = entries_of(kind, offset)
    out_size, covariance = module(y).shape[2:], covariance_of(entries)
    probes = F.normalize(torch.randn(len(entries), 3, entries.shape[1], dtype=DOUBLE), dim=2)
    along = InputPatches(module, y, out_size, DOUBLE).covariance_along(probes)
    torch.testing.assert_close(along, probes @ covariance, rtol=1e-6, atol=1e-8)
    single = InputPatches(module.float(), y.float(), out_size, torch.float32).covariance_along(probes.float())
    torch.testing.assert_close(single.double(), along, rtol=2e-2, atol=2e-2 if offset else 1e-5)
    some = InputPatches(module.double(), y, out_size, DOUBLE, at_most=5, turn=1)
    if not isinstance(module, (nn.Linear, nn.ConvTranspose2d)):
        kept = torch.zeros(entries.shape[2] // len(y), dtype=torch.bool).view(out_size)
        kept[some.grid] = True
        covariance = covariance_of(entries[:, :, kept.flatten().repeat(len(y))])
        for kernels in (forced("plain"), nullcontext()):
            with kernels:
                torch.testing.assert_close(some.moments(probes)[2], probes @ covariance, rtol=1e-6, atol=1e-8)


def test_patches_are_looked_at_in_one_look_of_four() -> None:
    """After the first looks; mean and variance of the batch join in every look."""
    conv, norm = bound_pair(Window(every=2))
    seen: list[tuple[bool, bool]] = []
    for i in range(FIRST_LOOKS + 4 * 2 * PATCH_TURNS):
        state = norm._sources[0].state
        before = (state.looks, state.patch_looks) if state is not None else (0, 0)
        norm(conv(batch(i)))
        state = norm._sources[0].state
        seen.append((state.looks > before[0], state.patch_looks > before[1]))
    assert seen[:FIRST_LOOKS] == [(True, True)] * FIRST_LOOKS
    later = seen[FIRST_LOOKS:]
    assert [sum(looks) for looks in zip(*later, strict=True)] == [4 * PATCH_TURNS, 4]
    assert all(looked for looked, of_patches in later if of_patches)


def test_the_first_looks_see_borders_as_often_as_the_middle() -> None:
    """The mean patch, relative to that of all positions; zero padding makes it smaller at the edges."""
    conv, norm = nn.Conv2d(1, 2, 3, padding=1), CrossIterationBatchNorm2d(2, window=Window())
    norm.bind(conv)
    norm.running_var.fill_(2)
    for _ in range(FIRST_LOOKS):
        norm(conv(torch.ones(8, 1, 48, 48)))
    everywhere = nn.functional.unfold(torch.ones(1, 1, 48, 48), 3, padding=1).mean((0, 2))
    torch.testing.assert_close(norm._sources[0].state.state.patch_mean[0], everywhere, rtol=0.02, atol=0)


@pytest.mark.parametrize("groups", [1, 3])
def test_axes_find_the_principal_ones(groups: int) -> None:
    """Of a covariance of rank 5 all of it, after a few looks; of one that has more, nearly as much as there can be."""
    torch.manual_seed(0)
    full = torch.randn(groups, 30, 30, dtype=DOUBLE) * torch.logspace(0, -2, 30, dtype=DOUBLE)
    low = torch.zeros_like(full)
    low[:, :, :5] = full[:, :, :5]
    for root, least in ((low, 1 - 1e-6), (full, 0.98)):
        covariance, axes = root @ root.mT, None
        for _ in range(12):
            probes = probes_of(axes, groups, 30, covariance)
            axes = principal_axes(probes, probes @ covariance, covariance.diagonal(dim1=1, dim2=2), torch.zeros(1, 1))
        explained = axes.square().sum((1, 2))
        assert (explained >= least * torch.linalg.eigvalsh(covariance)[:, -AXES:].sum(1)).all()
        assert (torch.linalg.eigvalsh(covariance - axes.mT @ axes) > -1e-9).all()


def test_rescaled_weights_change_nothing() -> None:
    """Whatever is known of the patches: a window of statistics that are far from what the patches would give, too."""
    conv, norm = bound_pair(Window(every=1000))
    norm.eps = 1e-30
    x = batch(0)
    first = norm(conv(x))
    with torch.no_grad():
        conv.weight *= 0.3
        conv.bias *= 0.3
        expected = normalised(norm, conv(x), 0.3 * norm.running_mean, 0.09 * norm.running_var)
    second = norm(conv(x))
    torch.testing.assert_close(second, expected)
    assert first.shape == second.shape


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("measured", [(0.0, 0.0), (0.4, 0.7)])
def test_weights_that_were_zero(measured: tuple[float, float], folded: bool) -> None:
    """Of x = b nothing is carried: as the weights leave zero, the patches say all that is known."""
    conv, norm = bound_pair(Window(every=1000), folded=folded)
    with torch.no_grad():
        conv.weight[0] = 0
        norm.running_mean[0], norm.running_var[0] = measured
    norm(conv(batch(0)))
    carried = norm._sources[0].state.state
    assert [t[0].item() for t in (norm.running_mean, norm.running_var)] == pytest.approx(measured, abs=1e-3)
    with torch.no_grad():
        conv.weight[0] = 0.01 * torch.randn_like(conv.weight[0])
    theta = conv.weight.detach().flatten(1)
    norm(conv(batch(0)))
    mean, var = theta @ carried.patch_mean[0] + conv.bias, theta.square() @ carried.patch_rest[0]
    var = var + (theta @ carried.patch_axes[0].T).square().sum(1)
    assert (norm.running_mean[0].item(), norm.running_var[0].item()) == pytest.approx((mean[0].item(), var[0].item()))


@pytest.mark.parametrize("size", [1e-5, 1e-11, 1e-13, 1e-18])
def test_gradients_of_weights_that_are_almost_zero(size: float) -> None:
    """Folded and unfolded agree, on both sides of what counts as zero."""
    found = []
    for folded in (False, True):
        conv, norm = bound_pair(Window(every=1000), folded=folded)
        with torch.no_grad():
            conv.weight[0] *= size
        for i in range(2):
            conv.zero_grad()
            norm(conv(batch(i))).pow(3).sum().backward()
        found.append(conv.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("turns")
def test_steps_that_do_not_look_take_nothing_of_the_batch() -> None:
    conv, norm = bound_pair(Window(every=4, size=10))
    norm(conv(batch(0)))
    before = copy.deepcopy(norm.state_dict())
    for i in range(1, 4):
        norm(conv(batch(i) * 100))
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(norm.state_dict()[name], before[name])
    norm(conv(batch(4) * 100))
    assert (norm.running_var > 2 * before["running_var"]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("folded", [False, True])
def test_a_batch_that_is_not_finite_is_not_taken_in(bad: float, folded: bool) -> None:
    (conv, norm), (other_conv, other) = (
        bound_pair(Window(every=1), folded=folded),
        bound_pair(Window(every=1), folded=folded),
    )
    spoiled = batch(9)
    spoiled[0, 0, 0, 0] = bad
    norm(conv(spoiled))
    for i in range(3):
        before = {k: v.clone() for k, v in norm.state_dict().items() if "running" in k}
        norm(conv(spoiled))
        assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items() if "running" in k)
        assert torch.isfinite(norm(conv(batch(i)))).all()
        other(other_conv(batch(i)))
    torch.testing.assert_close(norm.running_mean, other.running_mean, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_patches_that_are_too_large_are_not_taken_in(first: bool, folded: bool) -> None:
    """Their variance may overflow where that of what small weights make of them does not."""
    conv, norm = bound_pair(Window(every=1), folded=folded, dtype=torch.float32)
    with torch.no_grad():
        conv.weight *= 1e-9
    if not first:
        norm(conv(batch(0).float()))
    norm(conv(batch(1).float() * 1e20))
    for i in range(3):
        assert torch.isfinite(norm(conv(batch(i).float()))).all()
        perturb(conv)
    assert all(torch.isfinite(t).all() for t in norm.history_tensors())


def test_one_value_per_channel() -> None:
    """A batch of one pooled image has no variance of its own; it counts by its distance from the mean."""
    linear = nn.Linear(5, 6)
    norm = randomize_norms(CrossIterationBatchNorm1d(6, window=Window(every=1, size=50))).bind(linear)
    target = torch.randn(6) * 3
    for _ in range(1500):
        y = torch.randn(1, 5)
        with torch.no_grad():
            linear.bias.copy_(target)
        assert torch.isfinite(norm(linear(y))).all()
    var = linear.weight.detach().square().sum(1)
    assert ((norm.running_var - var).abs() < 0.6 * var).all()
    assert ((norm.running_mean - target).abs() < 1.0 * var.sqrt()).all()


@pytest.mark.usefixtures("turns")
def test_layers_take_turns_in_looking() -> None:
    net = pretrained()
    for i in range(9):
        step(net, batch(i))
    looked = [[] for _ in layers(net)]
    for _ in range(8):
        step(net, batch(3))
        for found, layer in zip(looked, layers(net), strict=True):
            found.append(layer._sources[0].state.last_looked)
    assert [sum(found) for found in looked] == [1, 1, 1, 1]
    assert len({tuple(found) for found in looked}) == 4


def test_the_first_steps_look_all_and_so_do_those_of_a_layer_that_has_lost_its_patches() -> None:
    """p̄ and d are then the plain means of the first looks, here at fixed weights."""
    conv, norm = bound_pair(Window(every=8, size=100_000))
    xs = [torch.randn(2, 3, 6, 6, dtype=torch.float64) for _ in range(FIRST_LOOKS + 16)]
    looked = []
    for x in xs:
        norm(conv(x))
        looked.append(norm._sources[0].state.last_looked)
    assert all(looked[:FIRST_LOOKS])
    assert sum(looked[FIRST_LOOKS:]) == 2

    norm.load_state_dict(norm.state_dict())
    for x in xs[:FIRST_LOOKS]:
        norm(conv(x))
        assert norm._sources[0].state.last_looked
    carried, expected = norm._sources[0].state.state, torch.zeros(())
    for look, x in enumerate(xs[:FIRST_LOOKS], start=1):
        own = nn.functional.unfold(x, conv.kernel_size, padding=conv.padding).mean((0, 2))
        expected = expected + (own - expected) / min(look, PATCH_LOOKS)
    torch.testing.assert_close(carried.patch_mean[0], expected)


def test_a_conv_that_learns_from_now_on_is_looked_at_as_one_that_begins() -> None:
    conv, norm = bound_pair(Window(every=1, size=100_000))
    conv.requires_grad_(False)
    xs = [torch.randn(2, 3, 6, 6, dtype=torch.float64) for _ in range(FIRST_LOOKS)]
    for x in xs:
        norm(conv(x))
    assert not norm.compensated

    conv.requires_grad_()
    for x in xs:
        norm(conv(x))
    patches = torch.stack([nn.functional.unfold(x, conv.kernel_size, padding=conv.padding).mean((0, 2)) for x in xs])
    expected = patches[0]
    for look, own in enumerate(patches[1:], start=2):
        expected = expected + (own - expected) / min(look, PATCH_LOOKS)
    torch.testing.assert_close(norm._sources[0].state.state.patch_mean[0], expected)


@pytest.mark.parametrize(
    ("keywords", "bound", "alone"),
    [
        ({}, ("ema", 8192, "full"), ("ema", 8192, "full")),
        ({"window": 32, "history": "ema"}, ("ema", 32, "full"), ("ring", 2, "straight_through")),
        ({"window": 64, "history": "ema"}, ("ema", 64, "full"), ("ema", 64, "full")),
        ({"compensation": "none"}, ("ema", 8192, "full"), ("ema", 8192, "full")),
        ({"gradient": "current"}, ("ema", 8192, "current"), ("ema", 8192, "current")),
        ({"window": 5}, ("ring", 5, "full"), ("ring", 2, "straight_through")),
        ({"window": 5, "compensation": "none"}, ("ring", 5, "full"), ("ring", 5, "full")),
        ({"window": Window.PAPER}, ("ring", 8, "current"), ("ring", 8, "current")),
        ({"start": "empty"}, ("ema", 8192, "full"), ("ema", 8192, "full")),
    ],
)
def test_what_layers_remember(keywords: dict, bound: tuple[str, int, str], alone: tuple[str, int, str]) -> None:
    """A long window needs a weight that explains the past, or statistics of many images."""
    net = randomize_norms(Net())
    cbn.convert(net, example_input=X, **keywords)
    net.train()(batch(0, dtype=torch.float32))
    windows = [layer._sources[0].state.window for layer in layers(net)]
    assert [(w.history, w.size, w.gradient) for w in windows] == [bound] * 3 + [alone]


def test_images_are_counted_whatever_the_batch() -> None:
    """Eight steps of two images leave the statistics that one of sixteen leaves."""
    torch.manual_seed(0)
    x = 3 + 2 * batch(0, n=2)
    results = []
    for steps, images in ((8, x), (1, x.repeat(8, 1, 1, 1))):
        conv, norm = bound_pair(Window(every=steps, size=30))
        norm(conv(x))
        for _ in range(8 if steps == 8 else 1):
            norm(conv(images))
        results.append((norm.running_mean.clone(), norm.running_var.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
