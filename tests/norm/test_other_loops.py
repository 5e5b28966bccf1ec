"""What other people's loops do with a converted model between two steps, which must not change a number unseen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import DOUBLE, inputs, pretrained, step
from helpers.models import randomize_norms
from helpers.ways import batch, layers
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm2d, Window, history_state, load_history_state


def trained(steps: int = 12) -> nn.Module:
    """A converted network whose window has followed some steps."""
    net = pretrained()
    for i in range(steps):
        step(net, batch(i), lr=0.02)
    return net


def statistics(net: nn.Module) -> list[Tensor]:
    return [t.clone() for layer in layers(net) for t in (layer.running_mean, layer.running_var)]


def unchanged(net: nn.Module, before: list[Tensor]) -> None:
    assert all(map(torch.equal, statistics(net), before))


LOOKS_AT_THE_MODEL = {
    "state_dict": lambda net: net.state_dict(),
    "history_state": history_state,
    "deepcopy": copy.deepcopy,
    "fold": lambda net: cbn.fold(net, into="bn"),
    "revert": cbn.revert,
    "train and eval": lambda net: [layer.train().eval() for layer in layers(net)],
    "another epoch": lambda net: (net.train(), [layer.eval() for layer in layers(net)]),
}


def set_to_evaluation(layer: nn.Module) -> None:
    layer.training = False


@pytest.mark.parametrize("what", LOOKS_AT_THE_MODEL)
@pytest.mark.parametrize("freeze", [nn.Module.eval, set_to_evaluation])
@pytest.mark.parametrize("whole", [False, True])
def test_statistics_in_evaluation_stay_whatever_weights_do(
    what: str, freeze: Callable[[nn.Module], object], whole: bool
) -> None:
    """As where norms are frozen for the rest of a training, or averaged weights are swapped in to be saved."""
    net = trained()
    for layer in layers(net):
        freeze(layer)
    if whole:
        net.eval()
        with torch.no_grad():
            for p in net.parameters():
                p *= 1.3
    else:
        for i in range(5):
            step(net, batch(i), lr=0.02)
    before = statistics(net)
    x = batch(99)
    out = copy.deepcopy(net).eval()(x)
    unchanged(net, before)
    LOOKS_AT_THE_MODEL[what](net)
    net.eval()
    names = ("running_mean", "running_var")
    after = [
        t for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for t in map(m.get_buffer, names)
    ]
    assert all(map(torch.equal, after, before))
    assert torch.equal(net(x), out)


def test_a_model_that_trains_is_saved_at_the_weights_as_they_are() -> None:
    """However often it is saved in between."""
    net, twin = trained(), trained()
    net.state_dict()
    for model in (net, twin):
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.1
    net.state_dict()
    torch.testing.assert_close(statistics(net), statistics(twin.eval()))


def test_weights_that_are_views_without_a_bias_are_followed() -> None:
    """As FSDP keeps them, in one flat parameter, and networks that make the weights of others."""
    torch.manual_seed(0)
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).double()
    cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0))
    twin = copy.deepcopy(model.train())
    flat = nn.Parameter(model[0].weight.detach().flatten().clone())
    del model[0].weight
    for i in range(6):
        model[0].weight = flat.view(8, 3, 3, 3)
        found = []
        for m, p in ((model, flat), (twin, twin[0].weight)):
            loss = (m(inputs((2, 3, 8, 8), i)) ** 3).mean()
            (g,) = torch.autograd.grad(loss, p)
            found.append(g.flatten())
            with torch.no_grad():
                p -= 0.5 * g
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert model[1].compensated
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


def test_weights_whose_memory_is_elsewhere_do_not_stop_an_evaluation() -> None:
    """As between the steps of FSDP, where each process holds a part."""
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    cbn.convert(model, example_input=torch.randn(2, 3, 8, 8))
    flat = nn.Parameter(model[0].weight.detach().flatten().clone())
    del model[0].weight
    model.train()[0].weight = flat.view(8, 3, 3, 3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = model[1].running_mean.clone()
    size = flat.untyped_storage().nbytes()
    flat.untyped_storage().resize_(0)
    model.eval()
    flat.untyped_storage().resize_(size)
    assert torch.equal(model[1].running_mean, before)


def write(p: nn.Parameter, change: Tensor, way: str) -> None:
    with torch.no_grad():
        if way == "add_":
            p.add_(change)
        elif way == "data =":
            p.data = p.data + change
        else:
            p.data.add_(change)


@pytest.mark.parametrize("way", ["add_", "data =", "data.add_"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_momentum_encoder_is_followed(folded: bool, way: str) -> None:
    """Nothing of it has a gradient, and yet it moves in every step; beside one that moves alike, and has."""
    pairs = []
    for learns in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3, bias=False).double().requires_grad_(learns)
        norm = randomize_norms(CrossIterationBatchNorm2d(8).double()).bind(conv, folded=folded)
        pairs.append((conv, norm))
    for i in range(40):
        for conv, norm in pairs:
            with torch.no_grad():
                norm(conv(inputs((2, 3, 8, 8), i)))
            write(conv.weight, 0.05 * inputs((8, 3, 3, 3), 100 + i), way)
    (_, encoder), (_, learner) = pairs
    assert encoder.compensated
    torch.testing.assert_close(encoder.eval().running_mean, learner.eval().running_mean, rtol=0.1, atol=0.05)


def test_a_frozen_conv_stays_unfollowed() -> None:
    net = pretrained().requires_grad_(False)
    for i in range(3):
        net(batch(i))
    assert not any(layer.compensated for layer in layers(net))


@pytest.mark.parametrize("way", ["data.copy_", "data =", "numpy"])
def test_statistics_written_in_ways_that_do_not_count_hold_in_evaluation(way: str) -> None:
    net, source = trained(), trained(3)
    for p, q in zip(net.parameters(), source.parameters(), strict=True):
        p.data.copy_(q.data)
    wanted = [b.clone() for b in source.eval().buffers()]
    for b, q in zip(net.buffers(), wanted, strict=True):
        if way == "data =":
            b.data = q.clone()
        elif way == "numpy" and b.dim():
            b.numpy()[:] = q.numpy()
        else:
            b.data.copy_(q)
    assert torch.equal(net.eval()(batch(9)), source(batch(9)))


def test_statistics_in_another_place_hold_in_the_next_step() -> None:
    net, written = trained(), trained()
    for layer, other in zip(layers(net), layers(written), strict=True):
        layer.running_mean.data = layer.running_mean + 1  # which counts as no write
        with torch.no_grad():
            other.running_mean += 1
    torch.testing.assert_close(net(batch(9)), written(batch(9)))


def test_a_hook_that_changes_the_output_of_a_frozen_conv_is_an_error() -> None:
    """As of an adapter on a frozen network."""
    net = pretrained().requires_grad_(False)
    conv = layers(net)[0].producers[0]
    adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride=conv.stride).double()
    conv.register_forward_hook(lambda module, args, out: out + F.adaptive_avg_pool2d(adapter(args[0]), out.shape[2:]))
    with pytest.raises(RuntimeError, match="whose output is changed before it arrives"):
        net(batch(0))


def test_no_images_are_taken_in_where_statistics_are_not_tracked() -> None:
    """As in virtual adversarial training; weights are followed all the same."""
    net = trained(40)
    before = statistics(net)
    for layer in layers(net):
        layer.track_running_stats = False
    net(batch(0) * 3 + 1)  # to the weights behind the last step of the optimizer
    assert not any(map(torch.equal, statistics(net)[:2], before[:2]))
    before, counted = statistics(net), [layer.num_batches_tracked.clone() for layer in layers(net)]
    for i in range(20):
        net(batch(i) * 3 + 1)
    assert all(map(torch.equal, counted, [layer.num_batches_tracked for layer in layers(net)]))
    torch.testing.assert_close(statistics(net), before, rtol=1e-12, atol=1e-12)
    for layer in layers(net):
        layer.track_running_stats = True
    now = statistics(net)
    for i in range(8):
        net(batch(i) * 3 + 1)
    assert not any(map(torch.equal, statistics(net)[::2], now[::2]))


@pytest.mark.parametrize("new", [False, True])
def test_checkpointed_passes_that_wait_together_are_an_error(new: bool) -> None:
    """Two views of SimCLR, or the real and the made images of a GAN: which is computed once more, nobody says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    if not new:
        randomize_norms(model)
    cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0))
    model.train()

    def loss(i: int) -> Tensor:
        return (checkpoint(model, inputs((2, 3, 8, 8), i), use_reentrant=False) ** 3).sum()

    for i in range(3):
        loss(i).backward()
    kept = loss(3)  # whose graph is gone when its name is
    kept = loss(4)
    kept.backward()
    both = loss(5) + loss(6)
    with pytest.raises(RuntimeError, match="2 forward passes wait for their backward pass"):
        both.backward()
    del both
    loss(7).backward()


