"""The layer in the ways that people train: each test states what must not happen there."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from helpers.ways import X, assert_same_state, batch, converted, layers, step
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationMixin, history_state

# a ring, and carried windows that look at some of the batches of a short training, and so briefly that it matters
RING = {"window": 4}
CARRIED = {"history": "ema", "window": 64, "moments_every": 2, "moments_positions": 100}
NEW = {"history": "ema", "start": "empty"}
every_kind = pytest.mark.parametrize("options", [RING, CARRIED, NEW], ids=["ring", "carried", "new"])


def bound(conv: nn.Module, options: dict, **more) -> CrossIterationBatchNorm2d:
    """A layer behind a conv, with statistics of its own; one that carries them trains folded."""
    norm = randomize_norms(CrossIterationBatchNorm2d(conv.out_channels, **{**options, **more}))
    return norm.to(conv.weight.dtype).bind(conv, folded=norm.window.is_carried)


def twin_of(norm: CrossIterationBatchNorm2d, conv: nn.Module, options: dict, **more) -> CrossIterationBatchNorm2d:
    other = bound(conv, options, **more)
    other.load_state_dict(norm.state_dict())
    return other


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool, options: dict) -> None:
    plain, saving = converted(**options), converted(**options)
    saving.around = lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)
    for i in range(6):
        # the reentrant form needs an input that requires grad
        inputs = [batch(i).requires_grad_() for _ in range(2)]
        assert torch.equal(step(plain, inputs[0]), step(saving, inputs[1]))
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert_same_state(plain, saving, rtol=0, atol=0)


@every_kind
def test_checkpointed_segments_that_part_conv_and_norm(options: dict) -> None:
    plain, saving = converted(**options), converted(**options)
    for part in (saving.stem, saving.body):
        part.forward = partial(_each_layer_alone, part)
    for i in range(5):
        assert torch.equal(step(plain, batch(i)), step(saving, batch(i)))
    assert_same_state(plain, saving, rtol=0, atol=0)


def _each_layer_alone(part: nn.Sequential, x: Tensor) -> Tensor:
    for module in part:
        x = checkpoint(module, x, use_reentrant=False)
    return x


def test_gradient_accumulation_gives_the_statistics_of_the_whole_batch() -> None:
    """Micro-batches share their weights: the fourth of a ring of 4 is normalised as in a batch of all four."""
    conv = nn.Conv2d(3, 4, 3).double()
    norm = bound(conv, RING)
    micro = [batch(i) for i in range(4)]
    for x in micro:
        out = norm(conv(x))
        out.square().mean().backward()
    expected = F.batch_norm(conv(torch.cat(micro)), None, None, norm.weight, norm.bias, training=True)[-2:]
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("turns")
def test_gradient_accumulation_under_a_carried_window_is_the_gradient_of_the_whole_batch() -> None:
    """Between two looks nothing depends on what else is in the batch."""
    whole, parts = (converted(history="ema", moments_every=100) for _ in range(2))
    for net in (whole, parts):
        step(net, batch(0))  # the first step has to look
        net.zero_grad()
    micro = [batch(i) for i in range(1, 5)]
    whole(torch.cat(micro)).pow(3).sum().backward()
    for x in micro:
        parts(x).pow(3).sum().backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for key, value in whole.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, parts.state_dict()[key])


@every_kind
def test_two_forward_passes_before_one_backward_pass(options: dict) -> None:
    """What a pass keeps for its gradient is not written to by the next one."""
    together, apart = converted(**options), converted(**options)
    for i in range(4):
        losses = [together(batch(10 * i + k)).pow(3).mean() for k in range(2)]
        together.zero_grad()
        sum(losses).backward()
        apart.zero_grad()
        for k in range(2):
            apart(batch(10 * i + k)).pow(3).mean().backward()
        with torch.no_grad():
            for p, q in zip(together.parameters(), apart.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
                p -= 0.05 * p.grad
                q -= 0.05 * q.grad
    assert_same_state(together, apart)


@every_kind
def test_batch_and_image_size_may_change(options: dict) -> None:
    net = converted(**options)
    for i, (n, size) in enumerate([(2, 12), (5, 7), (1, 20), (3, 12), (1, 3), (2, 9)]):
        assert torch.isfinite(step(net, batch(i, n, size))).all()
    assert {s["sources"][0]["seen"] for s in history_state(net).values()} == {6}


@every_kind
def test_empty_batch_is_ignored(options: dict) -> None:
    net, twin = converted(**options), converted(**options)
    step(net, batch(0))
    step(twin, batch(0))
    out = net(batch(0)[:0])
    assert out.shape == (0, 4)
    out.sum().backward()
    for i in range(1, 4):
        assert torch.equal(step(net, batch(i)), step(twin, batch(i)))
    assert_same_state(net, twin, rtol=0, atol=0)


@pytest.mark.parametrize("options", [
    RING, {**RING, "compensation": "taylor"}, {**RING, "compensation": "none"}, CARRIED,
    {**CARRIED, "moments_every": 1}, {**CARRIED, "compensation": "none"},
], ids=str)  # fmt: skip
def test_weights_that_jump_leave_statistics_finite_and_positive(options: dict) -> None:
    net = converted(double=False, **options)
    for i in range(6):
        out = step(net, batch(i, dtype=torch.float32), lr=0)
        assert torch.isfinite(out).all()
        with torch.no_grad():
            for p in net.parameters():
                p += 10.0 ** (i - 1) * torch.randn_like(p)
        for layer in layers(net):
            assert torch.isfinite(layer.running_mean).all()
            assert (layer.running_var > 0).all()


@every_kind
def test_update_bn_recalibrates(options: dict) -> None:
    """torch's recalibration must end near the statistics of the data, not of the weights trained with."""
    net = converted(**options)
    for i in range(3):
        step(net, batch(i), lr=0.5)
    images = [3 * batch(i, n=4) + 1 for i in range(40)]
    update_bn(images, net)
    conv_outputs = net.stem[0](torch.cat(images))
    norm = net.stem[1]
    assert norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, conv_outputs.mean((0, 2, 3)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(norm.running_var, conv_outputs.var((0, 2, 3)), rtol=0.1, atol=0.1)


# a layer that follows its weights looks at its first batch at once, another one in its turn
@pytest.mark.parametrize("options", [RING, {**CARRIED, "moments_every": 1}], ids=["ring", "carried"])
@pytest.mark.parametrize("frozen", ["convs", "affine", "stem", "all but the head"])
def test_frozen_parts_get_no_gradient_and_the_rest_its_own(frozen: str, options: dict) -> None:
    net, free = converted(**options), converted(**options)
    for name, p in net.named_parameters():
        module = net.get_submodule(name.rpartition(".")[0])
        chosen = {
            "convs": isinstance(module, nn.Conv2d),
            "affine": isinstance(module, CrossIterationMixin),
            "stem": name.startswith("stem"),
            "all but the head": not name.startswith("head"),
        }
        p.requires_grad_(not chosen[frozen])
    for i in range(4):
        for model in (net, free):
            model.zero_grad()
            model(batch(i)).pow(3).mean().backward()
        for p, q in zip(net.parameters(), free.parameters(), strict=True):
            assert (p.grad is None) == (not p.requires_grad)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
    compensated = [s["sources"][0]["slots"].keys() > {"mean", "var"} for s in history_state(net).values()]
    own_weight = [True, True, True, False]
    expected = {"convs": [False] * 4, "stem": [False, True, True, False], "all but the head": [False] * 4}
    assert compensated == expected.get(frozen, own_weight)


@every_kind
def test_weight_decay_is_followed_exactly(options: dict) -> None:
    """Weights that only shrink change nothing: compensation is exact there."""
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    twin = copy.deepcopy(conv)
    norm = bound(conv, options, eps=1e-30)
    fixed = twin_of(norm, twin, options, eps=1e-30)
    for i in range(6):
        torch.testing.assert_close(norm(conv(batch(i))), fixed(twin(batch(i))))
        with torch.no_grad():
            conv.weight *= 0.7


@every_kind
def test_two_optimizers_see_one_gradient(options: dict) -> None:
    one, two = converted(**options), converted(**options)
    single = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
    norms = {id(p) for layer in layers(two) for p in layer.parameters()}
    halves = [
        torch.optim.SGD([p for p in two.parameters() if (id(p) in norms) == part], 0.1, momentum=0.9)
        for part in (True, False)
    ]
    for i in range(4):
        for model, optimizers in ((one, [single]), (two, halves)):
            model.zero_grad()
            model(batch(i)).pow(3).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_same_state(one, two)


@every_kind
def test_same_seed_same_run(options: dict) -> None:
    runs = [converted(seed=3, **options) for _ in range(2)]
    for i in range(5):
        assert torch.equal(*(step(net, batch(i)) for net in runs))


@every_kind
def test_channels_last_and_dtype_moves(options: dict) -> None:
    net, last = converted(double=False, **options), converted(double=False, **options)
    last.to(memory_format=torch.channels_last)
    for i in range(5):
        x = batch(i, dtype=torch.float32)
        out = step(last, x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, step(net, x), rtol=1e-3, atol=1e-4)
    net.double()
    assert torch.isfinite(step(net, batch(9))).all()
    assert {s["sources"][0]["slots"]["mean"].dtype for s in history_state(net).values()} == {torch.float64}
    net.float()
    assert torch.isfinite(step(net, batch(9, dtype=torch.float32))).all()


@every_kind
def test_pure_bfloat16(options: dict) -> None:
    net, full = converted(double=False, **options), converted(double=False, **options)
    net.bfloat16()
    for i in range(6):
        x = batch(i, dtype=torch.float32)
        out = step(net, x.bfloat16(), lr=0)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), step(full, x, lr=0), rtol=0.1, atol=0.1)
    assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16}
    for state in history_state(net).values():
        assert {t.dtype for t in state["sources"][0]["slots"].values()} == {torch.float32}


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, options: dict) -> None:
    mixed, full = converted(double=False, **options), converted(double=False, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [torch.optim.SGD(net.parameters(), 0.05) for net in (mixed, full)]
    for i in range(6):
        x = batch(i, n=4, dtype=torch.float32)
        for net, optimizer in zip((mixed, full), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=net is mixed):
                out = net(x)
                loss = out.float().pow(2).mean()
            if net is mixed:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    for p, q in zip(mixed.parameters(), full.parameters(), strict=True):
        assert (p - q).norm() <= 0.1 * q.norm() + 1e-2
    for state in history_state(mixed).values():
        assert {t.dtype for t in state["sources"][0]["slots"].values()} == {torch.float32}


@every_kind
def test_a_mean_of_a_thousand_standard_deviations(options: dict) -> None:
    """Input patches and outputs far from zero: float32 must stay near float64."""
    conv = nn.Conv2d(4, 6, 3, bias=False)
    conv64 = copy.deepcopy(conv).double()
    norm = CrossIterationBatchNorm2d(6, **options).bind(conv)
    norm64 = CrossIterationBatchNorm2d(6, **options).double().bind(conv64)
    for i in range(6):
        y = batch(i, dtype=torch.float32)
        y = torch.cat([y, y[:, :1]], 1) + 1000
        for a, b in zip(conv.parameters(), conv64.parameters(), strict=True):
            b.data.copy_(a)
        # the same values for both, so that only the layer's own arithmetic is compared
        x = conv64(y.double()).float()
        conv(y)
        conv64(y.double())
        if i == 0:
            var, mean = torch.var_mean(x, (0, 2, 3))
            for layer in (norm, norm64):
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(var)
        out = norm(x)
        torch.testing.assert_close(out.double(), norm64(x.double()), rtol=0, atol=2e-2)
        torch.testing.assert_close(norm.running_var.double(), norm64.running_var, rtol=1e-2, atol=0)
        with torch.no_grad():
            conv.weight += 0.01 * torch.randn_like(conv.weight) * conv.weight.std()


@every_kind
def test_functional_call_uses_the_weights_it_is_given(options: dict) -> None:
    net, twin = converted(**options), converted(seed=1, **options)
    step(net, batch(0), lr=0)
    step(twin, batch(0), lr=0)
    given = {n: p.detach().clone().requires_grad_() for n, p in twin.named_parameters()}
    net.load_state_dict({k: v for k, v in twin.state_dict().items() if "running" in k}, strict=False)
    twin.load_state_dict(twin.state_dict())
    for i in range(1, 4):
        out = torch.func.functional_call(net, given, (batch(i),))
        expected = twin(batch(i))
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.pow(3).mean(), list(given.values()))
        wanted = torch.autograd.grad(expected.pow(3).mean(), list(twin.parameters()))
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want)
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), wanted, strict=True):
                p -= 0.05 * g
                given[name] -= 0.05 * g


