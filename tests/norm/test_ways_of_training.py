"""The layer in the ways that people train: each test states what must not happen there."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from ways import X, assert_same_state, batch, converted, layers, step

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationMixin, history_state


@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool, history: str) -> None:
    plain, saving = converted(history=history), converted(history=history)
    saving.around = lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)
    for i in range(6):
        # the reentrant form needs an input that requires grad
        inputs = [batch(i).requires_grad_() for _ in range(2)]
        assert torch.equal(step(plain, inputs[0]), step(saving, inputs[1]))
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert_same_state(plain, saving, rtol=0, atol=0)


def test_checkpointed_segments_that_part_conv_and_norm() -> None:
    plain, saving = converted(), converted()
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
    """Micro-batches share their weights: the fourth of a window of 4 is normalised as in a batch of all four."""
    conv = nn.Conv2d(3, 4, 3).double()
    for history in ("ring", "ema"):
        norm = CrossIterationBatchNorm2d(4, window=4, history=history).double().bind(conv)
        micro = [batch(i) for i in range(4)]
        for x in micro:
            out = norm(conv(x))
            out.square().mean().backward()
        expected = F.batch_norm(conv(torch.cat(micro)), None, None, training=True)[-2:]
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("history", ["ring", "ema"])
def test_batch_and_image_size_may_change(history: str) -> None:
    net = converted(history=history)
    for i, (n, size) in enumerate([(2, 12), (5, 7), (1, 20), (3, 12), (1, 3), (2, 9)]):
        assert torch.isfinite(step(net, batch(i, n, size))).all()
    assert {s["sources"][0]["seen"] for s in history_state(net).values()} == {6}


def test_empty_batch_is_ignored() -> None:
    net, twin = converted(), converted()
    step(net, batch(0))
    step(twin, batch(0))
    out = net(batch(0)[:0])
    assert out.shape == (0, 4)
    out.sum().backward()
    assert torch.equal(step(net, batch(1)), step(twin, batch(1)))
    assert_same_state(net, twin, rtol=0, atol=0)


def test_weights_that_jump_leave_statistics_finite_and_positive() -> None:
    for compensation in ("projection", "taylor", "none"):
        for history in ("ring", "ema"):
            net = converted(compensation=compensation, history=history, double=False)
            for i in range(6):
                out = step(net, batch(i, dtype=torch.float32), lr=0)
                assert torch.isfinite(out).all()
                with torch.no_grad():
                    for p in net.parameters():
                        p += 10.0 ** (i - 1) * torch.randn_like(p)
                for layer in layers(net):
                    assert torch.isfinite(layer.running_mean).all()
                    assert (layer.running_var > 0).all()


def test_update_bn_recalibrates() -> None:
    """torch's recalibration must end near the statistics of the data, not of the weights trained with."""
    net = converted()
    for i in range(3):
        step(net, batch(i), lr=0.5)
    images = [3 * batch(i, n=4) + 1 for i in range(40)]
    update_bn(images, net)
    conv_outputs = net.stem[0](torch.cat(images))
    norm = net.stem[1]
    assert norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, conv_outputs.mean((0, 2, 3)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(norm.running_var, conv_outputs.var((0, 2, 3)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("frozen", ["convs", "affine", "stem", "all but the head"])
def test_frozen_parts_get_no_gradient_and_the_rest_its_own(frozen: str) -> None:
    net, free = converted(), converted()
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


def test_weight_decay_is_followed_exactly() -> None:
    """Weights that only shrink change nothing: the projection is exact there."""
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    norm = CrossIterationBatchNorm2d(4, window=3, eps=0).double().bind(conv)
    fixed = CrossIterationBatchNorm2d(4, window=3, eps=0).double()
    twin = copy.deepcopy(conv)
    twin._forward_hooks.clear()
    fixed.bind(twin)
    for i in range(4):
        torch.testing.assert_close(norm(conv(batch(i))), fixed(twin(batch(i))))
        with torch.no_grad():
            conv.weight *= 0.7


def test_two_optimizers_see_one_gradient() -> None:
    one, two = converted(), converted()
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


def test_same_seed_same_run() -> None:
    runs = [converted(seed=3) for _ in range(2)]
    for i in range(5):
        assert torch.equal(*(step(net, batch(i)) for net in runs))


def test_channels_last_and_dtype_moves() -> None:
    net, last = converted(double=False), converted(double=False)
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


def test_pure_bfloat16() -> None:
    net, full = converted(double=False), converted(double=False)
    net.bfloat16()
    for i in range(6):
        x = batch(i, dtype=torch.float32)
        out = step(net, x.bfloat16(), lr=0)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), step(full, x, lr=0), rtol=0.1, atol=0.1)
    assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16}
    for state in history_state(net).values():
        assert {t.dtype for t in state["sources"][0]["slots"].values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    mixed, full = converted(double=False), converted(double=False)
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


@pytest.mark.parametrize("history", ["ring", "ema"])
def test_a_mean_of_a_thousand_standard_deviations(history: str) -> None:
    """Input patches and outputs far from zero: float32 must stay near float64."""
    conv = nn.Conv2d(4, 6, 3, bias=False)
    norm = CrossIterationBatchNorm2d(6, window=4, history=history).bind(conv)
    conv64, norm64 = copy.deepcopy(conv).double(), CrossIterationBatchNorm2d(6, window=4, history=history).double()
    conv64._forward_hooks.clear()
    norm64.bind(conv64)
    for i in range(6):
        y = batch(i, dtype=torch.float32)
        y = torch.cat([y, y[:, :1]], 1) + 1000
        for a, b in zip(conv.parameters(), conv64.parameters(), strict=True):
            b.data.copy_(a)
        # the same values for both, so that only the layer's own arithmetic is compared
        x = conv64(y.double()).float()
        conv(y)
        conv64(y.double())
        out = norm(x)
        torch.testing.assert_close(out.double(), norm64(x.double()), rtol=0, atol=2e-2)
        torch.testing.assert_close(norm.running_var.double(), norm64.running_var, rtol=1e-2, atol=0)
        with torch.no_grad():
            conv.weight += 0.01 * torch.randn_like(conv.weight) * conv.weight.std()


def test_functional_call_uses_the_weights_it_is_given() -> None:
    net, twin = converted(), converted(seed=1)
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


def test_without_running_statistics() -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    norm = CrossIterationBatchNorm2d(4, window=2, track_running_stats=False, affine=False).double().bind(conv)
    assert not norm.state_dict()
    norm(conv(batch(0)))
    both = F.batch_norm(conv(torch.cat([batch(0), batch(1)])), None, None, training=True)
    torch.testing.assert_close(norm(conv(batch(1))), both[2:])
    x = conv(batch(2))
    torch.testing.assert_close(norm.eval()(x), F.batch_norm(x, None, None, training=True))


def test_what_acts_between_conv_and_norm_in_training_is_refused() -> None:
    """DropPath is nothing in evaluation; its output is not the conv's."""
    from timm.layers import DropPath

    net = nn.Sequential(nn.Conv2d(3, 4, 3), DropPath(0.5), nn.BatchNorm2d(4)).train()
    assert cbn.convert(net, example_input=X).counts["window"] == 1
    net(X)
    net[2].bind(net[0])
    with pytest.raises(RuntimeError, match="bound to a Conv2d whose output is changed"):
        net(batch(0, n=20, dtype=torch.float32))
    inplace = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5, inplace=True), nn.BatchNorm2d(4)).train()
    inplace[2].__class__ = CrossIterationBatchNorm2d
    inplace[2].set_window(4, "projection", "full", "ring", 0, False)
    inplace[2].bind(inplace[0])
    with pytest.raises(RuntimeError, match="changed"):
        inplace(batch(0, dtype=torch.float32))


