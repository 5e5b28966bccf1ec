"""fold: same outputs, nothing of the original changed, refusals."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle

import pytest
import timm
import torch
from helpers.models import randomize_norms
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torchvision.ops.misc import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.errors import FoldError
from cbn_convert.norm import CrossIterationMixin

BACKBONES = {
    "resnet18": {},
    "mobilenetv2_035": {"pad_type": "same"},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "regnety_002": {},
    "densenet121": {},
    "repvgg_a0": {},
}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep_bn", [False, True])
@pytest.mark.parametrize("into", ["bn", "affine", "conv"])
@pytest.mark.parametrize("name", BACKBONES)
def test_folded_outputs(name: str, into: str, keep_bn: bool) -> None:
    model = randomize_norms(timm.create_model(name, num_classes=5, **BACKBONES[name])).eval()
    cbn.convert(model, example_input=X)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(X)
        folded = cbn.fold(model, into, keep_bn=keep_bn, example_input=X)
        got = folded(X)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(X), expected)
    assert not folded.training
    if into == "bn":
        assert torch.equal(got, expected)
    else:
        assert (got - expected).norm() / expected.norm() < 1e-5
        assert not torch.equal(got, expected)
        changed = [k for k, v in folded.state_dict().items() if k not in before or not torch.equal(v, before[k])]
        assert changed
    left = [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    if into == "bn" or keep_bn:
        assert list(folded.state_dict()) == list(before)
    elif into == "affine" or name not in ("densenet121", "repvgg_a0"):
        assert not left


@pytest.mark.parametrize("keep_bn", [False, True])
def test_conv_fold_in_float64_is_exact_to_rounding(keep_bn: bool) -> None:
    model = randomize_norms(timm.create_model("efficientnet_b0", num_classes=5)).double().eval()
    x = X.double()
    with torch.no_grad():
        expected = model(x)
        got = cbn.fold(model, "conv", keep_bn=keep_bn, example_input=x)(x)
    assert (got - expected).norm() / expected.norm() < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("keep_bn", [True, False])
@pytest.mark.parametrize("into", ["conv", "affine"])
def test_bias_and_affine_combinations(into: str, bias: bool, affine: bool, keep_bn: bool) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4, affine=affine))
    linear = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4, affine=affine))
    for model, x in ((conv, torch.randn(2, 3, 8, 8)), (linear, torch.randn(6, 5))):
        model = randomize_norms(model).eval()
        folded = cbn.fold(model, into, keep_bn=keep_bn, example_input=x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert isinstance(folded[1], _BatchNorm) == keep_bn


def test_identity_batchnorm_is_as_documented() -> None:
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    norm = cbn.fold(model, "conv", keep_bn=True, example_input=torch.randn(1, 3, 8, 8))[1]
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.full((4,), 1 - norm.eps))
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm.bias, torch.zeros(4))


class Shared(nn.Module):
    """The conv's output is read by the norm and by a second branch, or returned."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.returned = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), returned

    def forward(self, x):
        x = self.conv(x)
        return (self.bn(x), x) if self.returned else (self.bn(x) + x.relu(),)


@pytest.mark.parametrize("returned", [True, False])
def test_a_conv_with_other_readers_is_not_folded(returned: bool, caplog) -> None:
    model = randomize_norms(Shared(returned)).eval()
    x = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING):
        folded = cbn.fold(model, "conv", example_input=x)
    assert "1 of 1 norm layers stay BatchNorm" in caplog.text
    assert isinstance(folded.bn, nn.BatchNorm2d)
    for got, want in zip(folded(x), model(x), strict=True):
        assert torch.equal(got, want)


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.b.weight = self.a.weight
        self.bn_a, self.bn_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn_b(self.b(self.bn_a(self.a(x))))


