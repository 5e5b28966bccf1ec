"""What the window remembers: when it begins, what belongs to it, and what must not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.ways import assert_same_state, batch, converted, layers, step
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
    assert not any(layer.compensated for layer in layers(net))
    assert torch.equal(step(net, batch(9)), step(other, batch(9)))

    step(net, batch(10))
    net.stem[0].load_state_dict(converted(seed=2).stem[0].state_dict())
    assert layers(net)[0].history_state()["sources"] == [None]
    assert [layer.history_state()["sources"][0]["seen"] for layer in layers(net)[1:]] == [2, 2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_not_recorded(bad: float) -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    norm = CrossIterationBatchNorm2d(4, window=3).double().bind(conv)
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
    fresh = converted()
    fresh.load_state_dict(net.state_dict())
    for i in range(3, 6):
        assert torch.equal(step(net, batch(i)), step(fresh, batch(i)))


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