def test_a_copy_of_the_conv_output_is_its_output() -> None:
    conv = nn.Conv2d(3, 4, 3)
    norm = CrossIterationBatchNorm2d(4, window=3).bind(conv)
    x = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(conv(x).float())
    norm(conv(x).clone())
    assert norm.history_state()["sources"][0]["seen"] == 2


def test_rows_in_another_order_are_refused() -> None:
    """At batch size 1 a sequence-first layout looks like the right one; training shows the difference."""
    linear = nn.Linear(5, 6)
    norm = cbn.CrossIterationBatchNorm1d(6, window=3).bind(linear)
    norm(linear(torch.randn(7, 1, 5)).permute(1, 2, 0))
    with pytest.raises(RuntimeError, match="changed"):
        norm(linear(torch.randn(7, 3, 5)).permute(1, 2, 0))


def test_an_input_that_the_conv_skips_may_be_infinite() -> None:
    net = nn.Sequential(nn.Conv2d(16, 8, 1, stride=2), nn.BatchNorm2d(8)).train()
    cbn.convert(net, example_input=torch.randn(1, 16, 8, 8))
    for i in range(8):
        x = torch.randn(2, 16, 8, 8)
        if i == 3:
            x[0, 0, 1, 1] = float("inf")
        out = net(x)
        net.zero_grad()
        out.square().mean().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_momentum_none_counts_every_batch_once() -> None:
    norm = CrossIterationBatchNorm2d(3, window=8, momentum=None).double()
    x = [batch(i, n=1) + i for i in range(12)]
    for part in x:
        norm(part)
    norm(torch.full_like(x[0], float("nan")))
    torch.testing.assert_close(norm.running_mean, torch.cat(x).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, torch.cat(x).var((0, 2, 3), correction=0))
    assert norm.num_batches_tracked == 12


def test_transposed_conv_with_an_output_size() -> None:
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double()
    norm = CrossIterationBatchNorm2d(4, window=2).double().bind(conv)
    y = batch(0)
    norm(conv(y, output_size=(24, 23)))
    both = F.batch_norm(conv(torch.cat([y, batch(1)]), output_size=(24, 23)), None, None, training=True)
    torch.testing.assert_close(norm(conv(batch(1), output_size=(24, 23))), both[2:])
