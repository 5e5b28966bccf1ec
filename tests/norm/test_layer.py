"""The layer as a module: modes, binding, history, copies, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.models import randomize_norms
from timm.layers import BatchNormAct2d
from torch import nn

from cbn_convert.norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNormAct2d,
    history_state,
    load_history_state,
)

RING = {"window": 4}
CARRIED = {"window": 64, "history": "ema", "moments_every": 2}
NEW = {"history": "ema", "start": "empty"}
every_kind = pytest.mark.parametrize("options", [RING, CARRIED, NEW], ids=["ring", "carried", "new"])


def bound(**options) -> nn.Sequential:
    """A conv and the layer bound to it, with statistics of its own; one that carries them trains folded."""
    conv = nn.Conv2d(3, 4, 3, bias=False)
    norm = randomize_norms(CrossIterationBatchNorm2d(4, **(options or RING)))
    return nn.Sequential(conv, norm.bind(conv, folded=norm.window.is_carried))


def train_steps(model: nn.Module, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        out = model(torch.randn(2, 3, 6, 6, generator=generator))
        optimizer.zero_grad()
        out.pow(3).mean().backward()
        optimizer.step()
    return out.detach()


@every_kind
def test_eval_and_state_dict_are_batchnorms(options: dict) -> None:
    layer, plain = randomize_norms(CrossIterationBatchNorm2d(4, **options)), nn.BatchNorm2d(4)
    assert list(layer.state_dict()) == list(plain.state_dict())
    train_steps(nn.Sequential(nn.Conv2d(3, 4, 3), layer), 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


def test_a_ring_is_in_no_state_dict_but_changes_the_output() -> None:
    model = bound()
    train_steps(model, 3)
    fresh = bound()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert not torch.allclose(model(x), fresh(x))


def test_a_carried_window_goes_on_from_the_state_dict_alone() -> None:
    """What it normalises by are the running statistics; what else it remembers says how they follow the weights."""
    model = bound(**CARRIED)
    train_steps(model, 3)
    fresh = bound(**CARRIED)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), fresh(x))


@pytest.mark.parametrize("options", [RING, CARRIED, {**RING, "compensation": "none"}], ids=str)
def test_history_state_resumes_bit_identically(options: dict) -> None:
    model = bound(**options)
    train_steps(model, 6)
    resumed = bound(**options)
    resumed.load_state_dict(model.state_dict())
    load_history_state(resumed, copy.deepcopy(history_state(model)))
    assert torch.equal(train_steps(model, 5, seed=1), train_steps(resumed, 5, seed=1))
    with pytest.raises(ValueError, match="was saved with window"):
        load_history_state(bound(**{**options, "window": 5}), history_state(model))
    with pytest.raises(ValueError, match="other layers"):
        load_history_state(nn.Sequential(model), history_state(model))


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing_and_are_bound_to_their_own_conv(duplicate, options: dict) -> None:
    model = bound(**options)
    train_steps(model, 3)
    state = copy.deepcopy(history_state(model))
    twin = duplicate(model)
    assert twin[1].producers == (twin[0],)
    assert (twin[1].history_state()["sources"][0] or {"seen": 0})["seen"] == 0
    assert twin[1].trains_folded == model[1].trains_folded
    third = duplicate(model)
    load_history_state(third, state)
    train_steps(twin, 5, seed=3)
    assert torch.equal(train_steps(model, 4, seed=2), train_steps(third, 4, seed=2))


def test_frozen_producer_needs_no_moments_and_averages_exactly() -> None:
    model = bound(window=3, affine=False)
    model[0].weight.requires_grad_(False)
    images = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    for x in images:
        out = model(x)
    assert model[1]._sources[0].tap.input is None
    assert model[1].history_state()["sources"][0]["slots"].keys() == {"mean", "var"}
    with torch.no_grad():
        every = model[0](torch.cat(images))
    expected = nn.functional.batch_norm(every, None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    model[0].weight.requires_grad_(True)
    assert torch.isfinite(train_steps(model, 4)).all()


def test_fixed_weights_give_the_statistics_of_the_joined_batch() -> None:
    """Micro-batches of gradient accumulation share their weights, so compensation must be zero."""
    model = bound(window=4, affine=False)
    images = [torch.randn(2, 3, 6, 6) for _ in range(4)]
    for x in images:
        out = model(x)
    expected = nn.functional.batch_norm(model[0](torch.cat(images)), None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_ring_forgets_after_the_window_and_a_carried_one_does_not_grow() -> None:
    ring, carried = bound(**RING), bound(**CARRIED)
    sizes = []
    for _ in range(3):
        train_steps(ring, 4)
        train_steps(carried, 4)
        sizes.append([sum(t.numel() for t in model[1].history_tensors()) for model in (ring, carried)])
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(ring[1].history_state()["sources"][0]["slots"]["covariance"]) == 3
    twin = copy.deepcopy(ring)
    twin[1].reset_history()
    with torch.no_grad():
        for x in [torch.randn(2, 3, 6, 6) for _ in range(4)]:
            outputs = ring(x), twin(x)
    assert torch.equal(*outputs)


@every_kind
def test_evaluation_keeps_no_activation(options: dict) -> None:
    model = bound(**options)
    model.eval()
    model(torch.randn(2, 3, 6, 6))
    assert model[1]._sources[0].tap.input is None
    model.train()
    model(torch.randn(2, 3, 6, 6))
    assert model[1]._sources[0].tap.input is None
    assert model[1]._sources[0].tap.output is None


def test_batchnormact_applies_its_activation() -> None:
    conv = nn.Conv2d(3, 4, 1, bias=False)
    plain = randomize_norms(BatchNormAct2d(4, act_layer=nn.SiLU))
    ours = CrossIterationBatchNormAct2d(4, act_layer=nn.SiLU, window=1)
    ours.load_state_dict(plain.state_dict())
    x = conv(torch.randn(2, 3, 5, 5)).detach()
    torch.testing.assert_close(ours(x.clone()), plain(x.clone()))
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x.clone()), plain.eval()(x.clone()))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Identity])
def test_batchnormact_that_trains_folded_applies_its_activation(act: type[nn.Module]) -> None:
    conv = nn.Conv2d(3, 4, 3)
    norm = randomize_norms(CrossIterationBatchNormAct2d(4, act_layer=act, **CARRIED))
    folded, twin = nn.Sequential(conv, norm), copy.deepcopy(nn.Sequential(conv, norm))
    norm.bind(conv, folded=True)
    twin[1].bind(twin[0])
    for i in range(4):
        torch.testing.assert_close(train_steps(folded, 1, seed=i), train_steps(twin, 1, seed=i), rtol=1e-4, atol=1e-5)


def test_straight_through_gives_the_batch_the_whole_gradient() -> None:
    layer = CrossIterationBatchNorm2d(2, window=4, gradient="straight_through", momentum=1.0).double()
    for _ in range(4):
        x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        out = layer(x)
    count = 4 * x.numel() / 2
    mean, var = layer.running_mean.view(1, -1, 1, 1), layer.running_var.view(1, -1, 1, 1) * (count - 1) / count
    spread = (x - mean).square().mean((0, 2, 3), keepdim=True)
    own_mean = x.mean((0, 2, 3), keepdim=True)
    # the window's values, with the current batch's derivatives
    mean = mean + own_mean - own_mean.detach()
    var = var + spread - spread.detach()
    expected = (x - mean) / torch.sqrt(var + layer.eps)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * direction).sum(), x)
    (want,) = torch.autograd.grad((expected * direction).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"compensation": "guess"}, "projection, taylor, none"),
        ({"compensation": "exact"}, "projection, taylor, none"),
        ({"gradient": "none"}, "gradient"),
        ({"history": "list"}, "ema, ring"),
        ({"burn_in": -1}, "burn_in"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossIterationBatchNorm2d(4, **options)


def test_bind_checks_what_it_is_bound_to() -> None:
    layer = CrossIterationBatchNorm2d(4)
    with pytest.raises(TypeError, match="ReLU"):
        layer.bind(nn.ReLU())
    with pytest.raises(ValueError, match="5 output channels"):
        layer.bind(nn.Conv2d(3, 5, 3))
    with pytest.raises(ValueError, match="cannot bind folded"):
        layer.bind(nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3), folded=True)
    conv = nn.Conv2d(3, 4, 3)
    layer.bind(nn.Conv2d(3, 4, 3)).bind(conv)
    assert layer.producers == (conv,)
    with pytest.raises(RuntimeError, match="has not run"):
        layer(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("folded", [True, False])
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32(dtype: torch.dtype, options: dict, folded: bool) -> None:
    for producer, kind, shape in (
        (nn.Conv2d(3, 8, 3), CrossIterationBatchNorm2d, (2, 3, 6, 6)),
        (nn.Linear(5, 8), CrossIterationBatchNorm1d, (6, 5)),
    ):
        norm = randomize_norms(kind(8, **options))
        full = copy.deepcopy(nn.Sequential(producer, norm))
        norm.bind(producer, folded=folded and norm.window.is_carried)
        full[1].bind(full[0])
        for _ in range(6):
            y = torch.randn(shape)
            with torch.autocast("cpu", dtype=dtype):
                out = norm(producer(y))
            torch.testing.assert_close(out.float(), full(y), rtol=5e-2, atol=5e-2)
            out.float().square().mean().backward()
        slots = norm.history_state()["sources"][0]["slots"]
        assert slots.keys() > {"mean", "var"}
        assert {t.dtype for t in slots.values()} == {torch.float32}
        assert norm.running_var.dtype == torch.float32


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [RING, {**RING, "compensation": "none"}, {**CARRIED, "moments_every": 1}], ids=str)
def test_a_batch_that_is_not_finite_counts_nowhere(options: dict, value: float) -> None:
    model, twin = bound(**options), bound(**options)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        train_steps(net, 5)
    # a single value is enough
    bad = torch.randn(2, 3, 6, 6)
    bad[0, 1, 2, 3] = value
    with torch.no_grad():
        model(bad)
        for key in ("running_mean", "running_var"):  # both at the weights that they have now
            torch.testing.assert_close(model[1].state_dict()[key], twin[1].state_dict()[key])
        assert torch.isfinite(model(torch.randn(2, 3, 6, 6))).all()
    assert torch.isfinite(train_steps(model, 4)).all()


@every_kind
def test_a_first_batch_that_is_not_finite_counts_nowhere(options: dict) -> None:
    model = bound(**options)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(torch.full((2, 3, 6, 6), float("nan")))
    for key in ("1.running_mean", "1.running_var"):
        assert torch.equal(model.state_dict()[key], before[key])
    assert torch.isfinite(train_steps(model, 4)).all()


def test_another_number_of_channels_is_refused() -> None:
    for norm in (CrossIterationBatchNorm2d(4), CrossIterationBatchNorm2d(1, affine=False, track_running_stats=False)):
        with pytest.raises(ValueError, match=r"expected input with \d channels, got \(2, 8, 3, 3\)"):
            norm(torch.randn(2, 8, 3, 3))


@every_kind
def test_fake_tensors_have_no_memory_to_look_at(options: dict) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert bound(**options)(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


def test_one_value_per_channel_is_normalised_by_running_statistics_at_first() -> None:
    layer = CrossIterationBatchNorm2d(4, window=3)
    layer.running_mean.normal_()
    before = layer.running_mean.clone()
    single = torch.randn(1, 4, 1, 1)
    expected = (single - before.view(1, 4, 1, 1)) / (1 + layer.eps) ** 0.5
    torch.testing.assert_close(layer(single), expected)
    assert torch.equal(layer.running_mean, before)
    two = torch.cat([single, torch.randn(1, 4, 1, 1)])
    torch.testing.assert_close(layer(two[1:]), nn.functional.batch_norm(two, None, None, training=True)[1:])


@pytest.mark.parametrize("options", [{**RING, "burn_in": 3}, CARRIED], ids=str)
def test_training_goes_on_after_inference_mode_and_unfreezing(options: dict) -> None:
    model = bound(**options)
    with torch.inference_mode():
        model(torch.randn(2, 3, 6, 6))
    train_steps(model, 1)
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 3, 6, 6))
    model[0].weight.requires_grad_(True)
    train_steps(model, 4)
    slots = model[1].history_state()["sources"][0]["slots"]
    assert slots.keys() > {"mean", "var"}
    assert all(t.abs().max() < 100 for t in slots.values())


@every_kind
def test_a_trainable_bias_of_a_frozen_conv_is_compensated(options: dict) -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    norm = randomize_norms(CrossIterationBatchNorm2d(4, **{**options, "momentum": 0.0})).bind(conv)
    y = torch.randn(2, 3, 6, 6)
    if norm.window.is_carried:
        var, mean = torch.var_mean(conv(y).detach(), (0, 2, 3), correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    expected = [norm(conv(y)) for _ in range(4)][-1]
    with torch.no_grad():
        conv.bias += 5
    torch.testing.assert_close(norm(conv(y)), expected, rtol=1e-4, atol=1e-4)


@every_kind
def test_module_flags_set_directly_and_keyword_calls(options: dict) -> None:
    conv, norm = bound(**options)
    norm.eval()
    norm.training = True
    norm(conv(input=torch.randn(2, 3, 6, 6)))
    assert norm.history_state()["sources"][0]["seen"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        RING,
        {**RING, "compensation": "taylor"},
        {**RING, "compensation": "none"},
        CARRIED,
        {**CARRIED, "compensation": "none"},
    ],
    ids=str,
)
def test_cuda_agrees_with_cpu(options: dict) -> None:
    cpu = bound(**options).double()
    gpu = copy.deepcopy(cpu).cuda()
    for _ in range(6):
        y = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        for model, x in ((cpu, y), (gpu, y.cuda())):
            model.zero_grad()
            out = model(x)
            out.pow(3).mean().backward()
        torch.testing.assert_close(gpu[0].weight.grad.cpu(), cpu[0].weight.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gpu[1].running_var.cpu(), cpu[1].running_var)
        with torch.no_grad():
            step = 0.1 * torch.randn_like(cpu[0].weight)
            cpu[0].weight += step
            gpu[0].weight += step.cuda()
