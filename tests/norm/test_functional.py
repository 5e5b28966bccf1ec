"""The autograd function alone: gradcheck, agreement with nn.BatchNorm at window 1, moments against autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d
from cbn_convert.norm.functional import Reader, WindowNormalize, window_statistics
from cbn_convert.norm.kernels import batch_statistics, select
from cbn_convert.norm.moments import InputPatches


@pytest.mark.parametrize("compensation", ["projection", "taylor", "none"])
@pytest.mark.parametrize("history", ["ring", "ema"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(compensation: str, history: str, affine: bool, groups: int) -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups).double()
    norm = CrossIterationBatchNorm2d(4, affine=affine, window=3, compensation=compensation, history=history)
    norm.double().bind(conv)
    with torch.no_grad():
        for _ in range(3):
            norm(conv(torch.randn(2, 4, 5, 5, dtype=torch.float64)))
            conv.weight += 0.05 * torch.randn_like(conv.weight)
    past = norm._sources[0].history.past(conv.weight, compensation != "none")
    assert past is not None

    def function(y, weight, bias, *affine_parameters):
        x = torch.nn.functional.conv2d(y, weight, bias, 2, 1, 1, groups)
        gamma, beta = affine_parameters or (None, None)
        theta = weight.flatten(1)
        with torch.no_grad():
            window = window_statistics(*batch_statistics(x), past, 1 / 3, theta, bias, compensation, "full")
        rest = (1e-5, x.numel() / 4, None, select(x), (None,), Reader(), "")
        return WindowNormalize.apply(x, theta, bias, gamma, beta, window, *rest)

    inputs = [torch.randn(2, 4, 5, 5), conv.weight, conv.bias]
    if affine:
        inputs += [torch.randn(4), torch.randn(4)]
    assert torch.autograd.gradcheck(function, [t.detach().double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("plain", "ours", "shape"),
    [
        (nn.BatchNorm1d, CrossIterationBatchNorm1d, (6, 5)),
        (nn.BatchNorm1d, CrossIterationBatchNorm1d, (3, 5, 7)),
        (nn.BatchNorm2d, CrossIterationBatchNorm2d, (2, 5, 6, 7)),
        (nn.BatchNorm3d, CrossIterationBatchNorm3d, (2, 5, 3, 4, 5)),
    ],
)
def test_window_1_is_batchnorm(plain, ours, shape, dtype, affine, momentum) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    reference = plain(5, momentum=momentum, affine=affine).to(wide)
    if affine:
        nn.init.normal_(reference.weight)
        nn.init.normal_(reference.bias)
    layer = ours(5, momentum=momentum, affine=affine, window=1).to(wide)
    layer.load_state_dict(reference.state_dict())
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if wide == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    low = {"rtol": 2e-2, "atol": 2e-2} if dtype in (torch.bfloat16, torch.float16) else tolerance
    for _ in range(3):
        x = (2 * torch.randn(shape) + 1).to(dtype)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        out, want = layer(xs[0]), reference(xs[1])
        assert out.dtype == dtype
        direction = torch.randn_like(want)
        torch.testing.assert_close(out, want.to(dtype), **low)
        for module, y in ((layer, out), (reference, want)):
            module.zero_grad()
            (y * direction).sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad, **low)
        if affine:
            torch.testing.assert_close(layer.weight.grad, reference.weight.grad, **low)
            torch.testing.assert_close(layer.bias.grad, reference.bias.grad, **low)
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[key], value, **tolerance)


def test_large_mean_keeps_its_variance() -> None:
    x64 = 1000 + torch.randn(4, 3, 16, 16, dtype=torch.float64)
    _, var = batch_statistics(x64.float())
    rounded = x64.float().double()
    torch.testing.assert_close(var.double(), rounded.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
    norm = CrossIterationBatchNorm2d(3, window=4)
    norm64 = copy.deepcopy(norm).double()
    for _ in range(5):
        x = (1000 + torch.randn(2, 3, 8, 8)).requires_grad_()
        x64 = x.detach().double().requires_grad_()
        out, want = norm(x), norm64(x64)
        torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_moments_are_the_gradients_of_mean_and_var(groups: int, stride: int) -> None:
    conv = nn.Conv2d(4, 8, (3, 2), stride=stride, padding=(2, 1), dilation=(2, 1), groups=groups).double()
    y = torch.randn(3, 4, 10, 9, dtype=torch.float64) + 1
    x = conv(y)
    mean = x.mean((0, 2, 3))
    (d_mean,) = torch.autograd.grad(mean.sum(), conv.weight, retain_graph=True)
    (d_var,) = torch.autograd.grad(x.var((0, 2, 3), correction=0).sum(), conv.weight)
    with torch.no_grad():
        patches = InputPatches(conv, y, x.shape[2:], torch.float64)
        patch_mean, covariance = patches.mean(), patches.covariance_with(x - mean.view(1, -1, 1, 1))
    torch.testing.assert_close(patch_mean.repeat_interleave(8 // groups, 0), d_mean.flatten(1))
    torch.testing.assert_close(2 * covariance, d_var.flatten(1))


@pytest.mark.parametrize("at_most", [40, 9, 1])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 3, padding="same", bias=False),
        nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 8, 1, stride=2),
        nn.Conv2d(4, 8, 1, stride=2, groups=2),
        nn.Conv2d(4, 8, 1, padding=3),
        nn.Conv1d(4, 8, 5, padding=4),
        nn.Conv3d(4, 8, 2, padding=1),
        nn.Linear(4, 8),
    ],
    ids=str,
)
def test_moments_of_some_positions(conv: nn.Module, at_most: int) -> None:
    """Oracle: autograd on the outputs that were chosen; in turn, every position is."""
    conv = copy.deepcopy(conv).double()
    size = [] if isinstance(conv, nn.Linear) else [11, 10, 9][: conv.weight.dim() - 2]
    y = torch.randn(24 if isinstance(conv, nn.Linear) else 2, 4, *size, dtype=torch.float64) + 1
    x = conv(y)
    visits = torch.zeros_like(x)
    for turn in range(2000):
        patches = InputPatches(conv, y, x.shape[2:], torch.float64, at_most, turn)
        with torch.no_grad():
            patches.outputs(visits).add_(1)
        if turn < 4:
            own = patches.outputs(x)
            axes = [1] if isinstance(conv, nn.Linear) else [0, *range(2, x.dim())]
            mean, var = own.mean(axes, keepdim=True), own.var(axes, correction=0)
            assert patches.positions == own.numel() // 8
            (d_mean,) = torch.autograd.grad(mean.sum(), conv.weight, retain_graph=True)
            (d_var,) = torch.autograd.grad(var.sum(), conv.weight, retain_graph=True)
            with torch.no_grad():
                patch_mean = patches.mean()
                repeats = 8 // len(patch_mean)
                torch.testing.assert_close(patch_mean.repeat_interleave(repeats, 0), d_mean.flatten(1))
                torch.testing.assert_close(2 * patches.covariance_with(own - mean), d_var.flatten(1))
        if visits.min() > 0:
            break
    assert visits.min() == visits.max() == 1


def test_scale_invariance_of_the_full_gradient() -> None:
    """BN makes the loss blind to the scale of a filter, θ·dL/dθ = 0; the published gradient loses that."""

    def radial(gradient: str) -> float:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, bias=False).double()
        norm = CrossIterationBatchNorm2d(4, eps=0, window=4, gradient=gradient).double().bind(conv)
        for _ in range(4):
            conv.zero_grad()
            out = norm(conv(torch.randn(2, 3, 6, 6, dtype=torch.float64)))
            (out * torch.randn_like(out)).sum().backward()
        return float((conv.weight.detach() * conv.weight.grad).flatten(1).sum(1).abs().max())

    assert radial("full") < 1e-10
    assert radial("current") > 1e-3