def test_a_norm_called_twice_in_a_pass_counts_two_iterations() -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    norm = CrossIterationBatchNorm2d(4, window=4).double().bind(conv)
    a, b = batch(0), batch(1)
    norm(conv(a))
    out = norm(conv(b))
    expected = F.batch_norm(conv(torch.cat([a, b])), None, None, training=True)[2:]
    torch.testing.assert_close(out, expected)
    assert norm.history_state()["sources"][0]["seen"] == 2


@pytest.mark.parametrize("options", [{"window": 2}, {"history": "ema"}], ids=["ring", "nothing to carry"])
def test_without_running_statistics(options: dict) -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    norm = CrossIterationBatchNorm2d(4, track_running_stats=False, affine=False, **options).double().bind(conv)
    assert not norm.state_dict()
    norm(conv(batch(0)))
    both = F.batch_norm(conv(torch.cat([batch(0), batch(1)])), None, None, training=True)
    torch.testing.assert_close(norm(conv(batch(1))), both[2:])
    x = conv(batch(2))
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, None, None, training=True))


@every_kind
def test_what_acts_between_conv_and_norm_in_training_is_refused(options: dict) -> None:
    """DropPath is nothing in evaluation; its output is not the conv's."""
    from timm.layers import DropPath

    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), DropPath(0.5), nn.BatchNorm2d(4))).train()
    assert cbn.convert(net, example_input=X, **options).counts["window"] == 1
    net(X)
    for folded in {False, net[2].window.is_carried}:
        net[2].bind(net[0], folded=folded)
        with pytest.raises(RuntimeError, match="bound to a Conv2d whose output is changed"):
            net(batch(0, n=20, dtype=torch.float32))
        net[1].eval()
        net(batch(0, dtype=torch.float32))
        net[1].train()
    inplace = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5, inplace=True), nn.BatchNorm2d(4)).train()
    inplace[2] = bound(inplace[0], options)
    with pytest.raises(RuntimeError, match="changed"):
        inplace(batch(0, dtype=torch.float32))