def test_checkpointed_passes_that_look_at_nothing_may_wait_together(turns: None) -> None:
    """All of them normalise alike; beside the gradients without checkpointing."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
        cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0), window=Window(every=1000))
        model.train()
        for i in range(3):
            model(inputs((2, 3, 8, 8), i))
        images = (inputs((2, 3, 8, 8), i) for i in (5, 6))
        outputs = [checkpoint(model, x, use_reentrant=False) if checkpointed else model(x) for x in images]
        sum((out**3).sum() for out in outputs).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_a_gradient_penalty_under_checkpointing_is_none() -> None:
    """Of two passes, of which the first has had its backward pass, with and without second derivatives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1)).double()
    cbn.convert(randomize_norms(model), example_input=inputs((2, 3, 8, 8), 0))
    model.train()
    for i in range(3):
        checkpoint(model, inputs((2, 3, 8, 8), i), use_reentrant=False).sum().backward()
        x = inputs((2, 3, 8, 8), 10 + i).requires_grad_()
        out = checkpoint(model, x, use_reentrant=False)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        g.square().sum().backward()


def test_a_layer_without_statistics_is_reset_by_a_whole_state_dict() -> None:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).double()
        cbn.convert(net, example_input=inputs((2, 3, 8, 8), 0))
        nets.append(net.train())
    for i in range(4):
        nets[0](inputs((2, 3, 8, 8), i))
    nets[0].load_state_dict(nets[1].state_dict())
    assert torch.equal(nets[0](inputs((2, 3, 8, 8), 9)), nets[1](inputs((2, 3, 8, 8), 9)))


