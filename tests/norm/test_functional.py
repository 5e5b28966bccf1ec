"""The mathematics: gradcheck, agreement with nn.BatchNorm at window 1, moments against autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers.models import randomize_norms
from torch import Tensor, nn
from torch.func import functional_call

from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d
from cbn_convert.norm.functional import probes_of
from cbn_convert.norm.kernels import batch_statistics, forced
from cbn_convert.norm.moments import InputPatches
from cbn_convert.norm.producers import of_rows

WINDOWS = {
    "projection": {"window": 3},
    "taylor": {"window": 3, "compensation": "taylor"},
    "none": {"window": 3, "compensation": "none"},
    "alone": {"window": 1},
    "carried": {"window": 16, "history": "ema", "moments_every": 2},
    "carried, none": {"window": 16, "history": "ema", "compensation": "none"},
}


def of_one_step(norm: CrossIterationBatchNorm2d) -> Callable[..., Tensor]:
    """The next step of a layer behind a conv, as a function that can be computed as often as one likes."""
    state = norm.history_state()
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    (conv,) = norm.producers

    def function(y: Tensor, weight: Tensor, bias: Tensor, *affine: Tensor) -> Tensor:
        with torch.no_grad():
            norm.running_mean.copy_(statistics[0])
            norm.running_var.copy_(statistics[1])
        norm.load_history_state(state)
        x = functional_call(conv, {"weight": weight, "bias": bias}, (y,))
        own = dict(zip(("weight", "bias"), affine, strict=False))
        # the norm asks the conv for its weight, which has to be the one that it is differentiated by
        before, conv._parameters["weight"], conv._parameters["bias"] = dict(conv._parameters), weight, bias
        try:
            return functional_call(norm, own, (x,))
        finally:
            conv._parameters.update(before)

    return function


def after_some_steps(groups: int = 1, affine: bool = True, **options) -> tuple[CrossIterationBatchNorm2d, list[Tensor]]:
    """A layer whose weights have moved under it, and inputs of `of_one_step`."""
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups).double()
    norm = randomize_norms(CrossIterationBatchNorm2d(4, affine=affine, **options)).double().bind(conv)
    with torch.no_grad():
        for _ in range(3):
            norm(conv(torch.randn(2, 4, 5, 5, dtype=torch.float64)))
            conv.weight += 0.05 * torch.randn_like(conv.weight)
            conv.bias += 0.05 * torch.randn_like(conv.bias)
    inputs = [torch.randn(2, 4, 5, 5), conv.weight + 0.05 * torch.randn_like(conv.weight), conv.bias + 0.1]
    inputs += [torch.randn(4), torch.randn(4)] if affine else []
    return norm, [t.detach().double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(kind: str, affine: bool, groups: int) -> None:
    """By finite differences: what is remembered is seen from the weights that are differentiated by."""
    norm, inputs = after_some_steps(groups, affine, **WINDOWS[kind])
    assert torch.autograd.gradcheck(of_one_step(norm), inputs)


@pytest.mark.parametrize("kind", WINDOWS)
def test_second_derivatives(kind: str) -> None:
    norm, inputs = after_some_steps(2, **WINDOWS[kind])
    assert torch.autograd.gradgradcheck(of_one_step(norm), inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"window": 3, "compensation": "taylor"},
        {"window": 3, "compensation": "none"},
        {"window": 3, "gradient": "current"},
        {"window": 3, "gradient": "straight_through"},
        {"window": 16, "history": "ema"},
        {"window": 16, "history": "ema", "gradient": "current"},
    ],
    ids=str,
)
def test_a_graph_of_the_gradient_changes_nothing_of_it(options: dict) -> None:
    norm, inputs = after_some_steps(2, **options)
    out = of_one_step(norm)(*inputs)
    direction = torch.randn_like(out)
    wanted = torch.autograd.grad((out * direction).sum(), inputs, retain_graph=True)
    found = torch.autograd.grad((out * direction).sum(), inputs, create_graph=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


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
    reference = randomize_norms(plain(5, momentum=momentum, affine=affine)).to(wide)
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


PATCHES = [
    nn.Conv2d(4, 8, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), groups=2),
    nn.Conv2d(4, 8, 3, padding=1, groups=4),
    nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(4, 8, 3, stride=4),
    nn.Conv2d(4, 8, 1, padding=3),
    nn.Conv1d(4, 8, 5, padding="same"),
    nn.Conv3d(4, 8, 2, padding=1),
    nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    nn.ConvTranspose1d(4, 8, 4, stride=3),
    nn.Linear(4, 8),
]


ORDERS = {
    "dense": lambda y: y,
    "channels last": lambda y: y.movedim(1, -1).contiguous().movedim(-1, 1),
    "a part": lambda y: torch.stack([y, y + 1], -1).repeat(1, 2, *[1] * (y.dim() - 1))[:, :4, ..., 0],
}


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("at_most", "turn"), [(None, 1), *((9, turn) for turn in (0, 1, 4, 8))])
@pytest.mark.parametrize("layer", PATCHES, ids=str)
@torch.no_grad()
def test_mean_and_variance_of_every_entry_of_the_patches(
    layer: nn.Module, at_most: int | None, turn: int, order: str, kernels: str
) -> None:
    """Oracle: with one weight at 1 and all others at 0, the layer's output is that entry of the patches."""
    layer = copy.deepcopy(layer).double()
    size = [] if isinstance(layer, nn.Linear) else [11, 10, 9][: layer.weight.dim() - 2]
    y = ORDERS[order](torch.randn(24 if isinstance(layer, nn.Linear) else 2, 4, *size, dtype=torch.float64) + 100)
    x = layer(y)
    patches = InputPatches(layer, y, x.shape[2:], torch.float64, at_most, turn)
    with forced(kernels) if kernels == "plain" else nullcontext():
        mean, var, _ = patches.moments(probes_of(None, patches.groups, patches.width, y))
    groups, entries = mean.shape
    if layer.bias is not None:
        layer.bias.zero_()
    for entry in range(turn % 3, entries, 3 if at_most else 1):
        rows = torch.zeros(8, entries, dtype=torch.float64)
        rows[:, entry] = 1
        layer.weight.copy_(of_rows(rows, layer))
        own = patches.outputs(layer(y))
        axes = [1] if isinstance(layer, nn.Linear) else [0, *range(2, own.dim())]
        own_mean, own_var = (t.view(groups, -1)[:, 0] for t in (own.mean(axes), own.var(axes, correction=0)))
        torch.testing.assert_close(mean[:, entry], own_mean)
        torch.testing.assert_close(var[:, entry], own_var)
    torch.testing.assert_close(patches.mean(), mean)


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 16, "history": "ema"}], ids=str)
def test_scale_invariance_of_the_full_gradient(options: dict) -> None:
    """BN makes the loss blind to the scale of a filter, θ·dL/dθ = 0; the published gradient loses that."""

    def radial(gradient: str) -> float:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, bias=False).double()
        norm = (
            randomize_norms(CrossIterationBatchNorm2d(4, eps=1e-30, gradient=gradient, **options)).double().bind(conv)
        )
        for _ in range(4):
            conv.zero_grad()
            out = norm(conv(torch.randn(2, 3, 6, 6, dtype=torch.float64)))
            (out * torch.randn_like(out)).sum().backward()
            along = (conv.weight.detach() * conv.weight.grad).flatten(1).sum(1).abs().max()
            with torch.no_grad():
                conv.weight += 0.1 * torch.randn_like(conv.weight)
        return float(along)

    assert radial("full") < 1e-10
    assert radial("current") > 1e-3