@every_kind
def test_a_copy_of_the_conv_output_is_its_output(options: dict) -> None:
    conv = nn.Conv2d(3, 4, 3)
    norm = bound(conv, options)
    x = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(conv(x).float())
    norm(conv(x).clone())
    assert norm.history_state()["sources"][0]["seen"] == 2


@every_kind
def test_rows_in_another_order_are_refused(options: dict) -> None:
    """At batch size 1 a sequence-first layout looks like the right one; training shows the difference."""
    linear = nn.Linear(5, 6)
    norm = randomize_norms(cbn.CrossIterationBatchNorm1d(6, **options)).bind(linear)
    norm(linear(torch.randn(7, 1, 5)).permute(1, 2, 0))
    with pytest.raises(RuntimeError, match="changed"):
        norm(linear(torch.randn(7, 3, 5)).permute(1, 2, 0))


@every_kind
def test_an_input_that_the_conv_skips_may_be_infinite(options: dict) -> None:
    net = randomize_norms(nn.Sequential(nn.Conv2d(16, 8, 1, stride=2), nn.BatchNorm2d(8))).train()
    cbn.convert(net, example_input=torch.randn(1, 16, 8, 8), **options)
    for i in range(8):
        x = torch.randn(2, 16, 8, 8)
        if i % 3 == 0:  # in steps that look at their batch and in others
            x[0, 0, 1, 1] = float("inf")
        out = net(x)
        net.zero_grad()
        out.square().mean().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("options", [{"window": 8}, {"history": "ema"}], ids=["ring", "nothing to carry"])