def test_a_resume_behind_statistics_measured_anew_is_bit_identical() -> None:
    net, other = trained(3), pretrained(seed=5)
    update_bn([batch(i) * 2 + 1 for i in range(4)], net)
    history, weights = history_state(net), copy.deepcopy(net.state_dict())
    other.load_state_dict(weights)
    load_history_state(other, history)
    for i in range(4):
        assert torch.equal(step(net, batch(i)), step(other, batch(i)))


class OwnParameter(nn.Parameter):
    """As some frameworks have."""


def test_parameters_of_a_class_of_their_own_are_followed_into_an_evaluation() -> None:
    net = trained(4)
    following = [layer for layer in layers(net) if layer.producers]
    for layer in following:
        (conv,) = layer.producers
        conv.weight = OwnParameter(conv.weight.detach().clone())
    step(net, batch(0))
    before = [layer.running_mean.clone() for layer in following]
    with torch.no_grad():
        for p in net.parameters():
            p *= 1.5
    net.eval()
    assert not any(torch.equal(layer.running_mean, mean) for layer, mean in zip(following, before, strict=True))


def test_weights_that_are_loaded_alone_are_followed() -> None:
    """As where only weights are averaged over clients, and each keeps its statistics (FedBN)."""
    net, other = trained(), trained()
    moved = {k: 1.2 * v for k, v in net.state_dict().items() if k.endswith("weight") and v.dim() > 1}
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in moved:
                p.copy_(moved[name])
    net.load_state_dict(moved, strict=False)
    torch.testing.assert_close(net(batch(20)), other(batch(20)))
    torch.testing.assert_close(statistics(net.eval()), statistics(other.eval()))


