"""The ring against the paper written out literally (helpers.reference), over several steps with moving weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import ReferenceCBN
from torch import Tensor, nn

from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d
from cbn_convert.norm.ring import Iteration

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
VARIANTS = [(c, g) for c in ("projection", "taylor", "none") for g in ("full", "current")]


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
@pytest.mark.parametrize(("compensation", "gradient"), VARIANTS)
def test_conv2d(kind: str, compensation: str, gradient: str) -> None:
    conv = nn.Conv2d(4, 8, **CONVS[kind]).double()
    options = {"window": 4, "compensation": compensation, "gradient": gradient}
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


def recorded(conv: nn.Conv2d, y: Tensor) -> Iteration:
    """What one iteration leaves behind, by autograd: C is half the gradient of the variance, and p̄ that of the mean."""
    weight = conv.weight.detach().requires_grad_()
    x = conv._conv_forward(y, weight, None)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    (of_mean,) = torch.autograd.grad(mean.sum(), weight, retain_graph=True)
    (of_var,) = torch.autograd.grad(var.sum(), weight)
    covariance = of_var.flatten(1) / 2
    explained = (weight.flatten(1) * covariance).sum(1).detach()
    return Iteration(mean.detach(), var.detach(), mean.detach(), explained, of_mean.flatten(1)[:1], covariance)


def measured(conv: nn.Conv2d, y: Tensor) -> tuple[Tensor, Tensor]:
    x = conv(y)
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


@torch.no_grad()
def test_projection_is_exact_when_weights_are_only_rescaled_and_never_below_taylor() -> None:
    conv = nn.Conv2d(3, 5, 3, bias=False).double()
    y = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    with torch.enable_grad():
        past = recorded(conv, y)
    conv.weight *= torch.linspace(0.2, 3, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    for got, want in zip(past.seen_from(conv.weight.flatten(1), None, "projection"), measured(conv, y), strict=True):
        torch.testing.assert_close(got, want)

    conv.weight += 0.3 * torch.randn_like(conv.weight)
    _, var = measured(conv, y)
    _, projection = past.seen_from(conv.weight.flatten(1), None, "projection")
    _, taylor = past.seen_from(conv.weight.flatten(1), None, "taylor")
    assert (projection >= taylor).all()
    assert (projection <= var * (1 + 1e-12)).all()
    assert (projection < var * 0.999).any()


@pytest.mark.parametrize("compensation", ["projection", "taylor"])
def test_compensation_error_is_second_order_in_the_weight_change(compensation: str) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
    y = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    past, start, direction = recorded(conv, y), conv.weight.detach().clone(), torch.randn_like(conv.weight)
    errors = []
    with torch.no_grad():
        for step in (1e-2, 1e-3):
            conv.weight.copy_(start + step * direction)
            mean, var = measured(conv, y)
            got_mean, got_var = past.seen_from(conv.weight.flatten(1), None, compensation)
            torch.testing.assert_close(got_mean, mean)
            errors.append((got_var - var).abs().max())
    assert 80 < errors[0] / errors[1] < 120