class Hidden(nn.Module):
    """Uses the conv's weight where no module call shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


def test_weights_with_another_use_are_not_folded_wrongly() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomize_norms(SharedWeight()).eval()
    torch.testing.assert_close(cbn.fold(model, "conv", example_input=x)(x), model(x))
    with pytest.raises(FoldError, match="outputs differ"):
        cbn.fold(randomize_norms(Hidden()).eval(), "conv", example_input=x)


class Domains(nn.Module):
    """Which norms, or which convs, run depends on an argument, and an auxiliary branch on the mode."""

    def __init__(self, other: nn.Module, convs: int = 1, auxiliary: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, bias=False) for _ in range(convs))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), other])
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
        self.auxiliary = auxiliary

    def forward(self, x: torch.Tensor, domain: int = 0, norm: int | None = None) -> torch.Tensor:
        y = self.convs[domain % len(self.convs)](x)
        if self.auxiliary and self.training:
            self.norms[1](self.head[0](y))
        return self.head(self.norms[domain if norm is None else norm](y))


OTHER_NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "frozen": lambda: FrozenBatchNorm2d(4),
    "layer": lambda: nn.LayerNorm([4, 62, 62]),
}


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("keep_bn", [False, True])
@pytest.mark.parametrize("kind", OTHER_NORMS)
@torch.no_grad()
def test_a_conv_that_another_domains_norm_may_read_is_not_folded(kind: str, keep_bn: bool, caplog) -> None:
    model = randomize_norms(Domains(OTHER_NORMS[kind]())).eval()
    folded = cbn.fold(model, "conv", keep_bn=keep_bn, example_input=X)
    for domain in (0, 1):
        torch.testing.assert_close(folded(X, domain), model(X, domain), rtol=1e-4, atol=1e-5)
    assert "the example does not reach norms.1, which may read the same convs: norms.0" in caplog.text
    # channels of which there is no other norm
    changed = folded.head[0].weight
    assert not torch.equal(changed, model.head[0].weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv2d, Doubled])
def test_a_norm_that_another_conv_may_feed_is_not_folded_away(kind: type[nn.Conv2d], caplog) -> None:
    model = Domains(nn.Identity(), convs=2)
    model.convs[1] = kind(3, 4, 3)
    randomize_norms(model).eval()
    folded = cbn.fold(model, "conv", example_input=X)
    for domain in (0, 1):
        torch.testing.assert_close(folded(X, domain, 0), model(X, domain, 0), rtol=1e-4, atol=1e-5)
    assert "the example does not reach convs.1, which may feed them: norms.0" in caplog.text


def test_a_norm_that_only_training_reaches_stands_in_the_way_of_its_own_conv_alone(caplog) -> None:
    model = randomize_norms(Domains(nn.BatchNorm2d(5), auxiliary=True)).eval()
    folded = cbn.fold(model, "conv", example_input=X)
    assert isinstance(folded.norms[0], nn.Identity)
    assert isinstance(folded.head[1], nn.BatchNorm2d)
    assert "the example does not reach norms.1, which may read the same convs: head.1" in caplog.text
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@torch.no_grad()
def test_scripted_parts_stay_as_they_are() -> None:
    scripted = torch.jit.script(randomize_norms(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), scripted)).eval()
    folded = cbn.fold(model, "conv", example_input=X)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_branches_of_timm_with_parts_of_others_are_refused_in_a_sentence() -> None:
    class Domain(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norms = nn.ModuleList([norm, copy.deepcopy(norm)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norms[0](x)

    model = randomize_norms(timm.create_model("repvgg_a0", num_classes=5)).eval()
    block = next(m for m in model.modules() if getattr(m, "identity", None) is not None)
    block.identity = Domain(block.identity)
    with pytest.raises(FoldError, match=r"cannot merge the branches of ByobNet.*keep_bn=True"):
        cbn.fold(model, "conv", example_input=X)
    folded = cbn.fold(model, "conv", keep_bn=True, example_input=X)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-3, atol=1e-4)


def test_act_and_drop_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout))
    model = randomize_norms(model).eval()
    x = torch.randn(2, 3, 8, 8)
    for into in ("conv", "affine"):
        folded = cbn.fold(model, into, example_input=x)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert {"SiLU", "Dropout"} <= {type(m).__name__ for m in folded.modules()}


def test_refuses_damaged_statistics_and_unknown_targets() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(FoldError, match="bn, affine, conv"):
        cbn.fold(model, "linear", example_input=x)
    model[1].running_var[2] = float("nan")
    for into in ("conv", "affine"):
        with pytest.raises(FoldError, match="'1'"):
            cbn.fold(model, into, example_input=x)


def test_transposed_convs_fold_and_weights_that_are_not_applied_as_stored_stay() -> None:
    from timm.layers import StdConv2d
    from torch.nn.utils.parametrizations import weight_norm

    x = torch.randn(2, 4, 6, 6)
    for producer, folds in (
        (nn.ConvTranspose2d(4, 6, 3, stride=2), True),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), False),
        (StdConv2d(4, 6, 3), False),
        (weight_norm(nn.Conv2d(4, 6, 3)), False),
    ):
        model = randomize_norms(nn.Sequential(producer, nn.BatchNorm2d(6))).eval()
        folded = cbn.fold(model, "conv", example_input=x)
        assert isinstance(folded[1], nn.Identity) == folds
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_linear_on_tokens_folds_as_in_levit() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 6, bias=False)
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    model = randomize_norms(Tokens()).eval()
    x = torch.randn(2, 7, 5)
    folded = cbn.fold(model, "conv", example_input=x)
    assert isinstance(folded.bn, nn.Identity)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class Joined(nn.Module):
    """A norm behind concatenated convs, as in MixNet; one of them may have another reader."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1, bias=False)
        self.bn, self.shared = nn.BatchNorm2d(6), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        y = self.bn(torch.cat([a, b], 1))
        return y + a.mean() if self.shared else y


