"""export of features_only backbones: plain timm loads them, as features and as a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import randomize_norms
from safetensors.torch import load_file
from timm.models import FeatureListNet
from torch import nn

import cbn_convert as cbn
from cbn_convert.errors import ExportError

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv2_035": {"pad_type": "same"},
    "mobilenetv3_small_050": {"out_indices": (1, 2, 3)},
    "efficientnet_b0": {},
    "regnety_002": {"out_indices": (2, 3, 4)},
    "hrnet_w18_small": {},
    "densenet121": {"block_config": (1, 2, 1, 1)},  # flattened: features_conv0
    "resnetv2_50": {"norm_layer": "batchnorm2d", "layers": [1, 1, 1, 1]},  # flattened: stages_0
    "test_resnet": {"feature_cls": "getter"},
    "test_efficientnet": {"feature_cls": "hook"},
    "test_byobnet": {"feature_cls": "dict"},
}


def backbone(name: str, **kwargs: Any) -> nn.Module:
    """A converted backbone of random norms and of small example images."""
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name, features_only=True, **kwargs)).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    cbn.convert(model)
    return model


def features(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(X)
    return list(out.values()) if isinstance(out, dict) else list(out)


@pytest.mark.parametrize(("fold", "tolerance"), [("bn", 1e-6), ("conv", 1e-4)])
@pytest.mark.parametrize("name", BACKBONES)
def test_plain_timm_makes_the_same_features(name: str, fold: Any, tolerance: float, tmp_path: Path) -> None:
    kwargs = BACKBONES[name]
    model = backbone(name, **kwargs)
    # what chooses features may be among model_args, and is left out: the folder is for a whole model too
    out = cbn.export(model, tmp_path / "out", fold=fold, model_args={"features_only": True, **kwargs})
    choice = {k: v for k, v in kwargs.items() if k in ("out_indices", "feature_cls")}
    plain = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True, **choice).eval()
    expected, got = features(model), features(plain)
    assert len(got) == len(expected) > 1
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() / e.norm() < tolerance

    whole = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).state_dict()
    original = timm.create_model(name, num_classes=0, **{k: v for k, v in kwargs.items() if k not in choice})
    assert list(whole) == list(original.state_dict())


def test_the_keys_are_those_of_the_architecture(tmp_path: Path) -> None:
    model = backbone("densenet121", **BACKBONES["densenet121"])
    out = cbn.export(model, tmp_path / "out")
    whole = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).state_dict()
    assert set(whole) == {k.replace("features_", "features.", 1) for k in model.state_dict()}
    for key, value in model.state_dict().items():
        assert torch.equal(whole[key.replace("features_", "features.", 1)], value)
    # a classifier that the folder does not have is no silent surprise
    with pytest.raises(RuntimeError, match=r"Missing key.*classifier\.weight"):
        timm.create_model(f"local-dir:{out}", pretrained=True)


def test_fewer_stages_than_the_architecture_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cbn.export(backbone("resnet18", out_indices=(1, 2, 4)), tmp_path / "all")
    assert not caplog.records
    out = cbn.export(backbone("resnet18", out_indices=(1, 2), num_classes=0), tmp_path / "two")
    assert "the backbone has no layer3.0.conv1.weight" in caplog.text
    timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True, out_indices=(0, 1, 2))


def test_the_card_says_how_to_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("test_resnet", out_indices=(1, 3))
    cbn.export(model, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "# test_resnet, backbone without a head\n" in card
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert all(torch.equal(g, e) for g, e in zip(features(scope["model"]), features(model), strict=True))


def test_an_exported_backbone_is_exported_again(tmp_path: Path) -> None:
    first = cbn.export(backbone("test_resnet"), tmp_path / "first")
    model = timm.create_model(f"local-dir:{first}", pretrained=True, features_only=True)
    second = cbn.export(model, tmp_path / "second")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]
    tensors = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())


def test_refusals(tmp_path: Path) -> None:
    model = backbone("test_resnet")
    model["neck"] = nn.Conv2d(8, 8, 1)
    with pytest.raises(ExportError, match=r"neck\.weight of this FeatureListNet has no counterpart in ResNet"):
        cbn.export(model, tmp_path / "out")
    whole = timm.create_model("test_resnet", stem_width=24)
    model = FeatureListNet(whole, out_indices=(1, 2))
    model.pretrained_cfg = whole.pretrained_cfg
    with pytest.raises(ExportError, match=r"conv1\.0\.weight .*no counterpart"):  # for want of the argument
        cbn.export(model, tmp_path / "out")
    cbn.export(model, tmp_path / "out", model_args={"stem_width": 24})
    with pytest.raises(ExportError, match=r"timm cannot build 'test_resnet'.*nonsense"):
        cbn.export(model, tmp_path / "other", model_args={"nonsense": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_card_of_a_model_without_its_classifier(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    card = (cbn.export(model, tmp_path / "out") / "README.md").read_text()
    assert "\n- image-feature-extraction\n" in card
    assert "# test_resnet, backbone without a head\n" in card
