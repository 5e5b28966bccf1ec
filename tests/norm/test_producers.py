"""Every kind of layer that may feed the norm, against autograd on past inputs kept by the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d
from cbn_convert.norm.producers import applies_stored_weight, as_rows, is_producer, of_rows

WINDOW = 3


def weight_norm(conv: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(conv)


def spectral_norm(conv: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(conv)


class EfficientNetDepthwiseConv2d(nn.Conv2d):
    """As in Hugging Face's transformers: nothing but a constructor."""

    def __init__(self, in_channels: int, depth_multiplier: int = 1, kernel_size: int = 3, stride: int = 1) -> None:
        out_channels = in_channels * depth_multiplier
        super().__init__(in_channels, out_channels, kernel_size, stride, 1, groups=in_channels, bias=False)


class Named(nn.Conv2d):
    """With an attribute that means something in timm's classes only."""

    same_pad = True


class SetAfterwards(nn.Conv2d):
    """Numbers for all axes in the place of tuples, which torch's functions take as well."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, 2, 1, 2


class NamedLinear(nn.Linear):
    pass


class NamedSame(Conv2dSame):
    pass


class NamedStd(ScaledStdConv2dSame):
    pass


class NamedTransposed(nn.ConvTranspose2d):
    pass


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
    "sub-depthwise": (lambda: EfficientNetDepthwiseConv2d(3, 2, stride=2), (2, 3, 8, 7)),
    "sub-conv": (lambda: Named(4, 6, 3, stride=2), (2, 4, 8, 7)),
    "sub-numbers": (lambda: SetAfterwards(4, 6, 3), (2, 4, 8, 9)),
    "sub-linear": (lambda: NamedLinear(5, 6), (8, 5)),
    "sub-same": (lambda: NamedSame(4, 6, 3, stride=2), (2, 4, 8, 7)),
    "sub-std": (lambda: NamedStd(4, 6, 3, stride=2), (2, 4, 8, 7)),
    "sub-transposed": (lambda: NamedTransposed(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "sub-weight-norm": (lambda: weight_norm(Named(4, 6, 3)), (2, 4, 6, 6)),
    "timm-linear": (lambda: TimmLinear(5, 6), (8, 5)),
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
def test_the_past_of_a_ring_follows_the_effective_weight(kind: str) -> None:
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


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, x.dim())]
    return x.mean(axes), x.var(axes, correction=0)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("kind", PRODUCERS)
def test_the_carried_mean_follows_the_effective_weight(kind: str) -> None:
    """With statistics that are those of one batch, the window's mean at other weights is that batch's at these.

    Its gradient is that mean's too: oracle for a window whose variance does not move, which is where the gradient of
    the variance is orthogonal to what is asked for.
    """
    build, shape = PRODUCERS[kind]
    module = build().double()
    norm = NORMS[len(shape)](6, window=1000, history="ema", moments_every=1000, moments_positions=None)
    norm = randomize_norms(norm).double().bind(module)
    y = torch.randn(shape, dtype=torch.float64) + 0.5
    x = module(y)
    for own, value in zip((norm.running_mean, norm.running_var), moments(x.detach()), strict=True):
        own.copy_(value)
    norm(x)
    for _ in range(3):
        move(module)
        new = torch.randn(shape, dtype=torch.float64) - 1
        x = module(new)
        out = norm(x)
        # parametrisations with a state of their own answer here what the forward pass used
        module.eval()
        mean, _ = moments(module(y))
        module.train()
        torch.testing.assert_close(norm.running_mean, mean.detach())
        assert (norm.running_var > 0).all()
        view = [1, -1, *[1] * (x.dim() - 2)]
        gamma, beta, var = (t.detach().view(view) for t in (norm.weight, norm.bias, norm.running_var))
        expected = (x - mean.view(view)) / torch.sqrt(var + norm.eps) * gamma + beta
        torch.testing.assert_close(out, expected)
        # what sums to zero over (x - M) says nothing of the variance
        axes = [0, *range(2, x.dim())]
        deviation = (x - mean.view(view)).detach()
        direction = torch.randn_like(out)
        direction -= deviation * ((direction * deviation).sum(axes) / deviation.square().sum(axes)).view(view)
        parameters = list(module.parameters())
        got = torch.autograd.grad((out * direction).sum(), parameters, retain_graph=True)
        want = torch.autograd.grad((expected * direction).sum(), parameters)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


PLAIN_WEIGHT = [kind for kind in PRODUCERS if applies_stored_weight(PRODUCERS[kind][0]())]


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("kind", PLAIN_WEIGHT)
@torch.no_grad()
def test_rescaled_weights_are_carried_exactly(kind: str, folded: bool) -> None:
    build, shape = PRODUCERS[kind]
    module = build().double()
    norm = NORMS[len(shape)](6, window=1000, history="ema", moments_every=1000, moments_positions=None)
    norm = randomize_norms(norm).double().bind(module, folded=folded)
    y = torch.randn(shape, dtype=torch.float64) + 0.5
    norm.eval()
    for own, value in zip((norm.running_mean, norm.running_var), moments(module(y)), strict=True):
        own.copy_(value)
    norm.train()
    norm(module(y))
    rows = as_rows(module.weight, module) * torch.linspace(0.2, 3, 6, dtype=torch.float64)[:, None]
    module.weight.copy_(of_rows(rows, module))
    if module.bias is not None:
        module.bias += 1
    norm(module(torch.randn_like(y)))
    norm.eval()
    for own, value in zip((norm.running_mean, norm.running_var), moments(module(y)), strict=True):
        torch.testing.assert_close(own, value)


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
    norm = CrossIterationBatchNorm1d(6, window=2, affine=False).double().bind(linear)
    old, new = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    norm(arrange(linear(old)))
    with torch.no_grad():
        linear.weight *= torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    tokens = linear(torch.cat([old, new])).flatten(0, 1)
    expected = (arrange(linear(new)).movedim(1, -1) - tokens.mean(0)) / torch.sqrt(tokens.var(0, correction=0) + 1e-5)
    torch.testing.assert_close(norm(arrange(linear(new))).movedim(1, -1), expected)


def test_a_linear_of_pyg_does_what_torchs_does() -> None:
    """It has no base class in common with nn.Linear, and other names for its sizes and its argument."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    name = {"__module__": "torch_geometric.nn.dense.linear", "forward": forward}
    kind = type("Linear", (nn.Module,), name)
    models = []
    for is_pyg in (False, True):
        torch.manual_seed(0)
        linear = nn.Linear(5, 4)
        if is_pyg:
            twin = kind()
            twin.in_channels, twin.out_channels, twin.weight, twin.bias = 5, 4, linear.weight, linear.bias
            linear = twin
        models.append(randomize_norms(nn.Sequential(linear, nn.BatchNorm1d(4))).train())
    for model in models:
        (row,) = cbn.convert(model)
        assert row.status == "compensated"
    for _ in range(3):
        x = torch.randn(6, 5)
        expected, got = (model(x) for model in models)
        assert torch.equal(got, expected)
        for model, y in zip(models, (expected, got), strict=True):
            y.square().mul(torch.arange(4)).sum().backward()
            move_by_gradient(model)
    expected, got = (cbn.fold(model, "conv")(x) for model in models)
    assert torch.equal(got, expected)


