"""The layer as a module: modes, binding, history, copies, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from cbn_convert.norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNormAct2d,
    history_state,
    load_history_state,
)


def bound(window: int = 4, **options) -> nn.Sequential:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    return nn.Sequential(conv, CrossIterationBatchNorm2d(4, window=window, **options).bind(conv))


def train_steps(model: nn.Module, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        out = model(torch.randn(2, 3, 6, 6, generator=generator))
        optimizer.zero_grad()
        out.pow(3).mean().backward()
        optimizer.step()
    return out.detach()


def test_eval_and_state_dict_are_batchnorms() -> None:
    layer, plain = CrossIterationBatchNorm2d(4), nn.BatchNorm2d(4)
    assert list(layer.state_dict()) == list(plain.state_dict())
    train_steps(nn.Sequential(nn.Conv2d(3, 4, 3), layer), 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


def test_history_is_in_no_state_dict_but_changes_the_output() -> None:
    model = bound()
    train_steps(model, 3)
    fresh = bound()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert not torch.allclose(model(x), fresh(x))


@pytest.mark.parametrize("history", ["ring", "ema"])
def test_history_state_resumes_bit_identically(history: str) -> None:
    model = bound(history=history)
    train_steps(model, 6)
    resumed = bound(history=history)
    resumed.load_state_dict(model.state_dict())
    load_history_state(resumed, copy.deepcopy(history_state(model)))
    assert torch.equal(train_steps(model, 5, seed=1), train_steps(resumed, 5, seed=1))
    with pytest.raises(ValueError, match="window 4"):
        load_history_state(bound(window=3), history_state(model))
    with pytest.raises(ValueError, match="other layers"):
        load_history_state(nn.Sequential(model), history_state(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing_and_are_bound_to_their_own_conv(duplicate) -> None:
    model = bound()
    train_steps(model, 3)
    state = copy.deepcopy(history_state(model))
    twin = duplicate(model)
    assert twin[1].producers == (twin[0],)
    assert twin[1].history_state()["sources"][0]["seen"] == 0
    third = duplicate(model)
    load_history_state(third, state)
    train_steps(twin, 5, seed=3)
    assert torch.equal(train_steps(model, 4, seed=2), train_steps(third, 4, seed=2))


def test_frozen_producer_needs_no_moments_and_averages_exactly() -> None:
    model = bound(window=3)
    model[0].weight.requires_grad_(False)
    images = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    for x in images:
        out = model(x)
    assert model[1]._sources[0].tap.input is None
    assert model[1]._sources[0].history._slots.covariance is None
    with torch.no_grad():
        every = model[0](torch.cat(images))
    expected = nn.functional.batch_norm(every, None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    model[0].weight.requires_grad_(True)
    assert torch.isfinite(train_steps(model, 4)).all()


def test_fixed_weights_give_the_statistics_of_the_joined_batch() -> None:
    """Micro-batches of gradient accumulation share their weights, so compensation must be zero."""
    model = bound(window=4)
    images = [torch.randn(2, 3, 6, 6) for _ in range(4)]
    for x in images:
        out = model(x)
    expected = nn.functional.batch_norm(model[0](torch.cat(images)), None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_ring_forgets_after_the_window_and_ema_does_not_grow() -> None:
    ring, ema = bound(window=4), bound(window=4, history="ema")
    for model in (ring, ema):
        train_steps(model, 9)
    assert ring[1]._sources[0].history._slots.covariance.shape[1] == 3
    assert ema[1]._sources[0].history._slots.covariance.shape[1] == 1
    twin = copy.deepcopy(ring)
    twin[1].reset_history()
    with torch.no_grad():
        for x in [torch.randn(2, 3, 6, 6) for _ in range(4)]:
            outputs = ring(x), twin(x)
    assert torch.equal(*outputs)


def test_evaluation_keeps_no_activation() -> None:
    model = bound()
    model.eval()
    model(torch.randn(2, 3, 6, 6))
    assert model[1]._sources[0].tap.input is None
    model.train()
    model(torch.randn(2, 3, 6, 6))
    assert model[1]._sources[0].tap.input is None


def test_batchnormact_applies_its_activation() -> None:
    conv = nn.Conv2d(3, 4, 1, bias=False)
    plain = BatchNormAct2d(4, act_layer=nn.SiLU)
    ours = CrossIterationBatchNormAct2d(4, act_layer=nn.SiLU, window=1)
    x = conv(torch.randn(2, 3, 5, 5)).detach()
    torch.testing.assert_close(ours(x.clone()), plain(x.clone()))
    assert torch.equal(
        ours.eval()(x.clone()), ours.act(nn.functional.batch_norm(x, ours.running_mean, ours.running_var))
    )


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
        ({"compensation": "guess"}, "projection, taylor, exact, none"),
        ({"gradient": "none"}, "gradient"),
        ({"history": "list"}, "ring, ema"),
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
    with pytest.raises(TypeError, match="exact"):
        CrossIterationBatchNorm2d(4, compensation="exact").bind(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match="5 output channels"):
        layer.bind(nn.Conv2d(3, 5, 3))
    conv = nn.Conv2d(3, 4, 3)
    layer.bind(nn.Conv2d(3, 4, 3)).bind(conv)
    assert layer.producers == (conv,)
    with pytest.raises(RuntimeError, match="has not run"):
        layer(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("compensation", ["projection", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32(dtype: torch.dtype, compensation: str) -> None:
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(5, 8)
    models = [
        (conv, CrossIterationBatchNorm2d(8, window=4, compensation=compensation).bind(conv), (2, 3, 6, 6)),
        (linear, CrossIterationBatchNorm1d(8, window=4, compensation=compensation).bind(linear), (6, 5)),
    ]
    for producer, norm, shape in models:
        full = copy.deepcopy(nn.Sequential(producer, norm))
        for _ in range(6):
            y = torch.randn(shape)
            with torch.autocast("cpu", dtype=dtype):
                out = norm(producer(y))
            torch.testing.assert_close(out.float(), full(y), rtol=5e-2, atol=5e-2)
            out.float().square().mean().backward()
        assert {t.dtype for t in norm._sources[0].history._slots if t is not None} == {torch.float32}
        assert norm.running_var.dtype == torch.float32


@pytest.mark.parametrize("history", ["ring", "ema"])
def test_a_batch_that_is_not_finite_does_not_poison_the_history(history: str) -> None:
    model = bound(history=history)
    train_steps(model, 5)
    with torch.no_grad():
        model(torch.full((2, 3, 6, 6), float("inf")))
        assert torch.isfinite(model(torch.randn(2, 3, 6, 6))).all()


def test_another_number_of_channels_is_refused() -> None:
    for norm in (CrossIterationBatchNorm2d(4), CrossIterationBatchNorm2d(1, affine=False, track_running_stats=False)):
        with pytest.raises(ValueError, match=r"expected input with \d channels, got \(2, 8, 3, 3\)"):
            norm(torch.randn(2, 8, 3, 3))


def test_fake_tensors_have_no_memory_to_look_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        conv = torch.nn.Conv2d(3, 4, 3)
        norm = CrossIterationBatchNorm2d(4).bind(conv)
        assert norm(conv(torch.randn(2, 3, 8, 8))).shape == (2, 4, 6, 6)


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


def test_training_goes_on_after_inference_mode_and_unfreezing() -> None:
    model = bound(burn_in=3)
    with torch.inference_mode():
        model(torch.randn(2, 3, 6, 6))
    train_steps(model, 1)
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 3, 6, 6))
    model[0].weight.requires_grad_(True)
    train_steps(model, 4)
    assert model[1]._sources[0].history._slots.covariance.abs().max() < 100


def test_a_trainable_bias_of_a_frozen_conv_is_compensated() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.weight.requires_grad_(False)
    norm = CrossIterationBatchNorm2d(4, window=4).bind(conv)
    y = torch.randn(2, 3, 6, 6)
    expected = [norm(conv(y)) for _ in range(4)][-1]
    with torch.no_grad():
        conv.bias += 5
    torch.testing.assert_close(norm(conv(y)), expected, rtol=1e-4, atol=1e-4)


def test_module_flags_set_directly_and_keyword_calls() -> None:
    conv = nn.Conv2d(3, 4, 3)
    norm = CrossIterationBatchNorm2d(4).bind(conv)
    norm.eval()
    norm.training = True
    norm(conv(input=torch.randn(2, 3, 6, 6)))
    assert norm.history_state()["sources"][0]["seen"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("compensation", ["projection", "taylor", "exact", "none"])
def test_cuda_agrees_with_cpu(compensation: str, history: str) -> None:
    cpu = bound(compensation=compensation, history=history).double()
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
