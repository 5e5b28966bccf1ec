"""Utilities of torch, timm and others that would undo a conversion: one warning or one error, and what to do first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.ao.quantization as ao
from helpers.models import randomize_norms
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.errors import ConversionError
from cbn_convert.norm.folded import FoldingMixin

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
INSTEAD = r"cbn\.fold\(model\).*cbn\.revert\(model\)"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))


def plain() -> Net:
    torch.manual_seed(0)
    return randomize_norms(Net())


def converted() -> Net:
    model = plain()
    assert cbn.convert(model, example_input=X).folded == 2
    return model.train()


def swapped_for_frozen(model: nn.Module) -> nn.Module:
    for name in ("bn1", "bn2"):
        frozen = FrozenBatchNorm2d(getattr(model, name).num_features)
        frozen.load_state_dict(getattr(model, name).state_dict())
        setattr(model, name, frozen)
    return model


REPLACING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,  # which Lightning calls, too
    "timm's convert_sync_batchnorm": timm.layers.convert_sync_batchnorm,
    "timm's freeze_batch_norm_2d": timm.layers.freeze_batch_norm_2d,
    "a loop over the norms": swapped_for_frozen,
}


@pytest.mark.parametrize("utility", REPLACING)
def test_norms_that_are_replaced(utility: str) -> None:
    model, expected = REPLACING[utility](converted()), REPLACING[utility](plain()).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python does it
        y = model(X)
        model(X)
    (warning,) = caught
    assert "taken out of the model" in str(warning.message)
    assert "cbn.convert(model) once more" in str(warning.message)
    torch.testing.assert_close(y, expected(X), rtol=0, atol=0)
    assert type(model.conv1) is nn.Conv2d
    assert not model.conv1._forward_hooks


def test_a_second_conversion_finds_no_trace_of_the_first() -> None:
    model = swapped_for_frozen(converted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = cbn.convert(model, example_input=X)
        assert report.folded == 2
        model.train()(X)


def test_revert_takes_off_what_is_left_of_norms_that_are_gone() -> None:
    model = cbn.revert(swapped_for_frozen(converted()))
    assert not any(isinstance(m, FoldingMixin) or m._forward_hooks for m in model.modules())


def quantised(prepare: Callable[..., nn.Module], qconfig: Any) -> Callable[[nn.Module], nn.Module]:
    def prepared(model: nn.Module) -> nn.Module:
        model.qconfig = qconfig
        return prepare(model)

    return prepared


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "fuse_modules": (lambda m: ao.fuse_modules(m, [["conv1", "bn1", "act1"]]), False),
    "fuse_modules_qat": (lambda m: ao.fuse_modules_qat(m, [["conv2", "bn2"]]), True),
    "prepare": (quantised(ao.prepare, ao.get_default_qconfig("x86")), False),
    "prepare_qat": (quantised(ao.prepare_qat, ao.get_default_qat_qconfig("x86")), True),
    "prepare_fx": (lambda m: quantize_fx.prepare_fx(m, ao.get_default_qconfig_mapping("x86"), (X,)), False),
    "prepare_qat_fx": (lambda m: quantize_fx.prepare_qat_fx(m, ao.get_default_qat_qconfig_mapping("x86"), (X,)), True),
    "symbolic_trace": (torch.fx.symbolic_trace, False),
    "symbolic_trace, training": (torch.fx.symbolic_trace, True),
    "create_feature_extractor": (lambda m: create_feature_extractor(m, ["bn1"]), False),
    "jit.script": (torch.jit.script, False),
    "jit.trace, training": (lambda m: torch.jit.trace(m, X), True),
    "export, training": (lambda m: torch.export.export(m, (X,)), True),
}


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("utility", REFUSED)
def test_what_cannot_take_a_converted_model_says_what_can(utility: str) -> None:
    if utility == "export, training" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not tell of an export")
    apply, training = REFUSED[utility]
    model = converted().train(training)
    before = copy.deepcopy(model).eval()(X)
    with pytest.raises((RuntimeError, ConversionError), match=INSTEAD):
        apply(model)
    apply(cbn.revert(copy.deepcopy(model)).train(training))
    torch.testing.assert_close(model.eval()(X), before, rtol=0, atol=0)


def test_a_layer_without_a_qconfig_is_left_as_it_is() -> None:
    model = converted()
    model.bn1.qconfig = model.conv1.qconfig = None
    assert not hasattr(model.bn1, "qconfig")


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_graphs_of_evaluation_are_those_of_batchnorm() -> None:
    model = converted().eval()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


def test_what_fx_has_traced_converts() -> None:
    model = torch.fx.symbolic_trace(plain())
    assert cbn.convert(model, example_input=X).folded == 2
    model.train()(X)


class Adapted(nn.Module):
    """As peft wraps a conv: its output and that of two small ones, the second of zeros at first."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = conv
        self.down = type(conv)(conv.in_channels, 2, conv.kernel_size, bias=False)
        self.up = type(conv)(2, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_conv_that_is_wrapped_afterwards_is_named(frozen: bool) -> None:
    model = converted()
    model.conv2 = Adapted(model.conv2)
    if frozen:  # peft leaves nothing but the adapter to learn
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("up" in name or "down" in name)
    with pytest.raises(RuntimeError, match=r"layer 'bn2' is bound to a Conv2d whose output is changed .* cbn\.revert"):
        model(X)
    cbn.revert(model)
    assert not any(isinstance(m, FoldingMixin) for m in model.modules())
    cbn.convert(model, example_input=X)
    model.train()(X)


def test_a_conv_that_is_replaced_afterwards_is_named() -> None:
    model = converted()
    model.conv2 = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match=r"layer 'bn2' is bound to a Conv2d that has not run .* cbn\.revert"):
        model(X)
    cbn.revert(model)
    assert cbn.convert(model, example_input=X).folded == 2
    model.train()(X)


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_of_an_output_are_no_changes(frozen: bool) -> None:
    class Copying(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).clone(memory_format=torch.channels_last)

    model = converted()
    model.conv2 = Copying(model.conv2)
    model.conv2.requires_grad_(not frozen)
    for _ in range(4):
        model(X).sum().backward()


def test_parameters_that_an_optimizer_does_not_have_are_said() -> None:
    model = swapped_for_frozen(plain())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="weight and bias of 2 layers .* make it after cbn.convert"):
        cbn.convert(model, example_input=X)
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("kind", ["another model's", "none", "not frozen"])
def test_other_optimizers_are_no_concern(kind: str) -> None:
    model = plain() if kind == "not frozen" else swapped_for_frozen(plain())
    of = {"another model's": plain(), "none": None, "not frozen": model}[kind]
    optimizer = None if of is None else torch.optim.SGD(of.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cbn.convert(model, example_input=X)
    del optimizer
