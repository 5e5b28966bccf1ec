"""Weights that no training leaves behind are found when they are loaded, by name, in every command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from cbn_convert.cli.main import app
from helpers.models import randomize_norms
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import cbn_convert as cbn
from cbn_convert.errors import CbnError, ConversionError, ExportError, ModelError
from cbn_convert.models import ModelSpec, create_model

NAME = "layer1.0.bn1"
DAMAGES = {
    "running_var nan": ("running_var", math.nan),
    "running_var inf": ("running_var", math.inf),
    "running_var below zero": ("running_var", -0.1),
    "running_mean nan": ("running_mean", math.nan),
    "weight inf": ("weight", -math.inf),
}


def damaged(damage: str) -> tuple[nn.Module, str]:
    """A small network with one value that no training leaves, and the name of its tensor."""
    attribute, value = DAMAGES[damage]
    model = randomize_norms(timm.create_model("test_resnet", num_classes=2)).eval()
    with torch.no_grad():
        getattr(model.get_submodule(NAME), attribute)[1] = value
    return model, f"{NAME}.{attribute}"


@pytest.fixture(params=DAMAGES)
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with the damaged weights in all forms: w.safetensors, w.pth, and dir/ as timm has it."""
    torch.manual_seed(0)
    model, name = damaged(request.param)
    cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "dir", class_names=["a", "b"])
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    save_file(model.state_dict(), tmp_path / "dir/model.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    return tmp_path, name


def test_every_source(weights: tuple[Path, str]) -> None:
    folder, name = weights
    negative = bool((load_file(folder / "w.safetensors")[f"{NAME}.running_var"] < 0).any())
    by_timm = {"pretrained_cfg_overlay": {"file": str(folder / "w.safetensors"), "num_classes": 2}}
    for source, spec in (
        ("w.safetensors", ModelSpec(str(folder / "w.safetensors"), arch="test_resnet")),
        ("w.pth", ModelSpec("test_resnet", checkpoint=str(folder / "w.pth"))),
        ("dir/model.safetensors", ModelSpec(f"local-dir:{folder}/dir")),
        ("test_resnet", ModelSpec("test_resnet", model_kwargs=by_timm)),
    ):
        for classes in (None, 3):
            with pytest.raises(ModelError) as error:
                create_model(spec, classes)
            message = str(error.value)
            assert f"{source} is damaged: {name} holds 1 of " in message
            assert ("below zero" in message) == negative
            assert "\n" not in message


@pytest.mark.parametrize("weights", ["running_var below zero"], indirect=True)
def test_every_command(weights: tuple[Path, str], colors: Path) -> None:
    folder, name = weights
    out = folder / "out"
    quick = ["--img-size", 32, "--workers", 0, "--device", "cpu"]
    for command in (
        ["inspect", folder / "w.safetensors", "--arch", "test_resnet"],
        ["inspect", "test_resnet", "--checkpoint", folder / "w.pth"],
        ["convert", f"local-dir:{folder}/dir", "-o", out],
        ["finetune", colors, "-m", f"local-dir:{folder}/dir", "-o", out, *quick],
        ["finetune", colors, "-m", "test_resnet", "--checkpoint", folder / "w.pth", "-o", out, *quick, "--dry-run"],
        ["compare", colors, "-m", "test_resnet", "--checkpoint", folder / "w.pth", "-o", out, *quick],
        ["evaluate", folder / "dir", colors, "--device", "cpu", "--workers", 0],
        ["export", folder / "dir", "-o", out],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 1, command
        assert f"{name} holds 1 of 32 values below zero" in result.stderr, command
        assert str(folder) in result.stderr
        assert not out.exists()


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "running" in name])
def test_convert_and_warm_up_refuse_it_and_leave_the_model_as_it_was(damage: str) -> None:
    model, name = damaged(damage)
    with pytest.raises(ConversionError, match=f"^{name} holds 1 of "):
        cbn.convert(model)
    assert all(type(m).__module__.startswith(("torch", "timm")) for m in model.modules())
    good = timm.create_model("test_resnet", num_classes=2)
    cbn.convert(good)
    good.load_state_dict(model.state_dict())
    with pytest.raises(ConversionError, match=f"^{name} holds 1 of "):
        cbn.warm_up(good, [torch.randn(2, 3, 64, 64)])
    cbn.convert(damaged(damage)[0], exclude=NAME)


def test_models_without_values_and_buffers_that_nobody_wrote_convert() -> None:
    with torch.device("meta"):
        cbn.convert(timm.create_model("test_resnet"))
    model = timm.create_model("test_resnet")
    model.register_buffer("cache", torch.full((3,), math.nan))
    cbn.convert(model)


def test_export_refuses_a_variance_below_zero(tmp_path: Path) -> None:
    model, name = damaged("running_var below zero")
    with pytest.raises(ExportError, match=f"{name} holds 1 of 32 values below zero"):
        cbn.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_left_out_may_hold_anything(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    state["fc.weight"].fill_(math.nan)
    save_file(state, tmp_path / "w.safetensors")
    create_model(ModelSpec("test_resnet", checkpoint=str(tmp_path / "w.safetensors")), 3)
    with pytest.raises(ModelError, match=r"fc\.weight holds"):
        create_model(ModelSpec("test_resnet", checkpoint=str(tmp_path / "w.safetensors")), 7)


@pytest.mark.parametrize("part", ["weights", "statistics", "history"])
def test_a_damaged_state_is_not_resumed(part: str, colors: Path, tmp_path: Path) -> None:
    """Though its manifest vouches for it: a run of an older version may have written it."""
    from cbn_convert.training import checkpoint
    from cbn_convert.training.config import FinetuneConfig

    run = tmp_path / "run"
    cbn.finetune(
        FinetuneConfig(
            str(colors), "test_resnet", str(run), pretrained=False, img_size=32, max_steps=2, workers=0, device="cpu"
        ),
        quiet=True,
    )  # fmt: skip
    newest = checkpoint.checkpoints(run)[0]
    file = "training.pt" if part == "weights" else "rank-0.pt"
    stored = torch.load(newest / file, weights_only=True)
    if part == "weights":
        stored["model"]["layer1.0.conv1.weight"][0] = math.inf
    elif part == "statistics":
        stored["buffers"][f"{NAME}.running_var"][0] = -1
    else:
        next(iter(stored["history"].values()))["sources"][0]["slots"]["mean"][0] = math.nan
    torch.save(stored, newest / file)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][file] = {
        "bytes": (newest / file).stat().st_size, "sha256": checkpoint._sha256(newest / file),
    }  # fmt: skip
    (newest / "manifest.json").write_text(json.dumps(manifest))
    fault = {
        "weights": r"layer1\.0\.conv1\.weight holds", "statistics": f"{NAME}.running_var holds",
        "history": "history holds a mean that is not finite",
    }[part]  # fmt: skip
    with pytest.raises(CbnError, match=fault):
        cbn.resume(run, quiet=True)
