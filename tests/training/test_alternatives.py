"""The alternatives to CBN: what they compute, and that they keep what the pretrained model knows."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.models import randomize_norms
from torch import nn

from cbn_convert.bench.steps import kept_bytes
from cbn_convert.conversion import convert
from cbn_convert.errors import ConversionError
from cbn_convert.norm import CrossIterationMixin, Window
from cbn_convert.norm.folded import FoldingMixin
from cbn_convert.training.alternatives import D_MAX, R_MAX, apply_norm
from cbn_convert.training.settings import NORMS

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "gn"])
def test_eval_output_and_keys_stay(norm: str, name: str) -> None:
    model = randomize_norms(timm.create_model(name, num_classes=3)).eval()
    with torch.no_grad():
        expected = model(X)
    keys = list(model.state_dict())
    apply_norm(model, norm, **({"window": 4, "example_input": X} if norm == "cbn" else {}))
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == keys
    assert any(isinstance(m, CrossIterationMixin) for m in model.modules()) == (norm in ("cbn", "tune"))


def test_frozen_uses_running_statistics_in_training_and_leaves_them() -> None:
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    expected = model(X)
    apply_norm(model, "frozen")
    before = model[1].running_mean.clone()
    out = model.train()(X)
    assert torch.equal(out, expected)
    assert torch.equal(model[1].running_mean, before)
    out.square().mean().backward()
    assert model[1].weight.grad is not None


def test_tune_leaves_norms_without_statistics_as_they_are_and_folds_new_ones() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    model = nn.Sequential(*layers)
    expected = model[:2](X)
    report = convert(model, window=Window.TUNE, example_input=X)
    assert [row.status for row in report] == ["kept", "compensated"]
    assert report.folded == 1
    assert torch.equal(model[:2](X), expected)
    assert isinstance(model[2], FoldingMixin)
    model(X).sum().backward()


@pytest.mark.parametrize("folded", [True, False])
def test_tune_leaves_the_graph_of_an_evaluation_as_it_is(folded: bool) -> None:
    """As frozen BN does: nothing is written to, not even by what is there already."""
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    convert(model, window=Window.TUNE, example_input=X)
    model[1].bind(model[0], folded=folded)
    y = model.eval()(X)
    model.train()(X)
    y.sum().backward()


@pytest.mark.parametrize(("name", "share"), [("resnet18", 0.8), ("mobilenetv2_035", 0.8), ("densenet121", 1.0)])
def test_tune_is_frozen_batch_norm_that_keeps_less(name: str, share: float) -> None:
    torch.manual_seed(0)
    frozen = randomize_norms(timm.create_model(name, num_classes=3)).double()
    norms = [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].reset_running_stats()  # statistics of a new layer stay as well
    tune = copy.deepcopy(frozen)
    apply_norm(frozen, "frozen")
    apply_norm(tune, "tune", example_input=X.double())
    statistics = {k: v.clone() for k, v in tune.state_dict().items() if k.endswith(("mean", "var"))}
    kept, found = [], []
    for model in (frozen, tune):
        optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
        outputs = []
        for _ in range(3):
            optimizer.zero_grad()
            out = model(X.double())
            out.square().mean().backward()
            optimizer.step()
            outputs.append(out.detach())
        kept.append(kept_bytes(model, X.double()))
        found.append([*outputs, *(p.grad for p in model.parameters())])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)
    assert kept[1] < share * kept[0]
    assert all(torch.equal(tune.state_dict()[k], v) for k, v in statistics.items())


@pytest.mark.parametrize("affine", [True, False])
def test_batch_renorm_is_algorithm_1(affine: bool) -> None:
    model = randomize_norms(nn.Sequential(nn.BatchNorm2d(3, affine=affine))).double()
    model[0].running_var.copy_(torch.tensor([1.0, 0.01, 100.0]))
    model[0].running_mean.copy_(torch.tensor([0.5, 9.0, 0.0]))
    running_mean, running_var = model[0].running_mean.clone(), model[0].running_var.clone()
    apply_norm(model, "brn")
    x = X.double().requires_grad_()
    out = model(x)

    shape = (1, 3, 1, 1)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    sigma, running_sigma = torch.sqrt(var + 1e-5), torch.sqrt(running_var + 1e-5)
    r = (sigma / running_sigma).clamp(1 / R_MAX, R_MAX).detach()
    d = ((mean - running_mean) / running_sigma).clamp(-D_MAX, D_MAX).detach()
    expected = (x - mean.view(shape)) / sigma.view(shape) * r.view(shape) + d.view(shape)
    if affine:
        expected = expected * model[0].weight.view(shape) + model[0].bias.view(shape)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * direction).sum(), x)
    (want,) = torch.autograd.grad((expected * direction).sum(), x)
    torch.testing.assert_close(got, want)
    n = x.numel() / 3
    torch.testing.assert_close(model[0].running_mean, 0.99 * running_mean + 0.01 * mean.detach())
    torch.testing.assert_close(model[0].running_var, 0.99 * running_var + 0.01 * var.detach() * n / (n - 1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_group_norm_keeps_affine_and_activation(name: str) -> None:
    model = randomize_norms(timm.create_model(name, num_classes=3))
    acts = sum(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in model.modules())
    weight = model.bn1.weight.detach().clone()
    apply_norm(model, "gn")
    groups = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.equal(groups[0].weight, weight)
    assert groups[0].num_channels % groups[0].num_groups == 0
    assert sum(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in model.modules()) == acts
    model(X).sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_without_batchnorm_is_refused(norm: str) -> None:
    with pytest.raises(ConversionError, match="no BatchNorm layer"):
        apply_norm(nn.Sequential(nn.Linear(2, 2)), norm)