@pytest.mark.parametrize("replaced", [False, True])
def test_statistics_of_other_weights_are_told(replaced: bool) -> None:
    """As where a stem is replaced for images with other channels, and its pretrained norm is kept."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)
    with torch.no_grad():
        conv.weight *= torch.exp(torch.randn(64)).view(-1, 1, 1, 1)  # channels differ, as in pretrained layers
        norm.momentum = None
        norm(conv(torch.randn(64, 3, 16, 16)))
    model = nn.Sequential(nn.Conv2d(4, 64, 3, bias=False) if replaced else conv, norm)
    cbn.convert(model, example_input=torch.randn(2, 4 if replaced else 3, 16, 16))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            model.train()(torch.randn(2, 4 if replaced else 3, 16, 16))
    told = [str(w.message) for w in found if "are not those of what it makes" in str(w.message)]
    assert len(told) == replaced
    assert all("Conv2d(4, 64" in text and "reset_running_stats" in text for text in told)


def test_a_momentum_that_is_set_is_told_once() -> None:
    """As by PreciseBN, which reads statistics of single batches, and by schedules of BatchNorm's momentum."""
    net = trained(3)
    for layer in layers(net):
        layer.momentum = 1.0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for i in range(3):
            net(batch(i))
        for layer in layers(net):
            layer.momentum = 0.1
        net(batch(3))
    assert len([w for w in found if "momentum of layer" in str(w.message)]) == len(layers(net))


def test_training_after_statistics_were_measured_anew_carries_them() -> None:
    """Not as new layers, which these are only while they are measured."""
    net = trained(3)
    update_bn([batch(i) * 2 + 1 for i in range(10)], net)
    measured = statistics(net)
    for i in range(6):
        step(net, batch(i) * 2 + 1)
    assert all(layer.history_state()["sources"][0]["kind"] == "ema" for layer in layers(net))
    for a, b in zip(statistics(net), measured, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_statistics_that_were_taken_away_end_in_one_sentence() -> None:
    net = trained(2)
    for layer in layers(net):
        layer.running_mean = layer.running_var = None
    with pytest.raises(RuntimeError, match=r"has no running statistics any more.*cbn\.revert"):
        net(batch(0))
    cbn.revert(copy.deepcopy(net)).eval()(batch(0))
    net.state_dict()


def test_the_report_of_a_second_conversion_says_what_the_first_one_did() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    forms = [
        [row.form for row in cbn.convert(model, window=Window.TUNE, example_input=torch.randn(2, 3, 8, 8)).rows]
        for _ in range(2)
    ]
    assert forms == [["folded"], ["folded"]]


class Wrapped(nn.Module):
    """A conv with a name of its own, whose output it may keep."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.conv, self.keeps = nn.Conv2d(3, 4, 3), keeps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.keeps:
            self.kept = y
        return y


def test_a_hook_on_what_is_around_a_norm_sees_its_input_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(randomize_norms(nn.BatchNorm2d(4)), nn.ReLU())).double()
    model[1].register_forward_pre_hook(lambda module, args: None)
    model.cycle = [model]  # which nobody may follow to its end
    assert [row.form for row in cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0)).rows] == ["unfolded"]


def test_an_image_of_zeros_is_no_reason_to_tell_of_statistics() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
    with torch.no_grad():
        conv.weight *= torch.exp(torch.randn(64)).view(-1, 1, 1, 1)
        norm.momentum = None
        norm(conv(torch.randn(64, 3, 16, 16)))
    model = nn.Sequential(conv, norm)
    cbn.convert(model, example_input=torch.randn(2, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("keeps", [False, True])
def test_whoever_else_reads_the_output_of_a_conv_sees_it_as_it_is(keeps: bool) -> None:
    """A hook on what is around it, or an attribute, as of features that a loss takes."""
    model = nn.Sequential(Wrapped(keeps), randomize_norms(nn.BatchNorm2d(4))).double()
    seen: list[Tensor] = []
    if not keeps:
        model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    x = inputs((2, 3, 8, 8), 0)
    report = cbn.convert(model, example_input=x)
    assert [row.form for row in report.rows] == ["unfolded"]
    model.train()(x)
    torch.testing.assert_close(model[0].kept if keeps else seen[-1], F.conv2d(x, *model[0].conv.parameters()))


def test_a_conv_that_is_now_and_then_called_alone_is_an_error_soon() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomize_norms(nn.BatchNorm2d(4))).to(DOUBLE)
    cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0))
    model.train()
    x = inputs((1, 3, 4, 4), 0)

    for i in range(450):
        model(x)
        if i % 150 == 149:
            model[0](x)
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):
        model(x)
