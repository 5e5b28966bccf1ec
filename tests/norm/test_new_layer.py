"""New layers: half of the past as today's weights see it, half of the batch, which joins in the step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import perturb
from helpers.models import randomize_norms
from helpers.ways import X, assert_same_state, batch, converted, layers, step
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert import CrossIterationBatchNorm2d
from cbn_convert.norm import Window, history_state, load_history_state, new_layer
from cbn_convert.norm.carried import PATCH_LOOKS, CarriedWindow
from cbn_convert.norm.functional import LEAST_VARIANCE
from cbn_convert.norm.new_layer import NewLayerWindow

EVERY_POSITION = Window(positions=None, start="empty")


class Literal:
    """The formulas as they stand, for a 1x1 conv of so few channels that the axes are all of the covariance."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        theta, b = conv.weight.flatten(1), conv.bias
        out = F.conv2d(x, conv.weight, b)
        mean, var = out.mean((0, 2, 3)), out.var((0, 2, 3), correction=0)
        patches = x.detach().movedim(1, -1).flatten(0, -2)
        p, own = patches.mean(0), torch.cov(patches.T, correction=0)
        eye = torch.eye(len(p), dtype=p.dtype)
        if self.steps == 0:
            M, S = mean, var
            self.p, self.sigma = p, own + LEAST_VARIANCE * own.diagonal().mean() * eye
        else:
            before, b_before = self.theta, self.b
            growth = (theta.norm(dim=1) / before.norm(dim=1)) - 1
            rest = self.M - before @ self.p - b_before
            moved = self.M + (theta - before) @ self.p + b - b_before + growth * rest
            spread = ((theta @ self.sigma) * theta).sum(1) / ((before @ self.sigma) * before).sum(1)
            old = self.S * spread
            M = (moved + mean) / 2
            S = (old + var) / 2 + (mean - moved) ** 2 / 4
            share, away = 1 / min(self.steps + 1, PATCH_LOOKS), p - self.p
            found = own + (1 - share) * torch.outer(away, away)
            least = LEAST_VARIANCE * found.diagonal().mean() * eye
            self.sigma, self.p = (1 - share) * self.sigma + share * (found + least), self.p + share * away
        self.M, self.S, self.theta, self.b = (t.detach().clone() for t in (M, S, theta, b))
        self.steps += 1
        shape = (1, -1, 1, 1)
        normal = (out - M.view(shape)) * torch.rsqrt(S + norm.eps).view(shape)
        return normal * norm.weight.view(shape) + norm.bias.view(shape)


def test_values_and_gradients_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 1).double()
    norm = randomize_norms(CrossIterationBatchNorm2d(5, window=EVERY_POSITION)).double().bind(conv)
    literal, parameters = Literal(), [*conv.parameters(), *norm.parameters()]
    for i in range(PATCH_LOOKS + 4):
        x = (batch(i, size=5) + i % 3).requires_grad_()
        want = literal(x, conv, norm)
        expected = torch.autograd.grad(want.pow(3).sum(), [x, *parameters])
        got = norm(conv(x))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        found = torch.autograd.grad(got.pow(3).sum(), [x, *parameters])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        perturb(conv, 0.2)


def test_radial_gradient_is_zero() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, groups=1, bias=False).double()
    norm = CrossIterationBatchNorm2d(5, eps=1e-30, window=EVERY_POSITION).double().bind(conv)
    for i in range(6):
        conv.weight.grad = None
        norm(conv(batch(i) + 1)).pow(3).sum().backward()
        radial = (conv.weight.grad * conv.weight).sum((1, 2, 3))
        assert radial.abs().max() < 1e-9 * conv.weight.grad.abs().max()
        perturb(conv)


def test_without_a_weight_the_batch_gets_the_whole_gradient() -> None:
    norm = CrossIterationBatchNorm2d(3, affine=False, window=EVERY_POSITION).double()
    a, b = batch(0), (batch(1) + 1).requires_grad_()
    norm(a)
    y = norm(b)
    torch.testing.assert_close(y, F.batch_norm(torch.cat([a, b]), None, None, training=True)[2:])
    S, M = (t.detach() for t in torch.var_mean(torch.cat([a, b]), (0, 2, 3), correction=0, keepdim=True))
    mean = b.mean((0, 2, 3), keepdim=True)
    square = (b - M).square().mean((0, 2, 3), keepdim=True)
    literal = (b - M - (mean - mean.detach())) * torch.rsqrt(S + square - square.detach() + norm.eps)
    (got,), (want,) = (torch.autograd.grad(out.pow(3).sum(), b) for out in (y, literal))
    torch.testing.assert_close(got, want)


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    net, twin = converted(history="ema", start="empty"), converted(history="ema", start="empty")
    for i in range(4):
        step(net, batch(i))
        step(twin, batch(i))
    with torch.no_grad():
        net(batch(9) * float("nan"))
    assert torch.equal(step(net, batch(5)), step(twin, batch(5)))


