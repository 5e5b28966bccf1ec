"""The carried window: running statistics that follow weights and images, and what becomes of them outside of a step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from helpers.ways import Net, X, batch, layers
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    Window,
    history_state,
    load_history_state,
)
from cbn_convert.norm.carried import FIRST_LOOKS, LEAST_VARIANCE, TINY, CarriedWindow
from cbn_convert.norm.moments import InputPatches
from cbn_convert.norm.ring import Ring

DOUBLE = torch.float64


def pair(window: Window | None = None, bias: bool = True, folded: bool = False, dtype: torch.dtype = DOUBLE):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).to(dtype)
    norm = CrossIterationBatchNorm2d(4, window=window or Window(every=3, size=20)).to(dtype).bind(conv, folded=folded)
    return conv, randomize_norms(norm)


def shake(module: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p) * p.std()


def normalised(norm: nn.Module, x: Tensor, M: Tensor, S: Tensor) -> Tensor:
    M, S, gamma, beta = (t.view(1, -1, 1, 1) for t in (M, S, norm.weight, norm.bias))
    return gamma * (x - M) / torch.sqrt(S + norm.eps) + beta


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_ten_steps_against_the_definition(bias: bool, folded: bool) -> None:
    """Statistics, p̄ and d as module docstring and paper define them, from unfolded patches; every third step looks."""
    conv, norm = pair(bias=bias, folded=folded)
    M, S = norm.running_mean.clone(), norm.running_var.clone()
    p, d, theta0, b0, looks, waiting = None, None, None, None, 0, 0
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
            S = S * (theta**2 @ d) / (theta0**2 @ d)
        y = norm(conv(x))
        torch.testing.assert_close(y, normalised(norm, raw, M, S))
        if p is None or i % 3 == 0:
            own_p, own_d = patches.mean(0), patches.var(0, unbiased=False)
            if p is None:
                p, d = own_p, own_d + LEAST_VARIANCE * own_d.mean() + TINY
            share = 1 - (1 - 1 / 20) ** waiting
            of_patches = max(share, 1 / (looks + 1))
            own_d = own_d + (1 - of_patches) * (own_p - p) ** 2
            d = d + of_patches * (own_d + LEAST_VARIANCE * own_d.mean() + TINY - d)
            p = p + of_patches * (own_p - p)
            mean, var = raw.mean((0, 2, 3)).detach(), raw.var((0, 2, 3), unbiased=False).detach()
            S = (1 - share) * S + share * var + share * (1 - share) * (mean - M) ** 2
            M = M + share * (mean - M)
            looks, waiting = looks + 1, 0
        torch.testing.assert_close(norm.running_mean, M)
        torch.testing.assert_close(norm.running_var, S)
        theta0, b0 = theta, b
        shake(conv)


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


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_mean_and_variance_of_patches(kind: str, offset: float) -> None:
    """Those of the entries themselves, beside a large mean too, where float32 must not lose the variance."""
    make, shape = PRODUCERS[kind]
    torch.manual_seed(0)
    module, y = make().double(), torch.randn(shape, dtype=DOUBLE) + offset
    entries = outputs_of_entries(module, y).detach()
    out_size = module(y).shape[2:]
    mean, var = InputPatches(module, y, out_size, DOUBLE).mean_and_var()
    torch.testing.assert_close(mean, entries.mean(2))
    torch.testing.assert_close(var, entries.var(2, unbiased=False), rtol=1e-6, atol=1e-9)
    single = InputPatches(module.float(), y.float(), out_size, torch.float32).mean_and_var()
    torch.testing.assert_close(single[0].double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single[1].double(), var, rtol=2e-2, atol=2e-3)


def test_rescaled_weights_change_nothing() -> None:
    """Whatever p̄ and d are: a window of statistics that are far from what the patches would give, too."""
    conv, norm = pair(Window(every=1000))
    norm.eps = 0.0
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
    """Of x = b nothing is carried: as the weights leave zero, p̄ and d say all that is known."""
    conv, norm = pair(Window(every=1000), folded=folded)
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
    mean, var = theta @ carried.patch_mean[0] + conv.bias, theta.square() @ carried.patch_var[0]
    assert (norm.running_mean[0].item(), norm.running_var[0].item()) == pytest.approx((mean[0].item(), var[0].item()))


@pytest.mark.parametrize("size", [1e-5, 1e-11, 1e-13, 1e-18])
def test_gradients_of_weights_that_are_almost_zero(size: float) -> None:
    """Folded and unfolded agree, on both sides of what counts as zero."""
    found = []
    for folded in (False, True):
        conv, norm = pair(Window(every=1000), folded=folded)
        with torch.no_grad():
            conv.weight[0] *= size
        for i in range(2):
            conv.zero_grad()
            norm(conv(batch(i))).pow(3).sum().backward()
        found.append(conv.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("turns")
def test_steps_that_do_not_look_take_nothing_of_the_batch() -> None:
    conv, norm = pair(Window(every=4, size=10))
    norm(conv(batch(0)))
    before = copy.deepcopy(norm.state_dict())
    for i in range(1, 4):
        norm(conv(batch(i) * 100))
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(norm.state_dict()[name], before[name])
    norm(conv(batch(4) * 100))
    assert (norm.running_var > 2 * before["running_var"]).all()


def pretrained(seed: int = 0, **keywords: object) -> Net:
    torch.manual_seed(seed)
    net = randomize_norms(Net()).double()
    cbn.convert(net, example_input=X.double(), **keywords)  # type: ignore[arg-type]
    return net.train()


def step(net: nn.Module, x: Tensor, lr: float = 0.002) -> Tensor:
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= lr * p.grad
    return out.detach()


def same(a: nn.Module, b: nn.Module) -> None:
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


@pytest.mark.parametrize("order", ["weights first", "history first"])
@pytest.mark.parametrize("steps", [0, 1, 2, 11])
def test_resume_is_bit_identical(steps: int, order: str) -> None:
    net = pretrained()
    for i in range(steps):
        step(net, batch(i))
    if order == "weights first":
        weights, history = copy.deepcopy(net.state_dict()), pickle.loads(pickle.dumps(history_state(net)))
    else:
        history = pickle.loads(pickle.dumps(history_state(net)))
        weights = copy.deepcopy(net.state_dict())
    other = pretrained(seed=5)
    other.load_state_dict(weights)
    load_history_state(other, history)
    for i in range(20, 40):
        assert torch.equal(step(net, batch(i)), step(other, batch(i)))
    same(net, other)


def test_resume_from_a_state_dict_alone_loses_little() -> None:
    """As from any other framework's checkpoint: p̄ and d come back with the first batch."""
    net = pretrained()
    for i in range(60):
        step(net, batch(i, n=4))
    other = pretrained(seed=5)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    for i in range(60, 70):
        a, b = step(net, batch(i, n=4)), step(other, batch(i, n=4))
        assert (a - b).norm() < 1e-2 * a.norm()
    for a, b in zip(layers(net), layers(other), strict=True):
        assert (a.running_mean - b.running_mean).norm() < 1e-2 * a.running_var.sqrt().norm()
        assert (a.running_var - b.running_var).norm() < 1e-2 * a.running_var.norm()


