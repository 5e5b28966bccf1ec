"""What the window remembers: when it begins, what belongs to it, and what must not."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from ways import assert_same_state, batch, converted, layers, step

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm2d, history_state


def test_no_grad_in_train_mode_counts_like_a_step() -> None:
    with_grad, without = converted(), converted()
    for i in range(3):
        with_grad(batch(i))
        with torch.no_grad():
            without(batch(i))
    assert_same_state(with_grad, without)


def test_loaded_weights_have_no_past() -> None:
    net = converted()
    for i in range(3):
        step(net, batch(i))
    other = converted(seed=1)
    net.load_state_dict(other.state_dict())
    assert {s["sources"][0]["seen"] for s in history_state(net).values()} == {0}
    assert torch.equal(step(net, batch(9)), step(other, batch(9)))

    step(net, batch(10))
    net.stem[0].load_state_dict(converted(seed=2).stem[0].state_dict())
    assert [layer.history_state()["sources"][0]["seen"] for layer in layers(net)] == [0, 2, 2, 2]


@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_not_recorded(bad: float, history: str) -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    norm = CrossIterationBatchNorm2d(4, window=3, history=history).double().bind(conv)
    norm(conv(torch.full((2, 3, 6, 6), bad, dtype=torch.float64)))
    for i in range(4):
        norm(conv(batch(i)))
    before = copy.deepcopy(norm.state_dict())
    spoiled = batch(5)
    spoiled[0, 0, 0, 0] = bad
    norm(conv(spoiled))
    for key in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[key], before[key])
    outputs = [norm(conv(batch(6 + i))) for i in range(4)]
    assert torch.isfinite(torch.stack(outputs)).all()
    # window 3: two batches later nothing is left of what came before, so a twin without the bad batch agrees
    if history == "ring":
        twin = CrossIterationBatchNorm2d(4, window=3).double().bind(conv)
        for i in range(4):
            out = twin(conv(batch(6 + i)))
        torch.testing.assert_close(outputs[-1], out)


def test_ema_copies_carry_no_history_and_leave_the_model_alone() -> None:
    net = converted(double=False)
    for i in range(3):
        step(net, batch(i, dtype=torch.float32))
    before = copy.deepcopy(history_state(net))
    for average in (ModelEmaV3(net, decay=0.5), AveragedModel(net)):
        assert {s["sources"][0]["seen"] for s in history_state(average.module).values()} == {0}
        assert all(p.producers != q.producers for p, q in zip(layers(net)[:3], layers(average.module)[:3], strict=True))
        average.update(net) if isinstance(average, ModelEmaV3) else average.update_parameters(net)
        average.module.eval()(batch(7, dtype=torch.float32))
    assert_same_history(before, history_state(net))


def assert_same_history(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name]["sources"][0]["seen"] == b[name]["sources"][0]["seen"]
        assert all(torch.equal(v, b[name]["sources"][0]["slots"][k]) for k, v in a[name]["sources"][0]["slots"].items())


def test_freezing_and_unfreezing_keeps_the_history() -> None:
    net = converted()
    for i in range(8):
        net.requires_grad_(i % 2 == 0)
        net(batch(i))
    assert {s["sources"][0]["seen"] for s in history_state(net).values()} == {8}


def test_history_state_is_a_snapshot_and_changes_nothing() -> None:
    net, twin = converted(), converted()
    for i in range(4):
        net.zero_grad()
        twin.zero_grad()
        out = net(batch(i))
        state = history_state(net)
        before = copy.deepcopy(state)
        out.pow(3).mean().backward()
        twin(batch(i)).pow(3).mean().backward()
        assert_same_history(before, state)
    assert_same_state(net, twin, rtol=0, atol=0)


def test_reset_running_stats_starts_anew() -> None:
    net = converted()
    for i in range(3):
        step(net, batch(i))
    for layer in layers(net):
        layer.reset_running_stats()
        assert layer.history_state()["sources"][0]["seen"] == 0


def test_two_forward_passes_before_one_backward() -> None:
    """The first pass's gradient is of the past as it was then, though the second pass has moved on."""
    for history in ("ring", "ema"):
        together, apart = (converted(history=history) for _ in range(2))
        for i in range(5):
            for net in (together, apart):
                step(net, batch(i))
        for net in (together, apart):
            net.zero_grad()
        (together(batch(6)).pow(2).mean() + together(batch(7)).pow(2).mean()).backward()
        for i in (6, 7):
            apart(batch(i)).pow(2).mean().backward()
        for a, b in zip(together.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert_same_state(together, apart)


@pytest.mark.parametrize("history", ["ring", "ema"])
def test_inference_mode_while_a_backward_pass_is_to_come(history: str) -> None:
    net = converted(history=history)
    for i in range(5):
        step(net, batch(i))
    out = net(batch(5))
    with torch.inference_mode():
        net(batch(6))
        net(batch(7))
    out.sum().backward()
    for i in range(3):
        step(net, batch(i))


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    net = converted()
    for i in range(5):
        step(net, batch(i))
    net.zero_grad()
    loss = net(batch(5)).pow(2).mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with torch.no_grad():
        net(batch(6))
        net(batch(7))
    loss.backward()
    for p, grad in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_weights_at_rest_need_moments_of_no_iteration() -> None:
    """While θ does not change, statistics are those of every iteration, whoever's turn it is."""
    nets = [converted(history="ema", moments_every=every, moments_positions=n) for every, n in ((1, None), (3, 20))]
    for i in range(9):
        outs = [net(batch(i)) for net in nets]
        torch.testing.assert_close(*outs)


def test_layers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from cbn_convert.norm import source

    seen: list[str] = []

    class Watched(source.InputPatches):
        def __init__(self, module: nn.Module, *args) -> None:
            seen.append(names[module])
            super().__init__(module, *args)

    monkeypatch.setattr(source, "InputPatches", Watched)
    net = converted(history="ema", moments_every=3)
    names = {module: name for name, module in net.named_modules()}
    bound = sorted(names[p] for m in layers(net) for p in m.producers)
    assert len(bound) == 3
    step(net, batch(0))
    assert sorted(seen) == bound
    seen.clear()
    for i in range(1, 4):
        step(net, batch(i))
        assert len(seen) == i, "one layer in each step"
    assert sorted(seen) == bound


def test_turns_follow_the_weights_almost_as_well() -> None:
    """Against moments of every iteration: far nearer than averaging without compensation."""
    every, turns, none = (
        converted(history="ema", moments_every=1),
        converted(history="ema", moments_every=3),
        converted(history="ema", compensation="none"),
    )
    for i in range(12):
        outs = [step(net, batch(i)) for net in (every, turns, none)]
        for net in (turns, none):  # the same path of weights
            for p, q in zip(net.parameters(), every.parameters(), strict=True):
                p.data.copy_(q)
    assert (outs[0] - outs[1]).norm() < 0.2 * (outs[0] - outs[2]).norm()


@pytest.mark.parametrize("every", [1, 3])
def test_resumed_history_continues_to_the_bit(every: int) -> None:
    net = converted(history="ema", moments_every=every, moments_positions=20)
    for i in range(5):
        step(net, batch(i))
    twin = converted(seed=1, history="ema", moments_every=every, moments_positions=20)
    twin.load_state_dict(net.state_dict())
    cbn.load_history_state(twin, history_state(net))
    for i in range(5, 12):
        assert torch.equal(step(net, batch(i)), step(twin, batch(i)))


def test_moments_every_needs_an_exponential_window() -> None:
    with pytest.raises(ValueError, match='moments_every=2 needs history="ema"'):
        CrossIterationBatchNorm2d(4, moments_every=2)
    for name in ("moments_every", "moments_positions"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            CrossIterationBatchNorm2d(4, history="ema", **{name: 0})
    with pytest.raises(ValueError, match="moments_every must be an integer"):
        CrossIterationBatchNorm2d(4, history="ema", moments_every=None)
    assert {m.moments_every for m in layers(converted())} == {8}
    assert {m.moments_every for m in layers(converted(history="ring"))} == {1}


@pytest.mark.parametrize("window", [2, 4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_iterations_without_patches_are_seen_from_todays_weights_too(window: int, bias: bool) -> None:
    """The same batch at every step: whatever the weights have become, every iteration has today's mean."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).double()
    norm = CrossIterationBatchNorm2d(4, momentum=1.0, window=window, history="ema", moments_every=8).double().bind(conv)
    for _ in range(20):
        x = conv(batch(0))
        norm(x)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
        with torch.no_grad():
            for p in conv.parameters():
                p += 0.05 * torch.randn_like(p)