def test_resume_goes_on_to_the_bit_and_copies_begin_anew() -> None:
    net = converted(history="ema", start="empty")
    for i in range(5):
        step(net, batch(i))
    weights, state = copy.deepcopy(net.state_dict()), history_state(net)
    other = converted(seed=1, history="ema", start="empty")
    other.load_state_dict(weights)
    load_history_state(other, state)
    for i in range(5, 9):
        assert torch.equal(step(net, batch(i)), step(other, batch(i)))
    assert_same_state(net, other, rtol=0, atol=0)
    assert all(s.state.seen == 0 for n in layers(copy.deepcopy(net)) for s in n._sources)


def test_a_ring_of_the_version_before_is_refused() -> None:
    net = converted(history="ema", start="empty")
    step(net, batch(0))
    state = history_state(net)
    for layer in state.values():
        layer["sources"][0]["kind"] = "ring"
    with pytest.raises(ValueError, match="history is of another version of the windows"):
        load_history_state(net, state)


def test_what_it_says_it_keeps_is_what_it_keeps() -> None:
    net = converted(double=False, history="ema", start="empty")
    said = [layer.history_bytes for layer in layers(net)]  # before it is known what they remember
    for i in range(3):
        step(net, batch(i, dtype=torch.float32))
    for layer, told in zip(layers(net), said, strict=True):
        assert layer.history_bytes == told
        assert sum(t.numel() * t.element_size() for t in layer.history_tensors()) == layer.history_bytes


def test_a_bad_first_batch_on_a_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """There conditions are not looked at; stood in for by a CPU on which they are not."""
    monkeypatch.setattr(new_layer, "is_known", lambda condition: False)
    net = converted(history="ema", start="empty")
    with torch.no_grad():
        net(batch(9) * float("nan"))
    assert all(bool(torch.isfinite(step(net, batch(i))).all()) for i in range(3))


def test_a_finite_batch_that_is_too_far_away_is_left_out() -> None:
    torch.manual_seed(0)
    norm = CrossIterationBatchNorm2d(3, window=EVERY_POSITION)
    for x in (batch(0), torch.full((2, 3, 4, 4), 4e19), batch(1)):
        y = norm(x.float())
    assert torch.isfinite(y).all()
    assert torch.isfinite(norm.running_var).all()


def test_running_variance_has_no_bias() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 256, 1, groups=256).double()  # channels that do not scatter alike
    nn.init.ones_(conv.weight)
    norm = CrossIterationBatchNorm2d(256, window=EVERY_POSITION, momentum=0.02).double().bind(conv)
    for _ in range(400):
        with torch.no_grad():
            norm(conv(torch.randn(2, 256, 1, 1, dtype=torch.float64)))
    assert 0.95 < norm.running_var.mean() < 1.05  # 1.1 with the values of two batches instead of three


def test_nobody_follows_weights_that_are_not_to_be_followed() -> None:
    """Bound or not, the batch has its share of the gradient."""
    gradients = []
    for bound in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 1).double()
        norm = CrossIterationBatchNorm2d(4, window=Window(start="empty", compensation="none")).double()
        if bound:
            norm.bind(conv)
        norm(conv(batch(0)))
        x = batch(1).requires_grad_()
        gradients.append(torch.autograd.grad(norm(conv(x)).pow(3).sum(), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("start", ["empty", "running"])
@pytest.mark.parametrize("lacking", ["patch_rest", "anchor", "mean", "patch_axes"])
def test_a_history_that_lacks_something_is_refused(start: str, lacking: str) -> None:
    net = converted(history="ema", start=start)
    step(net, batch(0))
    state = history_state(net)
    for layer in state.values():
        layer["sources"][0]["slots"].pop(lacking, None)
    before = history_state(net)
    with pytest.raises(ValueError, match=f"without {lacking}.*; it is damaged"):
        load_history_state(net, state)
    assert before.keys() == history_state(net).keys()


def test_it_ends_where_there_are_statistics() -> None:
    net = converted(new=True, history="ema")
    assert all(layer.is_new for layer in layers(net))
    for i in range(3):
        step(net, batch(i))
    assert {type(s.state) for n in layers(net) for s in n._sources} == {NewLayerWindow}
    other = converted(seed=3, new=True, history="ema")
    other.load_state_dict(net.state_dict())
    step(other, batch(3))
    assert {type(s.state) for n in layers(other) for s in n._sources} == {CarriedWindow}
    assert cbn.convert(copy.deepcopy(net), example_input=X.double()) is not None
