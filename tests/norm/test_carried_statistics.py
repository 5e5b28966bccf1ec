"""The statistics of a carried window outside of a step: resumed, loaded, copied, written by others, evaluated."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import DOUBLE, bound_pair, normalised, perturb, pretrained, step
from helpers.models import randomize_norms
from helpers.ways import Net, X, batch, layers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.norm import (
    Window,
    history_state,
    load_history_state,
)
from cbn_convert.norm.carried import CarriedWindow
from cbn_convert.norm.new_layer import NewLayerWindow


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
    of_before = copy.deepcopy(state)
    del of_before["stem.1"]["sources"][0]["patch_looks"]
    with pytest.raises(ValueError, match="another version"):
        load_history_state(pretrained(), of_before)
    state["stem.1"]["sources"][0]["slots"]["patch_axes"][:] = float("nan")
    with pytest.raises(ValueError, match="patch_axes that is not finite"):
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
        kind = CarriedWindow if measured else NewLayerWindow
        assert all(isinstance(s.state, kind) for n in layers(net) for s in n._sources)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_run_from_scratch_goes_on_as_one_with_statistics() -> None:
    net = Net().double()
    cbn.convert(net, example_input=X.double())
    for i in range(5):
        step(net.train(), batch(i))
    assert all(isinstance(s.state, NewLayerWindow) for n in layers(net) for s in n._sources)
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
    model, ahead = (nn.Sequential(*bound_pair(Window(every=1000), folded=folded)) for _ in range(2))
    for net in (model, ahead):
        net(batch(0))
        torch.manual_seed(1)
        perturb(net[0])
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
    conv, norm = bound_pair(folded=True)
    model = nn.Sequential(conv, norm)
    model(batch(0))
    norm.eval()
    before = norm.running_mean.clone()
    for i in range(3):
        x = batch(i)
        torch.testing.assert_close(
            model(x), normalised(norm, F.conv2d(x, *conv.parameters()), before, norm.running_var)
        )
        perturb(conv)
    assert torch.equal(norm.running_mean, before)


def test_statistics_that_somebody_else_writes_hold_at_the_weights_as_they_are() -> None:
    """As where averaged weights and statistics are swapped in."""
    conv, norm = bound_pair(Window(every=1000))
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
    models = [nn.Sequential(*bound_pair(folded=folded, dtype=dtype)) for _ in range(2)]
    norm = models[1][1]
    flat = torch.cat([norm.running_mean, norm.running_var, torch.zeros(4, dtype=dtype)])
    norm.running_mean, norm.running_var, others = flat.split(4)
    for i in range(6):
        outputs = []
        for model in models:
            outputs.append(model(batch(i).to(dtype)))
            torch.manual_seed(i)
            perturb(model[0])
        assert torch.equal(*outputs)
        others += 1


@pytest.mark.parametrize("learns", [True, False])
def test_half_precision_buffers_that_a_process_group_hands_out_still_move(
    monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    """A step moves them by less than bfloat16 can tell, so that statistics read from them would stay where they are."""
    found = []
    for processes in (1, 2):
        monkeypatch.setattr("cbn_convert.norm.source.world_size", lambda n=processes: n)
        conv, norm = bound_pair(Window(size=2000, every=1), folded=True, dtype=torch.bfloat16)
        conv.requires_grad_(learns)
        with torch.no_grad():
            norm.running_var.fill_(1.5)
            conv.bias.fill_(4.0)  # where a look moves the mean by 0.002 of itself
        for i in range(200):
            norm(conv(batch(i).bfloat16()))
        found.append((norm.running_mean, norm.running_var))
    assert all(map(torch.equal, *found))
    assert not (found[1][1] == 1.5).any()


def test_statistics_that_a_process_group_hands_out_follow_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel writes the buffers of rank 0, of the step before, over those of all in every step."""
    monkeypatch.setattr("cbn_convert.norm.source.world_size", lambda: 2)
    (conv, norm), (other_conv, other) = bound_pair(Window(every=1000)), bound_pair(Window(every=1000))
    for model in ((conv, norm), (other_conv, other)):
        model[1](model[0](batch(0)))
    torch.manual_seed(9)
    perturb(conv)
    torch.manual_seed(9)
    perturb(other_conv)
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(norm, name).clone())
    torch.testing.assert_close(norm(conv(batch(1))), other(other_conv(batch(1))))


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
