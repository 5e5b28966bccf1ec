"""Training folded into the conv: one function with the unfolded form and with the formulas, and less kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import DOUBLE, conv_pair, gradients, inputs, shake
from helpers.models import randomize_norms
from helpers.reference import ReferenceCBN
from helpers.versions import tells_of_hooks
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.bench.steps import kept_bytes
from cbn_convert.norm import Window, carried
from cbn_convert.norm import folded as folding
from cbn_convert.norm.folded import FoldingMixin
from cbn_convert.norm.kernels import Kernels, forced
from cbn_convert.norm.producers import Convolution, LinearMap, as_function

# a producer of 6 channels, its input, and the norm behind it
CONFIGURATIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], nn.Module]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, bias=False), (3, 4, 9), lambda: nn.BatchNorm1d(6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "biased": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1), (2, 2, 4, 5, 4), lambda: nn.BatchNorm3d(6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False), (3, 4, 7, 7), lambda: nn.BatchNorm2d(6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (3, 6, 9, 8), lambda: nn.BatchNorm2d(6)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "same": (lambda: nn.Conv2d(4, 6, 2, padding="same"), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "timm same": (lambda: Conv2dSame(4, 6, 3, stride=2, bias=False), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6)),
    "circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (3, 4, 5, 4), lambda: nn.BatchNorm2d(6),
    ),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (3, 4, 5, 4), lambda: nn.BatchNorm2d(6),
    ),
    "linear": (lambda: nn.Linear(5, 6), (7, 5), lambda: nn.BatchNorm1d(6)),
    "without affine": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: nn.BatchNorm2d(6, affine=False)),
    "relu": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: BatchNormAct2d(6)),
    "relu6": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: BatchNormAct2d(6, act_layer=nn.ReLU6)),
    "silu": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: BatchNormAct2d(6, act_layer=nn.SiLU)),
    "hardswish": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: BatchNormAct2d(6, act_layer=nn.Hardswish)),
    "gelu": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 9, 8), lambda: BatchNormAct2d(6, act_layer=nn.GELU)),
}  # fmt: skip


def pair(kind: str, gradient: str = "full", every: int = 3) -> tuple[nn.Sequential, nn.Sequential, tuple[int, ...]]:
    """The same layers twice, that of which the first trains folded."""
    make, shape, norm = CONFIGURATIONS[kind]
    torch.manual_seed(1)
    folded = randomize_norms(nn.Sequential(make(), norm())).double()
    unfolded = copy.deepcopy(folded)
    for model in (folded, unfolded):
        cbn.convert(model, window=Window(every=every, gradient=gradient, size=40), example_input=inputs(shape, 0))
        assert isinstance(model[0], FoldingMixin)
    unfolded[1].bind(unfolded[0])
    assert not isinstance(unfolded[0], FoldingMixin)
    return folded.train(), unfolded.train(), shape


@pytest.mark.parametrize("gradient", ["full", "current"])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_folded_and_unfolded_are_one_function(kind: str, gradient: str) -> None:
    folded, unfolded, shape = pair(kind, gradient)
    for step in range(7):
        x = inputs(shape, step)
        for a, b in zip(gradients(folded, x), gradients(unfolded, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for a, b in zip(folded[1].buffers(), unfolded[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        shake(folded, unfolded)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernels", ["plain", "chosen"])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_scaling_the_output_is_the_same_function(
    kind: str, kernels: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the output is smaller than the weight, it is scaled: without a look, with one, and with nothing to learn
    before it.
    """
    monkeypatch.setattr(folding, "FEW_WEIGHTS", 0)
    monkeypatch.setattr(carried, "FIRST_LOOKS", 1)
    calls: list[int] = []
    for cls in (LinearMap, Convolution):
        monkeypatch.setattr(cls, "positions", lambda self, y: 0)
        own = cls.input_gradient
        monkeypatch.setattr(cls, "input_gradient", lambda *a, own=own, **k: (calls.append(1), own(*a, **k))[1])
    folded, unfolded, shape = pair(kind)
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("a layout of images")
    folded.to(memory_format=layout)
    with forced(kernels) if kernels == "plain" else nullcontext():
        for step in range(7):
            x = inputs(shape, step)
            for a, b in zip(gradients(folded, x), gradients(unfolded, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
            shake(folded, unfolded)
        folded(x).sum().backward()  # nothing to learn before it
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("weight", "bias", "dtype"),
    [(1e6, 0.0, torch.float16), (1.0, 30.0, torch.bfloat16), (1.0, 3e4, torch.float32)],
    ids=["range of float16", "bias in bfloat16", "bias in float32"],
)
def test_a_small_output_costs_no_range_and_no_digits(
    weight: float, bias: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ·p leaves the range of float16 where sθ·p does not; a large bias has to cancel before anything is rounded."""
    monkeypatch.setattr(folding, "FEW_WEIGHTS", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 16), nn.BatchNorm1d(16)).train()
    with torch.no_grad():
        model[0].weight *= weight
        model[0].bias += bias
        seen = model[0](torch.randn(512, 256))
    model[1].running_mean.copy_(seen.mean(0))
    model[1].running_var.copy_(seen.var(0))
    x = torch.randn(8, 256)
    exact = copy.deepcopy(model).double().eval()(x.double())
    cbn.convert(model, window=Window.TUNE, example_input=x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        made = model(x)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_positions_are_nearly_those_of_the_output(kind: str) -> None:
    make, shape, _ = CONFIGURATIONS[kind]
    module, x = make(), torch.zeros(*shape[:2], *[4 * size for size in shape[2:]])  # of which borders are a small part
    apply, padded = as_function(module, x)
    y = module(x)
    assert apply.positions(padded) == pytest.approx(y.numel() / 6, rel=0.25)
    assert apply.by_channel(y).shape[1] == 6


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("kind", ["conv2d", "biased", "conv3d", "pointwise", "grouped", "depthwise", "same"])
def test_layouts_of_weights_are_one_function(kind: str) -> None:
    """Steps that look and others, a change of layout in between, and statistics that somebody else writes."""
    folded, unfolded, shape = pair(kind)
    formats = [torch.channels_last if len(shape) == 4 else torch.channels_last_3d, torch.contiguous_format]
    for step in range(10):
        folded.to(memory_format=formats[step // 4 % 2])
        x = inputs(shape, step)
        for a, b in zip(gradients(folded, x), gradients(unfolded, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for a, b in zip(folded[1].buffers(), unfolded[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        shake(folded, unfolded)
        if step == 2:
            for model in (folded, unfolded):
                model[1].running_mean += 0.1


@pytest.mark.parametrize("of", ["weight", "input"])
def test_layouts_keep_the_compiled_gradient(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a weight's gradient in the layout of the input or of the weight, whichever is channels_last."""
    model = conv_pair()
    x = torch.randn(2, model[0].in_channels, 8, 8)
    model.float().to(memory_format=torch.channels_last if of == "weight" else torch.contiguous_format)
    monkeypatch.setattr(Kernels, "folded_gradient", None)  # the plain one, which a subclass falls back to
    model(x.to(memory_format=torch.channels_last if of == "input" else torch.contiguous_format)).sum().backward()
    assert model[0].weight.grad is not None


def test_sums_over_many_positions_stay_exact() -> None:
    """oneDNN adds up the gradient of a bias one by one in float32."""
    torch.manual_seed(0)
    model = conv_pair()
    x = torch.randn(32, model[0].in_channels, 64, 64, dtype=DOUBLE) + 2
    weight = torch.randn_like(model(x)) + 1
    exact = torch.autograd.grad((model(x) * weight).sum(), [*model.parameters()])
    model.float()
    found = torch.autograd.grad((model(x.float()) * weight.float()).sum(), [*model.parameters()])
    of_beta = [
        (g, e) for g, e, (name, _) in zip(found, exact, model.named_parameters(), strict=True) if name == "1.bias"
    ]
    for g, e in of_beta:
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=0)


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_folded_and_unfolded_are_one_function_of_what_learns(learns: str) -> None:
    """The bias alone, too, as where nothing but biases is trained: M follows it."""
    folded, unfolded, shape = pair("biased")
    for step in range(4):
        x, found = inputs(shape, step), []
        for model in (folded, unfolded):
            for name, p in model[0].named_parameters():
                p.requires_grad_(name == learns)
            found.append(torch.autograd.grad(model(x).pow(3).sin().sum(), getattr(model[0], learns))[0])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
        shake(folded, unfolded)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
@pytest.mark.parametrize("producer", [nn.Conv2d, Conv2dSame])
def test_a_chain_with_activations_that_are_made_again(act: type[nn.Module], producer: type[nn.Module]) -> None:
    """Against the same chain, unfolded and with activations of torch's own."""
    torch.manual_seed(0)
    chain = randomize_norms(
        nn.Sequential(
            producer(3, 8, 3, bias=False),
            BatchNormAct2d(8, act_layer=act),
            producer(8, 8, 3, stride=2),
            BatchNormAct2d(8, act_layer=act),
            producer(8, 6, 1),
            nn.BatchNorm2d(6),
        )
    ).double()
    plain = copy.deepcopy(chain)
    for model in (chain, plain):
        cbn.convert(model, example_input=inputs((2, 3, 12, 12), 0))
    for i in (0, 2, 4):
        plain[i + 1].bind(plain[i])
    for step in range(3):
        x = inputs((2, 3, 12, 12), step)
        for a, b in zip(gradients(chain.train(), x), gradients(plain.train(), x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        shake(chain, plain)


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize(
    "act", [None, nn.ReLU, nn.ReLU6, *[pytest.param(act, marks=tells_of_hooks) for act in (nn.SiLU, nn.Hardswish)]]
)
def test_nothing_of_the_size_of_the_output_is_kept_for_the_norm(act: type[nn.Module] | None, look: bool) -> None:
    """Between two convs one map is kept: the input of the activation or its output, not both, and nothing else."""
    norm = nn.BatchNorm2d(16) if act is None else BatchNormAct2d(16, act_layer=act)
    model = randomize_norms(
        nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4))
    )
    cbn.convert(model, window=Window(every=1 if look else 1000), example_input=torch.randn(1, 3, 40, 40))
    x = torch.randn(2, 3, 40, 40)
    model.train()(x)
    own = x.nbytes + 2 * 16 * 38 * 38 * 4
    assert own <= kept_bytes(model, x) < own + 20_000


def test_the_input_of_an_activation_that_somebody_writes_to_is_kept() -> None:
    """What a conv sees is what its gradient is taken at."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU)
            self.second, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            y.mul_(2)
            return self.last(self.second(y))

    torch.manual_seed(0)
    model = randomize_norms(Doubling()).double()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        cbn.convert(net, example_input=inputs((2, 3, 9, 9), 0))
    twin.norm.bind(twin.first)
    twin.last.bind(twin.second)
    x = inputs((2, 3, 9, 9), 1)
    for a, b in zip(gradients(model.train(), x), gradients(twin.train(), x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["biased", "depthwise", "transposed", "linear", "timm same"])
def test_radial_gradient_is_zero_up_to_eps(kind: str) -> None:
    """Rescaled weights change nothing, so that the gradient has no part along them; a bias has none at all."""
    make, shape, norm = CONFIGURATIONS[kind]
    torch.manual_seed(2)
    model = randomize_norms(nn.Sequential(make(), norm())).double()
    model[1].eps = 1e-30
    cbn.convert(model, window=Window(every=2), example_input=inputs(shape, 0))
    for step in range(4):
        model.zero_grad()
        model.train()(inputs(shape, step)).pow(3).sum().backward()
        weight = model[0].weight
        rows = (weight * weight.grad).transpose(0, 1) if kind == "transposed" else weight * weight.grad
        assert rows.flatten(1).sum(1).abs().max() < 1e-9 * weight.grad.norm() * weight.norm()
        if model[0].bias is not None:
            assert not model[0].bias.grad.any()
        shake(model)


def penalty(model: nn.Module, x: Tensor, through: str) -> list[Tensor]:
    """Gradients of a gradient penalty."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    loss = model(x).pow(3).sin().sum()
    if through == "grad":
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
    else:
        loss.backward(create_graph=True)
        g, x.grad = x.grad, None
        for p in model.parameters():
            p.grad = None
    g.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def oracle(model: nn.Sequential, x: Tensor) -> Tensor:
    """The step's formulas as they stand, of the statistics that the model holds now, in autograd's own operations."""
    for conv, norm in zip(model[::2], model[1::2], strict=True):
        (source,) = norm._sources
        state, theta = source.state.state, conv.weight.flatten(1)
        groups = len(state.patch_mean)
        mean = torch.einsum("gcf,gf->gc", theta.unflatten(0, (groups, -1)), state.patch_mean).flatten() + conv.bias
        axes = state.patch_axes
        covariance = torch.diag_embed(state.patch_rest) + axes.mT @ axes
        rows = theta.unflatten(0, (groups, -1))
        q = torch.einsum("gcf,gfe,gce->gc", rows, covariance, rows).flatten()
        M_then, S_then, anchor, spread, square = state.table
        growth = theta.norm(dim=1) / square.sqrt()
        M = M_then + mean - anchor + (growth - 1) * (M_then - anchor)
        S = S_then * q / spread
        x = conv._conv_forward(x, conv.weight, conv.bias)
        x = F.batch_norm(x, torch.zeros_like(M), torch.ones_like(S), None, None, False, 0.0, 0.0)
        shape = (1, -1, 1, 1)
        x = (x - M.view(shape)) / (S + norm.eps).sqrt().view(shape) * norm.weight.view(shape) + norm.bias.view(shape)
        act = getattr(norm, "act", None)
        x = x if act is None else getattr(F, type(act).__name__.lower())(x)
    return x


def two_layers(act: type[nn.Module] | None) -> nn.Sequential:
    torch.manual_seed(4)
    norm = nn.BatchNorm2d(4) if act is None else BatchNormAct2d(4, act_layer=act)
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)))
    cbn.convert(model.double(), window=Window(every=1000), example_input=inputs((2, 3, 8, 8), 0))
    model.train()(inputs((2, 3, 8, 8), 1))
    shake(model)
    return model


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("act", [None, nn.SiLU, nn.ReLU6])
def test_values_and_both_derivatives_are_those_of_the_formulas(act: type[nn.Module] | None, folded: bool) -> None:
    x = inputs((2, 3, 8, 8), 5)
    for measure in (gradients, lambda m, x: penalty(m, x, "grad"), lambda m, x: penalty(m, x, "backward")):
        model = two_layers(act)
        if not folded:
            for i in (0, 2):
                state = model[i + 1]._sources[0].state
                model[i + 1].bind(model[i])
                model[i + 1].begin_training()
                model[i + 1]._sources[0].state = state
                model[i + 1]._leave()
        formulas = copy.deepcopy(model)
        for ours, theirs in zip(model[1::2], formulas[1::2], strict=True):
            theirs._sources[0].state.state = ours._sources[0].state.state
        wrapped = nn.Module()
        wrapped.forward = lambda x, m=formulas: oracle(m, x)  # type: ignore[method-assign]
        wrapped.inner = formulas
        for a, b in zip(measure(model, x), measure(wrapped, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["full", "current"])
@pytest.mark.parametrize("window", [1, 3])
def test_second_derivatives_of_a_ring(window: int, gradient: str) -> None:
    """At window 1 they are BatchNorm's; in a ring, those of the same step written out by autograd."""
    torch.manual_seed(5)
    plain = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double().train()
    model = copy.deepcopy(plain)
    cbn.convert(model, window=window, gradient=gradient, example_input=inputs((2, 3, 8, 8), 0))
    if window == 1:
        for through in ("grad", "backward"):
            x = inputs((2, 3, 8, 8), 1)
            for a, b in zip(penalty(model, x, through), penalty(plain, x, through), strict=True):
                torch.testing.assert_close(a, b)
        return

    conv, norm = model[0], model[1]
    reference = ReferenceCBN(
        lambda y, w, b: F.conv2d(y, w, b), 4, window, compensation="projection", gradient=gradient, eps=norm.eps
    )
    for step in range(3):
        x = inputs((2, 3, 8, 8), step).requires_grad_()
        ours = model(x)
        theirs = reference(x, conv.weight, conv.bias, norm.weight, norm.bias)
        found = []
        for y in (ours, theirs):
            (g,) = torch.autograd.grad(y.pow(3).sin().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), [x, *model.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-7)
        shake(model)
