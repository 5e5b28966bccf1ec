"""Training folded into the conv: one function with the unfolded form, less kept, only where nobody looks between."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from helpers.reference import ReferenceCBN
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cbn_convert as cbn
from cbn_convert.bench.steps import kept_bytes
from cbn_convert.norm import CrossIterationMixin, Window
from cbn_convert.norm.folded import FoldingMixin
from cbn_convert.norm.kernels import Kernels

DOUBLE = torch.float64
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


def inputs(shape: tuple[int, ...], seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = list(model.parameters())
    return [y.detach(), *torch.autograd.grad(y.pow(3).sin().sum(), [x, *parameters])]


def shake(*models: nn.Module) -> None:
    """The same random change of the weights of all."""
    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            change = 0.05 * torch.randn_like(same[0])
            for p in same:
                p += change


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
@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
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
    model[1].eps = 0.0
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


def conv_pair() -> nn.Sequential:
    torch.manual_seed(3)
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0))
    return model.train()


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_of_others_see_what_they_would_see(where: int, kind: str) -> None:
    """A hook on the conv finds the conv's output, not the norm's; and training goes on folded when it is gone."""
    watched, free = conv_pair(), conv_pair()
    seen: list[Tensor] = []

    def note(module: nn.Module, *tensors: object) -> None:
        seen.append(tensors[0][0])  # type: ignore[index]

    register = {
        "forward": nn.Module.register_forward_hook,
        "pre": nn.Module.register_forward_pre_hook,
        "backward": nn.Module.register_full_backward_hook,
    }[kind]
    handle = register(watched[where], note)  # type: ignore[operator]
    for step in range(3):
        x = inputs((2, 3, 8, 8), step)
        for a, b in zip(gradients(watched, x), gradients(free, x), strict=True):
            torch.testing.assert_close(a, b)
        if where == 1 and kind != "backward":
            torch.testing.assert_close(seen[-1], F.conv2d(x, *watched[0].parameters()))
        shake(watched, free)
    assert len(seen) == 3
    handle.remove()
    assert kept_bytes(watched, inputs((2, 3, 8, 8), 9)) == kept_bytes(free, inputs((2, 3, 8, 8), 9))


def test_an_output_that_goes_elsewhere_too_is_not_folded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.alone, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(self.alone(self.norm(y) + self.other(y)))

    model = randomize_norms(Branching())
    report = {row.name: row for row in cbn.convert(model, example_input=torch.randn(2, 3, 8, 8))}
    assert [report[n].form for n in ("norm", "other", "last")] == ["unfolded", "unfolded", "folded"]
    assert "not folded: its output goes elsewhere" in report["norm"].reason


def test_stored_weights_only() -> None:
    model = randomize_norms(nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    nn.utils.parametrizations.weight_norm(model[2])
    reasons = [row.reason for row in cbn.convert(model, example_input=torch.randn(2, 3, 8, 8))]
    assert all("not folded: its weight is not applied as it is stored" in reason for reason in reasons)


def test_a_conv_that_is_parametrised_later_trains_unfolded() -> None:
    model, twin = conv_pair(), conv_pair()
    for net in (model, twin):
        nn.utils.parametrizations.weight_norm(net[0])
    twin[1].bind(twin[0])
    for step in range(3):
        x = inputs((2, 3, 8, 8), step)
        for a, b in zip(gradients(model, x), gradients(twin, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("where", "name"), [(0, "weight"), (0, "bias"), (1, "weight"), (1, "bias")])
def test_parameters_that_are_plain_attributes_train_unfolded(where: int, name: str) -> None:
    """As where somebody keeps them in one flat parameter, of which they are views."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomize_norms(nn.BatchNorm2d(4)))
    cbn.convert(model, example_input=torch.randn(2, 3, 6, 6))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    flat = getattr(model[where], name).detach().flatten().clone().requires_grad_()
    shape = getattr(model[where], name).shape
    delattr(model[where], name)
    setattr(model[where], name, flat.view(shape))
    for m in (model, twin):
        m(x).square().sum().backward()
    torch.testing.assert_close(flat.grad, getattr(twin[where], name).grad.flatten(), rtol=1e-3, atol=1e-3)


def test_what_changes_the_output_on_its_way_is_an_error() -> None:
    model = conv_pair()
    net = nn.Sequential(model[0], nn.Identity(), model[1])
    net(inputs((2, 3, 8, 8), 0))
    net[1] = nn.Hardtanh()
    with pytest.raises(RuntimeError, match="bound to a Conv2d whose output is changed"):
        net(inputs((2, 3, 8, 8), 1))


def test_an_output_that_never_comes_to_the_norm_is_an_error() -> None:
    """Its values would be normalised ones, where those of the conv are expected."""
    model = conv_pair()
    for _ in range(3):
        model[0](inputs((2, 3, 8, 8), 0))
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):
        model[0](inputs((2, 3, 8, 8), 0))


