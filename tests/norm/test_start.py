"""A window that starts from the running statistics."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import randomize_norms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d
from ways import Net, X, assert_same_state, batch, converted, layers, step

import cbn_convert as cbn
from cbn_convert.errors import ConversionError
from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, history_state, load_history_state
from cbn_convert.norm.functional import Moments, carry_over, explaining
from cbn_convert.norm.kernels import forced

K = 4


def pretrained(seed: int = 0, **options) -> nn.Module:
    """A converted net of which the running statistics are not those of a new one."""
    net = converted(seed, start="running", **options)
    torch.manual_seed(seed + 100)
    for layer in layers(net):
        layer.running_mean.normal_(0.0, 0.5)
        layer.running_var.uniform_(0.5, 2.0)
    return net


def pair(bias: bool = True, **options) -> tuple[nn.Conv2d, CrossIterationBatchNorm2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).double()
    norm = CrossIterationBatchNorm2d(4, window=K, history="ema", start="running", **options).double().bind(conv)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 0.6)  # of which the patches of a batch explain enough
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return conv, norm


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)


def mixed(mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (1 - 1/K) of one population and 1/K of the batch x."""
    own_mean, own_var = statistics(x)
    M = (1 - 1 / K) * mean + own_mean / K
    second = (1 - 1 / K) * (var + mean**2) + (own_var + own_mean**2) / K
    return M, second - M**2


def normalised(norm: nn.Module, x: Tensor, M: Tensor, S: Tensor) -> Tensor:
    M, S, gamma, beta = (t.view(1, -1, 1, 1) for t in (M, S, norm.weight, norm.bias))
    return gamma * (x - M) / torch.sqrt(S + norm.eps) + beta