def test_momentum_none_counts_every_batch_once(options: dict) -> None:
    norm = CrossIterationBatchNorm2d(3, momentum=None, **options).double()
    x = [batch(i, n=1) + i for i in range(12)]
    for part in x:
        norm(part)
    norm(torch.full_like(x[0], float("nan")))
    torch.testing.assert_close(norm.running_mean, torch.cat(x).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, torch.cat(x).var((0, 2, 3), correction=0))
    assert norm.num_batches_tracked == 12


def test_momentum_means_nothing_to_a_carried_window() -> None:
    """It forgets images at a rate of its own."""
    plain, cumulative = converted(**CARRIED), converted(**CARRIED)
    for layer in layers(cumulative):
        layer.momentum = None
    for i in range(4):
        assert torch.equal(step(plain, batch(i)), step(cumulative, batch(i)))
    assert_same_state(plain, cumulative, rtol=0, atol=0)


def test_transposed_conv_with_an_output_size() -> None:
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double()
    norm = CrossIterationBatchNorm2d(4, window=2).double().bind(conv)
    y = batch(0)
    norm(conv(y, output_size=(24, 23)))
    both = F.batch_norm(conv(torch.cat([y, batch(1)]), output_size=(24, 23)), None, None, training=True)
    torch.testing.assert_close(norm(conv(batch(1), output_size=(24, 23))), both[2:])


def test_a_transposed_conv_with_an_output_size_trains_folded_as_it_does_apart() -> None:
    convs = [nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double() for _ in range(2)]
    convs[1].load_state_dict(convs[0].state_dict())
    folded = bound(convs[0], CARRIED)
    apart = randomize_norms(CrossIterationBatchNorm2d(4, **CARRIED)).double().bind(convs[1])
    apart.load_state_dict(folded.state_dict())
    for i in range(4):
        one, other = (
            norm(conv(batch(i), output_size=(24, 23))) for norm, conv in zip((folded, apart), convs, strict=True)
        )
        assert one.shape == (2, 4, 24, 23)
        torch.testing.assert_close(one, other)
        with torch.no_grad():
            convs[0].weight += 0.1 * torch.randn_like(convs[0].weight)
            convs[1].weight.copy_(convs[0].weight)
