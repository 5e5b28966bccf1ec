"""How far the images are from the pretraining, and what follows for the norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from helpers.models import randomize_norms
from torch import nn
from torch.distributions import Normal, kl_divergence

import cbn_convert as cbn
from cbn_convert.training.advice import FAR, advice, statistics_shift
from cbn_convert.training.config import FinetuneConfig


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    return randomize_norms(model)


@torch.no_grad()
@pytest.mark.parametrize("converted", [False, True])
def test_against_torchs_divergence(converted: bool) -> None:
    """Over all images together, with eps as part of both variances, and layers as they see each other in evaluation."""
    model, images = net(), torch.randn(12, 3, 8, 8) * 2 + 1
    expected = []
    x = images
    for module in model.eval():
        if isinstance(module, nn.BatchNorm2d):
            seen = Normal(x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + module.eps).sqrt())
            expected.append(kl_divergence(seen, Normal(module.running_mean, (module.running_var + module.eps).sqrt())))
        x = module(x)
    if converted:
        cbn.convert(model, example_input=images[:2])
    assert statistics_shift(model, images.split(5)) == pytest.approx(float(torch.cat(expected).median()), rel=1e-4)


def test_it_leaves_the_model_as_it_was() -> None:
    model = net().train()
    model[4].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    statistics_shift(model, [torch.randn(4, 3, 8, 8)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, True, False]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_constant_channel_has_a_divergence() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 100.3
    assert 0 < statistics_shift(model, [torch.randn(4, 3, 8, 8)]) < 100


def test_none_where_there_is_nothing_to_compare_with() -> None:
    images = [torch.randn(4, 3, 8, 8)]
    assert statistics_shift(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), images) is None
    assert statistics_shift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), images) is None
    assert statistics_shift(net(), []) is None


@pytest.mark.parametrize(
    ("norm", "batch_size", "shift", "says", "not_says"),
    [
        ("cbn", 2, FAR / 2, "near to those of the pretraining", "far"),
        ("cbn", 2, FAR * 2, "far from those of the pretraining", "near"),
        ("cbn", 1, FAR * 2, "at 1 image per step --norm cbn was best, or level", "near"),
        ("cbn", 8, FAR * 2, "far", "--norm"),
        ("frozen", 2, FAR * 2, "--norm cbn was better than frozen BN, or level", "near"),
        ("frozen", 2, FAR / 2, "--norm cbn was better than frozen BN", "far"),
        ("bn", 2, FAR / 2, "--norm cbn was better, and so was --norm frozen", "far"),
        ("bn", 1, FAR * 2, "at 1 image per step --norm cbn was better", "images per step"),
        ("brn", 4, FAR * 2, "at 4 images per step --norm cbn was better, or level,", "frozen"),
        ("bn", 32, FAR * 2, "far", "--norm"),
    ],
)
def test_what_it_says(norm: str, batch_size: int, shift: float, says: str, not_says: str) -> None:
    text = advice(config(norm, batch_size), shift)
    assert f"{shift:.2f} nats" in text
    assert says in text
    assert not_says not in text


def test_what_it_says_of_random_weights() -> None:
    text = advice(config("cbn", 2, pretrained=False), None)
    assert "at 2 images per step --norm gn was better from random weights, or level" in text
    for norm, batch_size in (("cbn", 8), ("frozen", 2), ("gn", 2)):  # not measured, or GroupNorm already
        assert advice(config(norm, batch_size, pretrained=False), None) == ""
    assert advice(config("cbn", 2), None) == ""  # statistics that could not be measured
    assert advice(config("cbn", 2, pretrained=False, checkpoint="weights.pth"), None) == ""


def config(norm: str, batch_size: int, **changes) -> FinetuneConfig:
    return FinetuneConfig("data", "resnet18", "run", norm=norm, batch_size=batch_size, **changes)


def run(data: Path, output: Path, capfd, **changes) -> tuple[cbn.FinetuneResult, str]:
    settings = {"img_size": 32, "max_steps": 2, "workers": 0, "device": "cpu", "no_aug": True, **changes}
    result = cbn.finetune(FinetuneConfig(data=str(data), output=str(output), **settings))
    return result, " ".join(capfd.readouterr().err.split())


def test_a_run_says_it_first_and_keeps_it(colors: Path, tmp_path: Path, capfd) -> None:
    weights = tmp_path / "weights"
    cbn.export(randomize_norms(timm.create_model("test_resnet", num_classes=10)), weights, fold="bn")
    result, told = run(colors, tmp_path / "run", capfd, model=f"local-dir:{weights}")
    assert result.statistics_shift > 0
    assert result.advice.startswith("the images are ")
    assert told.index(result.advice) < told.index("validation top-1")
    assert cbn.resume(tmp_path / "run", quiet=True).statistics_shift == result.statistics_shift


def test_a_run_with_random_weights_has_no_statistics(colors: Path, tmp_path: Path, capfd) -> None:
    result, told = run(colors, tmp_path / "run", capfd, model="test_resnet", pretrained=False)
    assert result.statistics_shift is None
    assert result.advice in told
    assert "--norm gn" in result.advice
    assert "nats" not in told