@torch.no_grad()
def move_by_gradient(model: nn.Module) -> None:
    for p in model.parameters():
        p -= 0.01 * p.grad


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class DoubledAround(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class PlainAgain(StdConv2d):
    """Neither a StdConv2d, nor by its own function what its base class is."""

    forward = nn.Conv2d.forward


class NoisyWeight(nn.Linear):
    """Whoever reads the weight gets another one."""

    @property
    def weight(self) -> Tensor:
        if "weight" not in self._parameters:
            raise AttributeError
        return self._parameters["weight"] + torch.randn(())


def noisy_weight() -> NoisyWeight:
    """Its constructor initialises what it reads, which is never what it keeps."""
    module = NoisyWeight(3, 4)
    nn.init.normal_(module._parameters["weight"])
    return module


def of_its_own(module: nn.Module, name: str) -> nn.Module:
    function = getattr(module, name)
    setattr(module, name, lambda *args: 2 * function(*args))
    return module


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "forward": lambda: Doubled(3, 4, 1),
    "conv-forward": lambda: DoubledInside(3, 4, 1),
    "call": lambda: DoubledAround(3, 4),
    "base-of-base": lambda: PlainAgain(3, 4, 1),
    "weight": noisy_weight,
    "instance": lambda: of_its_own(nn.Conv2d(3, 4, 1), "forward"),
    "instance-inside": lambda: of_its_own(nn.Conv2d(3, 4, 1), "_conv_forward"),
    "parametrised": lambda: weight_norm(Doubled(3, 4, 1)),
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_what_computes_in_a_way_of_its_own_is_named_and_neither_compensated_nor_folded(kind: str) -> None:
    """A fold would be right for a factor of 2, but for nothing that adds or is no linear map."""
    producer = OTHERS[kind]()
    linear = isinstance(producer, nn.Linear)
    x = torch.randn(6, 3, *() if linear else (5, 5))
    model = randomize_norms(nn.Sequential(producer, nn.BatchNorm1d(4) if linear else nn.BatchNorm2d(4))).eval()
    assert not is_producer(producer)
    with pytest.raises(TypeError, match="cannot bind"):
        CrossIterationBatchNorm2d(4).bind(producer)
    torch.manual_seed(3)
    expected = model(x)
    folded = cbn.fold(model, "conv", example_input=x)
    torch.manual_seed(3)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-6)
    (row,) = cbn.convert(model, example_input=x)
    assert row.status == "window"
    of = "Doubled" if kind == "parametrised" else type(producer).__name__
    origin = "mul" if kind == "call" else f"{of}, whose forward is its own"
    assert row.reason.startswith(f"input comes from {origin}")


def test_layers_of_other_libraries_are_producers_by_what_they_compute() -> None:
    assert not is_producer(nn.ReLU())
    parametrized = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert is_producer(parametrized)
    assert is_producer(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4))
    lazy = nn.LazyConv2d(4, 3)
    lazy(torch.zeros(1, 3, 4, 4))
    assert is_producer(lazy)


def test_a_layer_that_hands_on_what_one_inside_of_it_made_is_looked_through() -> None:
    class Adapter(nn.Linear):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__(inner.in_features, inner.out_features)
            self.inner = inner

        def forward(self, input: Tensor) -> Tensor:
            return self.inner(input)

    model = nn.Sequential(Adapter(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    (row,) = cbn.convert(model, example_input=torch.zeros(2, 3))
    assert (row.status, row.fed_by) == ("compensated", "0.inner")


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 16, "history": "ema", "moments_every": 2}], ids=str)
def test_one_conv_may_feed_several_norms(options: dict) -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    first, second, alone = (randomize_norms(CrossIterationBatchNorm2d(4, **options)).double() for _ in range(3))
    for norm in (first, second):
        norm.load_state_dict(alone.state_dict())
        # one that trained folded cannot do so any more
        norm.bind(conv, folded=norm is first and norm.window.is_carried)
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
