"""export: a folder that plain timm loads, complete or absent."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import randomize_norms
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from torch import nn

import cbn_convert as cbn
from cbn_convert import files
from cbn_convert.errors import ExportError, RunError

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
BACKBONES = {
    "resnet18": {},
    "mobilenetv2_035": {"pad_type": "same"},
    "efficientnet_b0": {},
    "regnety_002": {"drop_rate": 0.1},
}


@pytest.mark.parametrize("fold", ["bn", "affine", "conv"])
@pytest.mark.parametrize("name", BACKBONES)
def test_plain_timm_loads_it(name: str, fold: str, tmp_path: Path) -> None:
    kwargs = BACKBONES[name]
    model = randomize_norms(timm.create_model(name, num_classes=3, **kwargs)).eval()
    model = model.to(memory_format=torch.channels_last)
    cbn.convert(model, example_input=X)
    config = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    out = cbn.export(
        model, tmp_path / "out", fold=fold, class_names=["a", "b", "c"], model_args=kwargs, data_config=config
    )
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        expected, got = model(X), loaded(X)
    if fold == "bn":
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got - expected).norm() / expected.norm() < 1e-5
    cfg = timm.data.resolve_model_data_config(loaded)
    assert cfg["input_size"] == (3, 64, 64)
    assert tuple(cfg["mean"]) == (0.1, 0.2, 0.3)
    about = json.loads((out / "config.json").read_text())
    assert about["label_names"] == ["a", "b", "c"]
    metadata = safe_open(out / "model.safetensors", "pt").metadata()
    assert json.loads(metadata["cbn_convert"]) == {"version": cbn.__version__, "architecture": name, "fold": fold}


def test_files_have_the_modes_that_the_umask_grants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir()} == {0o640}


def test_never_half_written(tmp_path: Path, monkeypatch) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    cbn.export(model, tmp_path / "out")
    old = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(RunError, match="is not empty"):
        cbn.export(model, tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_fsync", full)
    with pytest.raises(RunError, match="No space left"):
        cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_deletes_nothing_of_others(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    out = cbn.export(model, tmp_path / "out")
    cbn.export(model, out, fold="conv", overwrite=True)
    (out / "thesis.txt").write_text("ten years")
    with pytest.raises(RunError, match=r"holds thesis\.txt, which overwriting would delete"):
        cbn.export(model, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "ten years"


def test_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "link")
    assert (tmp_path / "real/model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_model_built_for_one_size(tmp_path: Path) -> None:
    """levit_128s at 64 px, whose pretrained_cfg says 224."""
    model = randomize_norms(timm.create_model("levit_128s", num_classes=2, img_size=64)).eval()
    out = cbn.export(model, tmp_path / "out", fold="conv")
    with torch.no_grad():
        expected, got = model(X), timm.create_model(f"local-dir:{out}", pretrained=True).eval()(X)
    assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_the_same_as_timm_saves_for_the_hub(name: str, tmp_path: Path) -> None:
    model = randomize_norms(timm.create_model(name, num_classes=3, drop_rate=0.1)).eval()
    labels = ["a", "b", "c"]
    out = cbn.export(model, tmp_path / "out", fold="conv", class_names=labels)
    folded = cbn.fold(model, "conv", keep_bn=True)
    timm.models.save_for_hf(folded, tmp_path / "hub", {"label_names": labels}, safe_serialization=True)
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "hub/config.json").read_text())
    exported, saved = (
        timm.create_model(f"local-dir:{tmp_path}/{folder}", pretrained=True).eval() for folder in ("out", "hub")
    )
    assert exported.pretrained_cfg["label_names"] == saved.pretrained_cfg["label_names"] == labels
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(exported(X), saved(X))
        assert (saved(X) - expected).norm() / expected.norm() < 1e-5

    # push_to_hf_hub saves the loaded model once more
    timm.models.save_for_hf(exported, tmp_path / "again", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True).eval()
    assert again.pretrained_cfg["label_names"] == labels
    with torch.no_grad():
        assert torch.equal(again(X), exported(X))


def test_model_card(tmp_path: Path, monkeypatch) -> None:
    model = timm.create_model("test_resnet", num_classes=12)
    metadata = {"norm": "cbn", "window": 16, "top1": 200 / 3, "norm_layers": {"compensated": 9, "kept": 1}}
    labels = [f"class_{i}" for i in range(11)] + ["with\nnewline"]
    out = cbn.export(
        model, tmp_path / 'my "model"', fold="conv", class_names=labels, metadata=metadata,
        data_config={"input_size": (3, 64, 96), "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"},
    )  # fmt: skip
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {"tags": ["timm", "image-classification"], "library_name": "timm"}
    for line in (
        "# test_resnet, 12 classes",
        f"- **classes:** {', '.join(labels[:10])} and 2 more",
        "- **input:** 3 × 64 × 96, mean 0.1, 0.2, 0.3, std 0.5, 0.5, 0.5, bilinear interpolation",
        "- **norm:** cbn",
        "- **window:** 16",
        "- **validation top-1 [%]:** 66.6667",
        "- **norm layers:** 9 compensated, 1 kept",
        f"- **versions:** cbn_convert {cbn.__version__}, timm {timm.__version__}, torch {torch.__version__}",
    ):
        assert line in card.content.splitlines()
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {}
    exec(card.content.split("```python")[1].split("```")[0], shown)
    assert torch.equal(shown["model"](X), cbn.fold(model, "conv", keep_bn=True)(X))
    image = Image.new("RGB", (200, 200))
    assert shown["transform"](image).shape == (3, 64, 96)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Sequential is not an architecture that timm registers"):
        cbn.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tmp_path / "out")
    model = timm.create_model("test_resnet", num_classes=2)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(ExportError, match=r"fc.weight holds values that are not finite"):
        cbn.export(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_eps_that_depends_on_pretrained_is_kept(tmp_path: Path) -> None:
    """timm builds fbnetc_100 with eps 1e-5, and with pretrained=True with 1e-3."""
    model = randomize_norms(timm.create_model("fbnetc_100", num_classes=5)).eval()
    cbn.export(model, tmp_path / "out", fold="conv")
    plain = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    assert plain.bn1.eps == model.bn1.eps == 1e-5
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (plain(x) - model(x)).norm() / model(x).norm() < 1e-5