@pytest.mark.parametrize("compensation", ["projection", "taylor", "exact", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_two_steps_against_the_definition(bias: bool, compensation: str) -> None:
    """Under new weights, the start's statistics respond as the first batch's patches do; value and gradients."""
    conv, norm = pair(bias, compensation=compensation)
    M, S = mixed(norm.running_mean.clone(), norm.running_var.clone(), conv(batch(0)))
    torch.testing.assert_close(norm(conv(batch(0))), normalised(norm, conv(batch(0)), M, S))

    patches = nn.functional.unfold(batch(0), 3).transpose(1, 2).flatten(0, 1)
    old = conv.weight.detach().flatten(1).clone()
    old_bias = conv.bias.detach().clone() if bias else torch.zeros(4).double()
    with torch.no_grad():
        for p in conv.parameters():
            p += 0.1 * torch.randn_like(p)
    new, new_bias = conv.weight.flatten(1), conv.bias if bias else torch.zeros(4).double()
    M, S = M.detach(), S.detach()
    if compensation != "none":
        sigma = torch.cov(patches.T, correction=0)
        shift = (new - old) @ patches.mean(0) + new_bias - old_bias
        response, before = new @ sigma, ((old @ sigma) * old).sum(1)
        across = (response * old).sum(1)
        grown = {
            "projection": S * (across / before) ** 2,
            "taylor": (S + 2 * (across - before) - shift**2).clamp_min(0),
            "exact": S * (response * new).sum(1) / before,
        }
        M, S = M + shift, grown[compensation]
    x = conv(batch(1))
    expected = normalised(norm, x, *mixed(M, S, x))
    actual = norm(conv(batch(1)))
    torch.testing.assert_close(actual, expected)
    if compensation != "none":
        parameters = [*conv.parameters(), norm.weight]
        gradients = [torch.autograd.grad(y.pow(3).sum(), parameters) for y in (actual, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_a_layer_without_a_weight_of_its_own_starts_too() -> None:
    norm = CrossIterationBatchNorm2d(3, window=K, history="ema", start="running").double()
    norm.running_mean.normal_()
    M, S = mixed(norm.running_mean.clone(), norm.running_var.clone(), batch(0))
    torch.testing.assert_close(norm(batch(0)), normalised(norm, batch(0), M, S))


def test_a_new_layer_starts_with_its_first_batch() -> None:
    norm = CrossIterationBatchNorm2d(3, window=K, history="ema", start="running").double()
    torch.testing.assert_close(norm(batch(0)), nn.BatchNorm2d(3).double()(batch(0)))


def test_window_one_is_batch_norm() -> None:
    norm, plain = CrossIterationBatchNorm2d(3, window=1, history="ema", start="running"), nn.BatchNorm2d(3)
    for layer in (norm, plain):
        layer.running_mean.fill_(0.3)
    x = batch(0).float()
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_a_ring_has_no_such_start() -> None:
    with pytest.raises(ValueError, match=r'start="running" needs history="ema"'):
        CrossIterationBatchNorm2d(3, history="ring", start="running")
    with pytest.raises(ConversionError, match=r'start="running" needs history="ema"'):
        converted(history="ring", start="running")


@pytest.mark.parametrize(
    ("measured", "options", "bound", "alone"),
    [
        (False, {}, ("empty", 2), ("empty", 2, "straight_through")),
        (True, {}, ("running", 4096), ("running", 4096, "full")),
        (True, {"batch_size": 8}, ("running", 1024), ("running", 1024, "full")),
        (False, {"batch_size": 100}, ("empty", 2), ("empty", 2, "straight_through")),
        (True, {"batch_size": 100}, ("running", 81), ("running", 81, "full")),
        (True, {"start": "empty"}, ("empty", 2), ("empty", 2, "straight_through")),
        (False, {"start": "running"}, ("running", 2), ("running", 2, "straight_through")),
        (True, {"window": 5}, ("running", 5), ("running", 2, "straight_through")),
        (True, {"window": 32}, ("running", 32), ("running", 32, "full")),
        (True, {"window": 100}, ("running", 100), ("running", 100, "full")),
        (True, {"compensation": "none"}, ("running", 4096), ("running", 4096, "full")),
        (True, {"compensation": "none", "window": 5}, ("running", 5), ("running", 5, "straight_through")),
        (True, {"history": "ring"}, ("empty", 8), ("empty", 2, "straight_through")),
        (True, {"gradient": "current"}, ("running", 4096), ("running", 4096, "current")),
    ],
)
def test_converts_defaults(measured: bool, options: dict, bound: tuple[str, int], alone: tuple[str, int, str]) -> None:
    """A long window where there are statistics to start from; a short one elsewhere."""
    model = randomize_norms(Net()) if measured else Net()
    cbn.convert(model, example_input=X, **options)
    *followed, last = layers(model)
    assert [(layer.start, layer.window) for layer in followed] == [bound] * 3
    assert (last.start, last.window, last.gradient) == alone


def test_layers_without_a_weight_are_alike_where_no_other_follows_its_own() -> None:
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    cbn.convert(model, example_input=X)
    (layer,) = layers(model)
    assert (layer.start, layer.window, layer.gradient) == ("running", 4096, "full")


@pytest.mark.parametrize(("sync", "expected"), [(False, 4096), (True, 1024)])
def test_a_window_over_the_batches_of_all_ranks_holds_as_many_images(
    sync: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbn_convert.conversion.converting.world_size", lambda: 4)
    model = randomize_norms(Net())
    cbn.convert(model, example_input=X, sync=sync)
    assert [layer.window for layer in layers(model)] == [expected] * 4


def test_convert_refuses_a_batch_size_of_none() -> None:
    with pytest.raises(ConversionError, match="batch_size must be an integer of at least 1, got 0"):
        cbn.convert(Net(), example_input=X, batch_size=0)


def test_the_first_step_brings_the_moments_of_patches_whoever_has_the_turn() -> None:
    net = pretrained(moments_every=8)
    net(batch(0))
    assert [layer.compensated for layer in layers(net)] == [True, True, True, False]


def test_one_image_of_one_position_trains_from_the_start() -> None:
    """Batch size 1 where the image has shrunk to one position: there is a variance to normalise by."""
    conv, norm = pair()
    x = conv(batch(0, n=1, size=3))
    assert x.shape == (1, 4, 1, 1)
    M, S = mixed(norm.running_mean.clone(), norm.running_var.clone(), x)
    torch.testing.assert_close(norm(x), normalised(norm, x, M, S))


@pytest.mark.parametrize("steps", [0, 1, 2, 11])
def test_resume_is_bit_identical(steps: int) -> None:
    net = pretrained(moments_every=8)
    for i in range(steps):
        step(net, batch(i), lr=0.002)
    other = pretrained(moments_every=8)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    load_history_state(other, copy.deepcopy(history_state(net)))
    for i in range(20, 30):
        assert torch.equal(step(net, batch(i), lr=0.002), step(other, batch(i), lr=0.002))
    assert_same_state(net, other, rtol=0, atol=0)


def test_a_copy_starts_from_its_own_running_statistics() -> None:
    conv, norm = pair()
    for i in range(3):
        norm(conv(batch(i)))
    twin = copy.deepcopy(nn.Sequential(conv, norm))
    M, S = mixed(norm.running_mean.clone(), norm.running_var.clone(), conv(batch(5)))
    torch.testing.assert_close(twin(batch(5)), normalised(norm, conv(batch(5)), M, S))


def test_reset_running_stats_leaves_nothing_to_start_from() -> None:
    conv, norm = pair()
    norm(conv(batch(0)))
    norm.reset_running_stats()
    plain = nn.BatchNorm2d(4).double()
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if k in ("weight", "bias")}, strict=False)
    torch.testing.assert_close(norm(conv(batch(1))), plain(conv(batch(1))))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_finds_the_same_start(use_reentrant: bool) -> None:
    plain, saving = pretrained(), pretrained()
    saving.around = lambda function, x: checkpoint(function, x, use_reentrant=use_reentrant)
    for i in range(6):
        assert torch.equal(step(plain, batch(i).requires_grad_()), step(saving, batch(i).requires_grad_()))
    assert_same_state(plain, saving, rtol=0, atol=0)


def test_a_first_batch_that_is_not_finite_changes_nothing() -> None:
    spoiled, clean = pair(), pair()
    bad = batch(0)
    bad[0, 0, 0, 0] = float("nan")
    spoiled[1](spoiled[0](bad))
    for i in range(1, 4):
        expected = clean[1](clean[0](batch(i)))
        torch.testing.assert_close(spoiled[1](spoiled[0](batch(i))), expected)


def test_weights_that_begin_to_learn_keep_the_start() -> None:
    """A producer that is frozen at first brings no moments of patches; once it learns, they join what there is."""
    conv, norm = pair()
    conv.requires_grad_(False)
    M, S = norm.running_mean.clone(), norm.running_var.clone()
    for i in range(5):
        M, S = mixed(M, S, conv(batch(i)))
        torch.testing.assert_close(norm(conv(batch(i))), normalised(norm, conv(batch(i)), M, S))
    conv.requires_grad_(True)
    M, S = mixed(M, S, conv(batch(5)))
    torch.testing.assert_close(norm(conv(batch(5))), normalised(norm, conv(batch(5)), M, S))
    assert norm.compensated


@pytest.mark.parametrize("long", [False, True])
def test_carried_along_with_the_weights_when_moments_come_in_turns(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine steps against a simulation: statistics and anchors move to the new weights before anything joins them.

    In long windows, before new patches do.
    """
    if long:
        monkeypatch.setattr("cbn_convert.norm.history.LONG", 1)
    conv, norm = pair(moments_every=3)
    M, S = norm.running_mean.clone(), norm.running_var.clone()
    p, C, anchor, explained = None, None, None, None
    kept, brought = 1.0, 0
    for i in range(9):
        theta, b = conv.weight.detach().flatten(1).clone(), conv.bias.detach().clone()
        y = conv(batch(i))
        mean, var = statistics(y.detach())
        moved = (M, S) if p is None else (M + theta @ p + b - anchor, S * ((theta * C).sum(1) / explained) ** 2)
        torch.testing.assert_close(norm(y), normalised(norm, y, *mixed(*moved, y)))

        patches = nn.functional.unfold(batch(i), 3).transpose(1, 2).flatten(0, 1)
        new_p = patches.mean(0)
        new_C = theta @ torch.cov(patches.T, correction=0)
        due = p is None or (K + i) % 3 == 0
        if (due or not long) and p is not None:
            (M, S), anchor, explained = moved, theta @ p + b, (theta * C).sum(1)
        M, S = ((1 - 1 / K) * M + mean / K, (1 - 1 / K) * S + var / K + (1 / K) * (1 - 1 / K) * (mean - M) ** 2)
        kept *= 1 - 1 / K
        if due:
            share = max(1 / (brought + 1), 1 - kept)
            if p is None:
                p, C, anchor, explained = new_p, new_C, mean, var
            else:
                # the mixture of two populations of patches, and what θ makes of it
                between = share * (1 - share)
                C = (1 - share) * C + share * new_C + between * (mean - anchor)[:, None] * (new_p - p)
                explained = (1 - share) * explained + share * var + between * (mean - anchor) ** 2
                anchor, p = (1 - share) * anchor + share * mean, (1 - share) * p + share * new_p
            kept, brought = 1.0, brought + 1
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter += 0.05 * torch.randn_like(parameter) * parameter.std()


def test_patches_that_say_nothing_of_the_new_weights_keep_their_anchor() -> None:
    """A filter turned round: carried along, what its patches explain would be negative, and divided by from then on."""
    theta = torch.randn(2, 3, dtype=torch.float64)
    covariance = torch.randn(2, 3, dtype=torch.float64)
    covariance *= covariance.sign() * theta.sign()  # what θ made of the patches varies
    explained = (theta * covariance).sum(1)
    past = Moments(
        *(t[:, None] for t in (torch.zeros(2).double(), explained, torch.zeros(2).double(), explained)),
        torch.zeros(1, 1, 3).double(), covariance[:, None],
    )  # fmt: skip
    for factor in (-1.0, 0.1, 10.0):
        moved = carry_over(past, theta * torch.tensor([[factor], [1.1]]).double(), None, "projection")
        torch.testing.assert_close(moved.explained[:, 0], explained * torch.tensor([1.0, 1.1]).double())
        torch.testing.assert_close(moved.var[:, 0], explained * torch.tensor([1.0, 1.1**2]).double())


@pytest.mark.parametrize("compensation", ["projection", "exact"])
@pytest.mark.parametrize("shape", [(2, 16), (1, 16, 1, 1)])
def test_a_few_patches_cannot_blow_up_what_many_images_measured(shape: tuple[int, ...], compensation: str) -> None:
    """Two patches may by chance not vary at all in some channels; small changes of weights stay small changes."""
    producer = (nn.Linear(16, 64) if len(shape) == 2 else nn.Conv2d(16, 64, 1)).double()
    kind = CrossIterationBatchNorm1d if len(shape) == 2 else CrossIterationBatchNorm2d
    options = {"window": 4096, "history": "ema", "start": "running", "compensation": compensation, "moments_every": 8}
    norm = kind(64, **options).double().bind(producer)
    many = producer(torch.randn(4096, *shape[1:], dtype=torch.float64)).detach()
    axes = [0, *range(2, many.dim())]
    norm.running_mean.copy_(many.mean(axes))
    norm.running_var.copy_(many.var(axes))
    before = norm.running_var.clone()
    for _ in range(40):
        assert torch.isfinite(norm(producer(torch.randn(shape, dtype=torch.float64)))).all()
        with torch.no_grad():
            for p in producer.parameters():
                p += 0.01 * torch.randn_like(p) * p.std()
    ratio = norm.running_var / before
    assert ratio.min() > 0.5
    assert ratio.max() < 2


def test_patches_that_explain_too_little_are_completed() -> None:
    """As if they also varied by λ in all directions; those that explain enough stay as they are."""
    theta = torch.randn(2, 3, dtype=torch.float64)
    patches = torch.randn(50, 3, dtype=torch.float64)
    sigma = torch.cov(patches.T, correction=0)
    explained = ((theta @ sigma) * theta).sum(1)
    one = Moments(torch.zeros(2), torch.zeros(2), torch.zeros(2), explained, patches.mean(0)[None], theta @ sigma)
    var = explained * torch.tensor([1.0, 40.0]).double()
    more = 9 * explained[1] / theta[1].square().sum()
    wanted = torch.stack([theta[0] @ sigma, theta[1] @ (sigma + more * torch.eye(3))])
    completed = explaining(one, var, theta)
    torch.testing.assert_close(completed.covariance, wanted)
    torch.testing.assert_close(completed.explained, (theta * wanted).sum(1))
    exact = explaining(one._replace(covariance=None, patch_covariance=sigma[None]), var, theta)
    torch.testing.assert_close(exact.patch_covariance[0], sigma + more * torch.eye(3).double())
    torch.testing.assert_close(exact.explained, ((theta @ exact.patch_covariance[0]) * theta).sum(1))


def test_patches_of_a_transposed_conv_join_in_the_order_that_kernels_read() -> None:
    torch.manual_seed(0)
    outputs = []
    for name in ("plain", None):
        torch.manual_seed(1)
        conv = nn.ConvTranspose2d(6, 4, 1)
        norm = CrossIterationBatchNorm2d(4, window=K, history="ema", start="running").bind(conv)
        norm.running_mean.normal_()
        with forced(name) if name else nullcontext():
            for i in range(4):
                y = norm(conv(torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(i))))
                with torch.no_grad():
                    conv.weight.mul_(1.1)
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_model_without_values_converts_and_runs() -> None:
    with FakeTensorMode():
        model = randomize_norms(Net())
        cbn.convert(model, example_input=torch.randn(1, 3, 12, 12))
        model.train()(torch.randn(2, 3, 12, 12)).sum().backward()
    assert {layer.start for layer in layers(model)} == {"running"}


@pytest.mark.parametrize("first", ["weights", "convert"])
def test_resuming_with_defaults_whatever_the_fresh_model_holds(first: str) -> None:
    """Window and gradient depend on the statistics; the history brings those that it was made with."""
    net = randomize_norms(Net()).double()
    cbn.convert(net, example_input=X.double())
    for i in range(3):
        step(net.train(), batch(i), lr=0.002)
    other = Net().double()
    for act in (first, "convert" if first == "weights" else "weights"):
        if act == "weights":
            other.load_state_dict(net.state_dict())
        else:
            cbn.convert(other, example_input=X.double())
    load_history_state(other, history_state(net))
    settings = [[(layer.window, layer.start, layer.gradient) for layer in layers(m)] for m in (net, other)]
    assert settings[0] == settings[1]
    for i in range(20, 24):
        assert torch.equal(step(net, batch(i), lr=0.002), step(other.train(), batch(i), lr=0.002))


def test_a_history_of_another_gradient_is_refused() -> None:
    nets = [pretrained(gradient=gradient) for gradient in ("full", "current")]
    with pytest.raises(ValueError, match="saved with gradient full, but the layer has current; use the same settings"):
        load_history_state(nets[1], history_state(nets[0]))


def test_frozen_batchnorm_keeps_what_it_is() -> None:
    """Mean 0 and variance 1 are its function, not what nobody has measured yet."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4))
    cbn.convert(model, example_input=torch.randn(1, 3, 12, 12))
    assert (model[1].start, model[1].window) == ("running", 4096)
    x = 10 * torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0.1, atol=0.1)