def test_a_norm_that_somebody_keeps_elsewhere_does_nothing_in_evaluation() -> None:
    """It is not told of model.eval(), and goes on as in training."""
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    kept = model[1]
    model[1] = nn.Identity()
    x = inputs((2, 3, 8, 8), 1)
    torch.testing.assert_close(model.eval()(x), F.conv2d(x, *model[0].parameters()))
    model.train()
    for _ in range(3):
        model(x)
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):
        model(x)
    assert kept.training


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_norm_that_is_gone_is_noticed_in_the_first_step(
    duplicate: Callable[[nn.Module], nn.Module], folded: bool
) -> None:
    model = conv_pair()
    if not folded:
        model[1].bind(model[0])
    model(inputs((2, 3, 8, 8), 0))
    model[1] = nn.BatchNorm2d(4).double()
    model = duplicate(model)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    plain.load_state_dict(model.state_dict())
    x = inputs((2, 3, 8, 8), 1)
    model.eval()(x)  # as in a check before training begins
    with pytest.warns(UserWarning, match="a norm layer was taken out of the model after its conversion"):
        y = model.train()(x)
    torch.testing.assert_close(y, plain(x), rtol=0, atol=0)
    assert type(model[0]) is nn.Conv2d
    assert not model[0]._forward_hooks
    assert not model[0]._load_state_dict_post_hooks
    model(x)


def test_a_model_that_is_let_go_says_nothing() -> None:
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    gone, conv = weakref.ref(model[1]), model[0]
    del model
    assert gone() is None
    conv.eval()(inputs((2, 3, 8, 8), 0))


def test_the_input_may_be_named() -> None:
    model, twin = conv_pair(), conv_pair()
    x = inputs((2, 3, 8, 8), 0)
    torch.testing.assert_close(model[1](input=model[0](input=x)), twin(x))


def test_an_output_that_goes_to_another_norm_now_and_then_is_an_error() -> None:
    """As with norms of their own for two domains, of which the example showed one."""
    model = conv_pair()
    other = nn.BatchNorm2d(4).double()
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):  # noqa: PT012
        for step in range(8):
            x = inputs((2, 3, 8, 8), step)
            (model if step % 2 else nn.Sequential(model[0], other))(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_conv_that_is_computed_once_more_without_its_norm_is_no_loss(reentrant: bool) -> None:
    model = conv_pair()
    for step in range(6):
        y = checkpoint(model[0], inputs((2, 3, 8, 8), step).requires_grad_(), use_reentrant=reentrant)
        model[1](y).sum().backward()
        assert not model[1]._sources[0].tap.lost


def test_one_pass_that_broke_off_is_none() -> None:
    model, twin = conv_pair(), conv_pair()
    model[0](inputs((2, 3, 8, 8), 0))
    # all that is left of it is that its batch was looked at
    torch.testing.assert_close(model(inputs((2, 3, 8, 8), 1)), twin(inputs((2, 3, 8, 8), 1)), rtol=0, atol=1e-2)


def test_a_pass_that_broke_off_before_one_with_hooks_is_none() -> None:
    """Nothing is left of it that would let the conv's own output pass for a normalised one."""
    model = conv_pair()
    model[0](inputs((2, 3, 8, 8), 0))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = inputs((2, 3, 8, 8), 1)
    y = model(x)
    torch.testing.assert_close(seen[0], F.conv2d(x, *model[0].parameters()))
    state = model[1]._sources[0].state.last
    M, S, gamma, beta = (t.view(1, -1, 1, 1) for t in (state.mean, state.var, model[1].weight, model[1].bias))
    torch.testing.assert_close(y, gamma * (seen[0] - M) / torch.sqrt(S + model[1].eps) + beta)


def test_a_conv_whose_norm_was_replaced_is_itself_in_evaluation() -> None:
    """The norm that is gone heard of no eval()."""
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    model[1] = nn.Identity()
    x = inputs((2, 3, 8, 8), 1)
    torch.testing.assert_close(model.eval()(x), F.conv2d(x, *model[0].parameters()))


def test_a_conv_that_is_parametrised_later_is_pickled_as_torch_does() -> None:
    """By an error of torch's: what is made of the class alone would lack the weight."""
    model = conv_pair()
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(model)


def test_autocast_leaves_float64_alone() -> None:
    model = conv_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs((2, 3, 8, 8), 0)).dtype == torch.float64


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("wanted", ["parameters", "input"])
def test_transforms_of_functions_are_refused(wanted: str, folded: bool) -> None:
    model = conv_pair()
    if not folded:
        model[1].bind(model[0])
    parameters, x = {k: v.detach() for k, v in model.named_parameters()}, inputs((2, 3, 8, 8), 0)
    with pytest.raises(RuntimeError, match=r"cannot train under torch\.func's transforms"):
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).sum(), wanted == "input")(parameters, x)
    model.eval()
    torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).sum(), wanted == "input")(parameters, x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_fold_into_their_own_norm(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    twin = duplicate(model)
    assert twin[0].__dict__["folds_into"].norm is twin[1]
    before = copy.deepcopy(model.state_dict())
    twin(inputs((2, 3, 8, 8), 1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_revert_gives_the_conv_its_class_back() -> None:
    model = conv_pair()
    before = {id(p) for p in model.parameters()}
    model(inputs((2, 3, 8, 8), 0))
    cbn.revert(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert {id(p) for p in model.parameters()} == before
    assert not model[0]._forward_hooks
    assert not any(isinstance(m, CrossIterationMixin) for m in model.modules())


def test_an_inner_copy_of_data_parallel_is_refused() -> None:
    model = conv_pair()
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(inputs((2, 3, 8, 8), 0))
    norm = model[1]._replicate_for_data_parallel()
    norm._sources = model[1]._sources
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        norm(inputs((2, 4, 6, 6), 0))


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
        q = torch.einsum("gcf,gf->gc", theta.unflatten(0, (groups, -1)).square(), state.patch_var).flatten()
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
