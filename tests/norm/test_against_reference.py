"""The layer against the paper written out literally (tests/reference.py), over several steps with moving weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import ReferenceCBN
from torch import nn

from cbn_convert.norm import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
)

CONVS = {
    "plain": {"kernel_size": 3, "padding": 1, "bias": False},
    "1x1": {"kernel_size": 1, "bias": False},
    "bias": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False},
    "rectangular": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "groups-bias": {"kernel_size": (1, 3), "stride": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4, "bias": False},
    "depthwise-5x3": {"kernel_size": (5, 3), "padding": (2, 1), "dilation": (1, 2), "groups": 4},
    "same": {"kernel_size": (4, 3), "padding": "same", "bias": False},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}
VARIANTS = [(c, g, h) for c in ("projection", "taylor", "none") for g in ("full", "current") for h in ("ring", "ema")]


def compare(conv: nn.Module, norm: nn.Module, reference: ReferenceCBN, shape: tuple[int, ...], steps: int = 7) -> None:
    """Outputs, all gradients and running statistics agree at each step; the weights move by 10 % in between."""
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(steps):
        y = (torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()
        parameters = [p for p in (conv.weight, conv.bias, norm.weight, norm.bias) if p is not None]
        twins = [t.detach().clone().requires_grad_() for t in (y, *parameters)]
        out = norm(conv(y))
        expected = reference(twins[0], twins[1], twins[2] if conv.bias is not None else None, twins[-2], twins[-1])
        direction = torch.randn_like(out)
        got_grads = torch.autograd.grad((out * direction).sum(), [y, *parameters])
        expected_grads = torch.autograd.grad((expected * direction).sum(), twins)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
        for got, want in zip(got_grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(norm.running_mean, reference.running_mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(norm.running_var, reference.running_var, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            for p in conv.parameters():
                p += 0.1 * torch.randn_like(p) * p.std()


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(("compensation", "gradient", "history"), VARIANTS)
def test_conv2d(kind: str, compensation: str, gradient: str, history: str) -> None:
    conv = nn.Conv2d(4, 8, **CONVS[kind]).double()
    options = {"window": 4, "compensation": compensation, "gradient": gradient, "history": history}
    norm = CrossIterationBatchNorm2d(8, **options).double().bind(conv)

    def apply(y, weight, bias):
        return torch.func.functional_call(twin, {"weight": weight, **({} if bias is None else {"bias": bias})}, (y,))

    twin = nn.Conv2d(4, 8, **CONVS[kind]).double()
    compare(conv, norm, ReferenceCBN(apply, 8, **options), (2, 4, 9, 8))


@pytest.mark.parametrize("compensation", ["projection", "taylor"])
def test_burn_in_uses_the_batch_alone(compensation: str) -> None:
    conv = nn.Conv2d(3, 4, 3).double()
    options = {"window": 3, "compensation": compensation, "burn_in": 3}
    norm = CrossIterationBatchNorm2d(4, **options).double().bind(conv)
    compare(conv, norm, ReferenceCBN(lambda y, w, b: F.conv2d(y, w, b), 4, **options), (2, 3, 6, 6))


def test_linear_conv1d_conv3d() -> None:
    linear = nn.Linear(5, 6).double()
    norm = CrossIterationBatchNorm1d(6, window=4).double().bind(linear)
    compare(linear, norm, ReferenceCBN(F.linear, 6, 4), (8, 5))

    conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2).double()
    norm = CrossIterationBatchNorm1d(6, window=4).double().bind(conv1)
    reference = ReferenceCBN(lambda y, w, b: F.conv1d(y, w, b, 2, 1, 1, 2), 6, 4)
    compare(conv1, norm, reference, (3, 4, 11))

    conv3 = nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), bias=False).double()
    norm = CrossIterationBatchNorm3d(4, window=4).double().bind(conv3)
    reference = ReferenceCBN(lambda y, w, b: F.conv3d(y, w, b, 1, (0, 1, 1)), 4, 4)
    compare(conv3, norm, reference, (2, 2, 3, 5, 6))


@pytest.mark.parametrize("size", [7, 8])
def test_timm_same_padding(size: int) -> None:
    from timm.layers import Conv2dSame

    conv = Conv2dSame(3, 4, 3, stride=2, bias=False).double()
    twin = Conv2dSame(3, 4, 3, stride=2, bias=False).double()
    norm = CrossIterationBatchNorm2d(4, window=4).double().bind(conv)

    def apply(y, weight, bias):
        return torch.func.functional_call(twin, {"weight": weight}, (y,))

    compare(conv, norm, ReferenceCBN(apply, 4, 4), (2, 3, size, size))


def test_float32_follows_float64() -> None:
    conv = nn.Conv2d(8, 16, 3, bias=False)
    norm = CrossIterationBatchNorm2d(16).bind(conv)
    conv64 = nn.Conv2d(8, 16, 3, bias=False).double()
    norm64 = CrossIterationBatchNorm2d(16).double().bind(conv64)
    with torch.no_grad():
        for _ in range(9):
            conv64.weight.copy_(conv.weight)
            y = torch.randn(2, 8, 12, 12)
            torch.testing.assert_close(norm(conv(y)).double(), norm64(conv64(y.double())), rtol=1e-4, atol=1e-5)
            conv.weight += 0.02 * torch.randn_like(conv.weight)


def test_projection_is_exact_when_weights_are_only_rescaled_and_never_below_taylor() -> None:
    from cbn_convert.norm.functional import Moments, compensate, responses
    from cbn_convert.norm.history import History
    from cbn_convert.norm.moments import InputPatches

    conv = nn.Conv2d(3, 5, 3, bias=False).double()
    y = torch.randn(4, 3, 9, 9, dtype=torch.float64)

    def moments() -> Moments:
        x = conv(y)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        patches = InputPatches(conv, y, x.shape[2:], torch.float64)
        patch_mean, covariance = patches.mean(), patches.covariance_with(x - mean.view(1, -1, 1, 1))
        theta = conv.weight.flatten(1)
        return Moments(mean, var, theta @ patch_mean[0], (theta * covariance).sum(1), patch_mean, covariance)

    with torch.no_grad():
        history = History(2, "ring")
        history.stage(moments(), torch.tensor(True))
        past = history.past(y, True)
        conv.weight *= torch.linspace(0.2, 3, 5, dtype=torch.float64).view(-1, 1, 1, 1)
        now, guess = moments(), compensate(past, responses(past, conv.weight.flatten(1), None), "projection")
        torch.testing.assert_close(guess.mean[:, 0], now.mean)
        torch.testing.assert_close(guess.var[:, 0], now.var)

        conv.weight += 0.3 * torch.randn_like(conv.weight)
        now = moments()
        projection = compensate(past, responses(past, conv.weight.flatten(1), None), "projection").var[:, 0]
        taylor = compensate(past, responses(past, conv.weight.flatten(1), None), "taylor").var[:, 0]
        assert (projection >= taylor).all()
        assert (projection <= now.var * (1 + 1e-12)).all()
        assert (projection < now.var * 0.999).any()


def test_compensation_error_is_second_order_in_the_weight_change() -> None:
    from cbn_convert.norm.functional import Moments, compensate, responses
    from cbn_convert.norm.moments import InputPatches

    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
    y = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(conv.weight)
    with torch.no_grad():
        x = conv(y)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        patches = InputPatches(conv, y, x.shape[2:], torch.float64)
        patch_mean, covariance = patches.mean(), patches.covariance_with(x - mean.view(1, -1, 1, 1))
        anchor = (conv.weight.flatten(1) @ patch_mean[0])[:, None]
        now = [t[:, None] for t in (mean, var, patch_mean, covariance)]
        past = Moments(now[0], now[1], anchor, now[1], now[2], now[3])
        for compensation in ("projection", "taylor"):
            errors = []
            for step in (1e-2, 1e-3):
                weight = conv.weight + step * direction
                new = F.conv2d(y, weight, padding=1)
                guess = compensate(past, responses(past, weight.flatten(1), None), compensation)
                torch.testing.assert_close(guess.mean[:, 0], new.mean((0, 2, 3)))
                errors.append((guess.var[:, 0] - new.var((0, 2, 3), correction=0)).abs().max())
            assert 80 < errors[0] / errors[1] < 120


@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("kind", CONVS)
def test_exact_is_the_past_batch_seen_again(kind: str, history: str) -> None:
    """Oracle: run the past inputs through today's weights, with autograd, and pool them."""
    conv = nn.Conv2d(4, 8, **CONVS[kind]).double()
    norm = CrossIterationBatchNorm2d(8, window=4, compensation="exact", history=history).double().bind(conv)
    inputs, weights = [], []
    for step in range(7):
        y = torch.randn(2, 4, 9, 8, dtype=torch.float64) + 0.5
        k = min(step + 1, 4)
        weights = [(1 - 1 / k) * w for w in weights] + [1 / k] if history == "ema" else [1 / k] * k
        inputs = [*inputs, y] if history == "ema" else [*inputs, y][-4:]
        out = norm(conv(y))
        xs = [conv(old) for old in inputs]
        mean = sum(w * x.mean((0, 2, 3)) for w, x in zip(weights, xs, strict=True)).view(1, -1, 1, 1)
        var = sum(w * (x - mean).square().mean((0, 2, 3)) for w, x in zip(weights, xs, strict=True)).view(1, -1, 1, 1)
        expected = (xs[-1] - mean) / torch.sqrt(var + norm.eps)
        torch.testing.assert_close(out, expected)
        direction = torch.randn_like(out)
        (got,) = torch.autograd.grad((out * direction).sum(), conv.weight)
        (want,) = torch.autograd.grad((expected * direction).sum(), conv.weight)
        torch.testing.assert_close(got, want)
        with torch.no_grad():
            for p in conv.parameters():
                p += 0.3 * torch.randn_like(p) * p.std()