@pytest.mark.parametrize("keep_bn", [False, True])
def test_concatenated_convs_fold_slice_by_slice(keep_bn: bool) -> None:
    model, x = randomize_norms(Joined()).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = cbn.fold(model, "conv", keep_bn=keep_bn, example_input=x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert isinstance(folded.bn, nn.BatchNorm2d) == keep_bn
    if keep_bn:
        assert torch.equal(folded.bn.weight, torch.ones(6, dtype=torch.float64))
        assert torch.equal(folded.bn.bias[:4], torch.zeros(4, dtype=torch.float64))
    shared = randomize_norms(Joined(shared=True)).eval()
    assert isinstance(cbn.fold(shared, "conv", example_input=x.float()).bn, nn.BatchNorm2d)


def test_a_part_of_a_conv_is_not_folded_into() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, v = self.conv(x).chunk(2, 1)
            return self.bn(q) * v

    model, x = randomize_norms(Cut()).eval(), torch.randn(2, 3, 8, 8)
    folded = cbn.fold(model, "conv", example_input=x)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "levit_128s", "ghostnetv3_050"])
@torch.no_grad()
def test_timm_merges_branches_before_and_after(name: str) -> None:
    """Before a fold, after one with identities, and, where nothing is left to do, after a bare one."""
    kwargs = {"img_size": 64} if "levit" in name else {}
    model = randomize_norms(timm.create_model(name, num_classes=5, **kwargs)).eval()
    cbn.convert(model)
    expected = model(X)
    bare = cbn.fold(model, "conv")
    merged = [reparameterize_model(m) for m in (model, cbn.fold(model, "conv", keep_bn=True), bare)]
    for deployed in (bare, *merged):
        assert (deployed(X) - expected).norm() / expected.norm() < 1e-5
        assert not any(isinstance(m, CrossIterationMixin) for m in deployed.modules())
    assert torch.equal(pickle.loads(pickle.dumps(bare))(X), bare(X))


def test_what_a_model_caches_with_a_gradient_is_copied() -> None:
    model = randomize_norms(timm.create_model("levit_128s", num_classes=5, img_size=64)).eval()
    expected = model(X)  # caches attention biases, which are no leaves
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert (cbn.fold(model, "conv")(X) - expected).norm() / expected.norm() < 1e-5


@dataclasses.dataclass
class Output:
    features: torch.Tensor
    logits: torch.Tensor


class Result(dict):
    pass


@pytest.mark.parametrize("form", [Output, lambda f, z: Result(features=f, logits=z), lambda f, z: {"a": [f, (z,)]}])
def test_readers_are_found_in_whatever_a_model_returns(form) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor):
            y = self.conv(x)
            return form(y, self.bn(y))

    assert isinstance(cbn.fold(randomize_norms(Returns()).eval(), "conv", example_input=X).bn, nn.BatchNorm2d)


def test_classes_are_compared_too() -> None:
    class Classes(nn.Module):
        def __init__(self, hidden: bool) -> None:
            super().__init__()
            self.conv, self.bn, self.hidden = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), hidden

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn(self.conv(x))
            return (y * nn.functional.conv2d(x, self.conv.weight) if self.hidden else y).argmax(1)

    model = randomize_norms(Classes(False)).eval()
    assert torch.equal(cbn.fold(model, "conv", example_input=X)(X), model(X))
    with pytest.raises(FoldError, match="outputs differ"):
        cbn.fold(randomize_norms(Classes(True)).eval(), "conv", example_input=X)


class Plain(nn.Module):
    def __init__(self, then=lambda y: y, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.bn, self.then = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.bn(self.conv(x)))


def test_what_is_no_fault_of_the_fold_is_no_error() -> None:
    cases = [
        Plain(lambda y: y + torch.randn(())),
        Plain(lambda y: y[y > 100]),
        Plain(lambda y: torch.where(y > 10, y, -torch.inf)),
        nn.Sequential(nn.ReLU(inplace=True), Plain()),
        Plain(),
    ]
    prune.l1_unstructured(cases[-1].conv, "bias", 0.5)
    for model in cases:
        assert cbn.fold(randomize_norms(model).eval(), "conv", example_input=X) is not model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded = cbn.fold(randomize_norms(Plain()).eval(), "conv", example_input=X)
    assert isinstance(folded.bn, nn.Identity)
    chaotic = Plain(lambda y: torch.sin(1e6 * y))  # answers a change of the last bit with another output
    assert isinstance(cbn.fold(randomize_norms(chaotic).eval(), "conv", example_input=X).bn, nn.Identity)


def test_outputs_of_another_size_are_named() -> None:
    near_zero = Plain(lambda y: y[torch.sin(1e6 * y) > 0])
    with pytest.raises(FoldError, match="another size"):
        cbn.fold(randomize_norms(near_zero).eval(), "conv", example_input=X)


def test_methods_named_like_timms_are_not_called() -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fuse = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def reparameterize(self, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return mean * scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.reparameterize(self.fuse(self.bn(self.conv(x))), torch.ones(()))

    for model in (Vae(), nn.Sequential(Vae())):
        model = randomize_norms(model).eval()
        torch.testing.assert_close(cbn.fold(model, "conv", example_input=X)(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("into", ["conv", "affine"])
def test_a_norm_with_a_weight_and_no_bias(into: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    model = randomize_norms(model).eval()
    model[1].register_parameter("bias", None)
    folded = cbn.fold(model, into, keep_bn=True, example_input=X)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(FoldError, match="meta device"):
        cbn.fold(model, "conv", example_input=X.to("meta"))
