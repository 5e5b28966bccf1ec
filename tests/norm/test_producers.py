"""Every kind of layer that may feed the norm, against autograd on past inputs kept by the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d
from cbn_convert.norm.producers import is_producer

WINDOW = 3


def weight_norm(conv: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(conv)


def spectral_norm(conv: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(conv)


PRODUCERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    "transposed-groups": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), groups=2, bias=False), (2, 4, 5, 6)),
    "transposed-dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=2), (2, 4, 5, 6)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (3, 4, 7)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(2, 6, (1, 2, 2), stride=(1, 2, 2), groups=2), (2, 2, 3, 3, 4)),
    "conv-2d-same": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 8, 7)),
    "std": (lambda: StdConv2d(4, 6, 3, stride=2, bias=False), (2, 4, 8, 7)),
    "std-same": (lambda: StdConv2dSame(4, 6, 3, stride=2, bias=True), (2, 4, 8, 7)),
    "scaled-std": (lambda: ScaledStdConv2d(4, 6, 3, gamma=1.7, groups=2), (2, 4, 6, 6)),
    "scaled-std-same": (lambda: ScaledStdConv2dSame(4, 6, 3, stride=2), (2, 4, 8, 7)),
    "weight-norm": (lambda: weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 6, 6)),
    "spectral-norm": (lambda: spectral_norm(nn.Conv2d(4, 6, 3)), (2, 4, 6, 6)),
    "spectral-norm-linear": (lambda: spectral_norm(nn.Linear(5, 6)), (8, 5)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 6, 6)),
    "replicate-1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 9)),
}
NORMS = {
    2: CrossIterationBatchNorm1d,
    3: CrossIterationBatchNorm1d,
    4: CrossIterationBatchNorm2d,
    5: CrossIterationBatchNorm3d,
}


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p) * p.std().nan_to_num(1)


@pytest.mark.parametrize("kind", PRODUCERS)
def test_past_follows_the_effective_weight(kind: str) -> None:
    """Oracle for projection: cov of the past output under old and today's weights, from both outputs themselves."""
    build, shape = PRODUCERS[kind]
    module = build().double()
    norm = NORMS[len(shape)](6, window=WINDOW, affine=False).double().bind(module)
    past: list[tuple[Tensor, Tensor]] = []
    for step in range(5):
        y = torch.randn(shape, dtype=torch.float64) + 0.5
        x = module(y)
        out = norm(x)

        # parametrisations with a state of their own answer here what the forward pass used
        module.eval()
        means, variances = [x.mean(dims := [0, *range(2, x.dim())])], [x.var(dims, correction=0)]
        for old_y, old_x in past:
            new_x = module(old_y)
            means.append(new_x.mean(dims))
            centred = old_x - old_x.mean(dims, keepdim=True)
            covariance = (centred * (new_x - new_x.mean(dims, keepdim=True))).mean(dims)
            variances.append(covariance**2 / centred.square().mean(dims))
        mean = sum(means) / len(means)
        var = sum(v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)) / len(means)
        view = [1, -1, *[1] * (x.dim() - 2)]
        expected = (x - mean.view(view)) / torch.sqrt(var.view(view) + norm.eps)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        direction = torch.randn_like(out)
        parameters = list(module.parameters())
        got = torch.autograd.grad((out * direction).sum(), parameters, retain_graph=True)
        want = torch.autograd.grad((expected * direction).sum(), parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
        module.train()

        past = [*past, (y, x.detach())][-(WINDOW - 1) :]
        move(module)
        assert step == 0 or norm.history_state()["sources"][0]["seen"] == step + 1


def test_exact_covers_weight_standardised_and_parametrised_convs() -> None:
    for module in (StdConv2d(4, 6, 1, bias=False).double(), weight_norm(nn.Conv2d(4, 6, 3)).double()):
        norm = CrossIterationBatchNorm2d(6, window=2, compensation="exact").double().bind(module)
        old = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        norm(module(old))
        move(module)
        y = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        both = torch.cat([module(old), module(y)])
        expected = F.batch_norm(both, None, None, norm.weight, norm.bias, training=True)[2:]
        torch.testing.assert_close(norm(module(y)), expected)


def test_reading_the_weight_does_not_step_a_parametrisation() -> None:
    conv = spectral_norm(nn.Conv2d(3, 4, 3))
    norm = CrossIterationBatchNorm2d(4, window=3).bind(conv)
    alone = spectral_norm(nn.Conv2d(3, 4, 3))
    alone.load_state_dict(conv.state_dict())
    for _ in range(3):
        y = torch.randn(2, 3, 6, 6)
        norm(conv(y))
        alone(y)
    assert all(torch.equal(a, b) for a, b in zip(conv.buffers(), alone.buffers(), strict=True))
    assert conv.parametrizations.weight[0].training


@pytest.mark.parametrize(
    "arrange",
    [lambda x: x.flatten(0, 1), lambda x: x.transpose(1, 2), lambda x: x.reshape(-1, x.shape[-1]).contiguous()],
)
def test_linear_with_more_than_two_dimensions(arrange: Callable[[Tensor], Tensor]) -> None:
    """Linear on tokens, flattened or transposed before BatchNorm1d, as in LeViT."""
    linear = nn.Linear(5, 6, bias=False).double()
    norm = CrossIterationBatchNorm1d(6, window=2, compensation="exact", affine=False).double().bind(linear)
    projected = CrossIterationBatchNorm1d(6, window=2, affine=False).double().bind(linear)
    old, new = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    for layer in (norm, projected):
        layer(arrange(linear(old)))
    with torch.no_grad():
        linear.weight *= torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    tokens = linear(torch.cat([old, new])).flatten(0, 1)
    expected = (arrange(linear(new)).movedim(1, -1) - tokens.mean(0)) / torch.sqrt(tokens.var(0, correction=0) + 1e-5)
    for layer in (norm, projected):
        torch.testing.assert_close(layer(arrange(linear(new))).movedim(1, -1), expected)


def test_subclasses_are_no_producers() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert not is_producer(Doubled(3, 4, 3))
    assert not is_producer(nn.ReLU())
    parametrized = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert is_producer(parametrized)


def test_one_conv_may_feed_several_norms() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    first, second = (CrossIterationBatchNorm2d(4, window=3).double().bind(conv) for _ in range(2))
    alone = CrossIterationBatchNorm2d(4, window=3).double()
    twin = nn.Conv2d(3, 4, 3, bias=False).double()
    twin.load_state_dict(conv.state_dict())
    alone.bind(twin)
    for _ in range(4):
        y = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        x = conv(y)
        expected = alone(twin(y))
        torch.testing.assert_close(first(x), expected)
        torch.testing.assert_close(second(x), expected)
        with torch.no_grad():
            twin.weight += 0.05 * torch.randn_like(twin.weight)
            conv.weight.copy_(twin.weight)