def test_a_state_of_another_window_is_refused() -> None:
    net = pretrained()
    step(net, batch(0))
    state = history_state(net)
    for keywords in (
        {"window": 4},
        {"window": 500, "history": "ema"},
        {"window": Window.PAPER},
        {"gradient": "current"},
    ):
        with pytest.raises(ValueError, match="history was saved with window"):
            load_history_state(pretrained(**keywords), state)
    state["stem.1"]["sources"][0]["slots"]["patch_var"][:] = float("nan")
    with pytest.raises(ValueError, match="patch_var that is not finite"):
        load_history_state(pretrained(), state)


@pytest.mark.parametrize("measured", [True, False])
def test_converting_and_loading_in_either_order(measured: bool) -> None:
    """To the bit; where the weights that are loaded are new ones, and where they were trained from scratch too."""
    torch.manual_seed(3)
    source = Net().double()
    if measured:
        randomize_norms(source)
    weights = source.state_dict()
    runs = []
    for order in ("convert", "load"):
        torch.manual_seed(4)
        net = randomize_norms(Net()).double() if not measured else Net().double()
        if order == "convert":
            cbn.convert(net, example_input=X.double())
            net.train()(batch(7))
        net.load_state_dict(weights)
        if order == "load":
            cbn.convert(net, example_input=X.double())
        runs.append([step(net.train(), batch(i)) for i in range(12)])
        assert all(isinstance(s.state, CarriedWindow if measured else Ring) for n in layers(net) for s in n._sources)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_run_from_scratch_goes_on_as_one_with_statistics() -> None:
    net = Net().double()
    cbn.convert(net, example_input=X.double())
    for i in range(5):
        step(net.train(), batch(i))
    assert all(isinstance(s.state, Ring) for n in layers(net) for s in n._sources)
    weights = copy.deepcopy(net.state_dict())
    runs = []
    for order in ("convert", "load"):
        other = Net().double()
        if order == "load":
            other.load_state_dict(weights)
        cbn.convert(other, example_input=X.double())
        if order == "convert":
            other.load_state_dict(weights)
        runs.append([step(other.train(), batch(i)) for i in range(6, 12)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("ask", ["train(False)", "eval()", "state_dict", "copy", "revert"])
def test_statistics_are_those_of_the_weights_as_they_are(ask: str, folded: bool) -> None:
    """Not of the step before: what a step in which nothing is looked at would normalise by."""
    model, ahead = (nn.Sequential(*pair(Window(every=1000), folded=folded)) for _ in range(2))
    for net in (model, ahead):
        net(batch(0))
        torch.manual_seed(1)
        shake(net[0])
    before = model[1].running_mean.clone()
    ahead(batch(1))
    if ask == "state_dict":
        stored = model.state_dict()
    elif ask == "copy":
        stored = copy.deepcopy(model).state_dict()
    elif ask == "revert":
        stored = dict(cbn.revert(model).named_buffers())
    else:
        model.train(False) if ask == "train(False)" else model.eval()
        stored = dict(model.named_buffers())
    assert not torch.allclose(stored["1.running_mean"], before)
    torch.testing.assert_close(stored["1.running_mean"], ahead[1].running_mean)
    torch.testing.assert_close(stored["1.running_var"], ahead[1].running_var)


def test_a_norm_that_is_frozen_by_eval_stays_as_it_is() -> None:
    conv, norm = pair(folded=True)
    model = nn.Sequential(conv, norm)
    model(batch(0))
    norm.eval()
    before = norm.running_mean.clone()
    for i in range(3):
        x = batch(i)
        torch.testing.assert_close(
            model(x), normalised(norm, F.conv2d(x, *conv.parameters()), before, norm.running_var)
        )
        shake(conv)
    assert torch.equal(norm.running_mean, before)


def test_statistics_that_somebody_else_writes_hold_at_the_weights_as_they_are() -> None:
    """As where averaged weights and statistics are swapped in."""
    conv, norm = pair(Window(every=1000))
    norm(conv(batch(0)))
    with torch.no_grad():
        conv.weight += 1.0
        norm.running_mean.fill_(0.7)
        norm.running_var.fill_(3.0)
    x = conv(batch(1))
    torch.testing.assert_close(norm(x), normalised(norm, x, *(torch.full((4,), v, dtype=DOUBLE) for v in (0.7, 3.0))))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
def test_statistics_in_memory_that_layers_share_follow_the_weights(folded: bool, dtype: torch.dtype) -> None:
    """As where somebody puts all buffers into one flat tensor: a write to any of them counts as one to all."""
    models = [nn.Sequential(*pair(folded=folded, dtype=dtype)) for _ in range(2)]
    norm = models[1][1]
    flat = torch.cat([norm.running_mean, norm.running_var, torch.zeros(4, dtype=dtype)])
    norm.running_mean, norm.running_var, others = flat.split(4)
    for i in range(6):
        outputs = []
        for model in models:
            outputs.append(model(batch(i).to(dtype)))
            torch.manual_seed(i)
            shake(model[0])
        assert torch.equal(*outputs)
        others += 1


def test_statistics_that_a_process_group_hands_out_follow_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel writes the buffers of rank 0, of the step before, over those of all in every step."""
    monkeypatch.setattr("cbn_convert.norm.source.world_size", lambda: 2)
    (conv, norm), (other_conv, other) = pair(Window(every=1000)), pair(Window(every=1000))
    for model in ((conv, norm), (other_conv, other)):
        model[1](model[0](batch(0)))
    torch.manual_seed(9)
    shake(conv)
    torch.manual_seed(9)
    shake(other_conv)
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(norm, name).clone())
    torch.testing.assert_close(norm(conv(batch(1))), other(other_conv(batch(1))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("folded", [False, True])
def test_a_batch_that_is_not_finite_is_not_taken_in(bad: float, folded: bool) -> None:
    (conv, norm), (other_conv, other) = pair(Window(every=1), folded=folded), pair(Window(every=1), folded=folded)
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
    conv, norm = pair(Window(every=1), folded=folded, dtype=torch.float32)
    with torch.no_grad():
        conv.weight *= 1e-9
    if not first:
        norm(conv(batch(0).float()))
    norm(conv(batch(1).float() * 1e20))
    for i in range(3):
        assert torch.isfinite(norm(conv(batch(i).float()))).all()
        shake(conv)
    assert all(torch.isfinite(t).all() for t in norm.history_tensors())


def test_copies_keep_their_statistics_and_lose_what_the_first_batch_brings_back() -> None:
    net = pretrained()
    for i in range(4):
        step(net, batch(i))
    averaged = AveragedModel(net)
    for twin in (copy.deepcopy(net), averaged.module):
        assert not any(layer.compensated for layer in layers(twin))
        assert torch.equal(net.eval()(batch(9)), twin.eval()(batch(9)))
        net.train()
        expected = {k: v.clone() for k, v in net.state_dict().items()}
        step(twin.train(), batch(8))
        assert all(torch.equal(v, expected[k]) for k, v in net.state_dict().items())


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
    conv, norm = pair(Window(every=8, size=100_000))
    xs = [torch.randn(2, 3, 6, 6, dtype=torch.float64) for _ in range(FIRST_LOOKS + 16)]
    looked = []
    for x in xs:
        norm(conv(x))
        looked.append(norm._sources[0].state.last_looked)
    assert all(looked[:FIRST_LOOKS])
    assert sum(looked[FIRST_LOOKS:]) == 2
    patches = nn.functional.unfold(torch.cat(xs[:FIRST_LOOKS]), conv.kernel_size, padding=conv.padding)

    norm.load_state_dict(norm.state_dict())
    for x in xs[:FIRST_LOOKS]:
        norm(conv(x))
        assert norm._sources[0].state.last_looked
    carried = norm._sources[0].state.state
    torch.testing.assert_close(carried.patch_mean[0], patches.mean((0, 2)), rtol=1e-2, atol=1e-2)


def test_no_batch_size_is_needed_and_new_layers_are_named() -> None:
    with pytest.warns(DeprecationWarning, match="needs no batch_size"):
        report = cbn.convert(Net(), example_input=X, batch_size=4)
    assert report.without_statistics
    assert "none has pretrained statistics" in str(report)
    report = cbn.convert(randomize_norms(Net()), example_input=X)
    assert [row.statistics for row in report] == ["pretrained"] * 4
    assert [row.form for row in report] == ["folded", "folded", "folded", "unfolded"]
    assert report.to_dict()["folded"] == 3
    mixed = randomize_norms(Net())
    mixed.last.reset_running_stats()
    assert [row.statistics for row in cbn.convert(mixed, example_input=X)] == ["pretrained"] * 3 + ["new"]


def test_a_compiled_model_converts_the_module_inside() -> None:
    net = randomize_norms(Net())
    report = cbn.convert(torch.compile(net), example_input=X)
    assert report.counts["compensated"] == 3
    assert len(layers(net)) == 4


def test_a_model_without_values_converts_and_runs() -> None:
    with FakeTensorMode():
        model = randomize_norms(Net())
        report = cbn.convert(model, example_input=torch.randn(1, 3, 12, 12))
        model.train()(torch.randn(2, 3, 12, 12)).sum().backward()
    assert {row.statistics for row in report} == {"pretrained"}


def test_frozen_batchnorm_keeps_what_it_is() -> None:
    """Mean 0 and variance 1 are its function, not what nobody has measured yet."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4))
    (row,) = cbn.convert(model, example_input=torch.randn(1, 3, 12, 12))
    assert row.statistics == "pretrained"
    x = 10 * torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0.1, atol=0.1)


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
        ({"start": "empty"}, ("ring", 2, "full"), ("ring", 2, "straight_through")),
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
        conv, norm = pair(Window(every=steps, size=30))
        norm(conv(x))
        for _ in range(8 if steps == 8 else 1):
            norm(conv(images))
        results.append((norm.running_mean.clone(), norm.running_var.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def narrowing(width: int) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 5, 3), nn.BatchNorm2d(5))
    cbn.convert(randomize_norms(model), example_input=torch.zeros(2, 3, 9, 9))
    return model


@pytest.mark.parametrize("folded", [True, False])
def test_a_layer_that_is_pruned_begins_anew_from_its_running_statistics(folded: bool) -> None:
    """As tools that leave channels out do it: tensors are replaced, the modules stay."""
    pruned, fresh = narrowing(6), narrowing(4)
    for norm in layers(pruned) + layers(fresh):
        norm.bind(*norm.producers, folded=folded)
    for _ in range(3):
        pruned(torch.randn(2, 3, 9, 9))
    for module, own in zip(pruned, fresh, strict=True):
        for name, p in own.named_parameters():
            setattr(module, name, nn.Parameter(p.detach().clone()))
        for name, buffer in own.named_buffers():
            setattr(module, name, buffer.clone())
    pruned[0].out_channels = pruned[1].num_features = pruned[2].in_channels = 4
    for norm in layers(pruned):
        norm.iteration = 0  # the turns of the other
    pruned.state_dict()
    for _ in range(3):
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(pruned(x), fresh(x))
    torch.testing.assert_close(pruned.state_dict(), fresh.state_dict())
