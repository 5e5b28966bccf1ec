"""What an export says of its images is what the model was trained with, whatever timm asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers.images import write_image
from timm.data import resolve_data_config, resolve_model_data_config
from timm.layers import apply_test_time_pool

import cbn_convert as cbn
from cbn_convert.errors import ModelError
from cbn_convert.models import ModelSpec, create_model
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.run_export import export_run

# timm trains resnet18 at 224 px with a crop of 0.95, and evaluates it at 288 with 1.0
TRAINED, EVALUATED = ((3, 224, 224), 0.95), ((3, 288, 288), 1.0)


def resolved(folder: Path, use_test_size: bool) -> dict[str, Any]:
    """By both of timm's functions, of the folder as plain timm loads it."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = resolve_model_data_config(model, use_test_size=use_test_size)
    assert resolve_data_config({}, model=model, use_test_size=use_test_size) == config
    assert not apply_test_time_pool(model, config, use_test_size)[1]
    return {**config, "input_size": tuple(config["input_size"])}


def size_and_crop(folder: Path, use_test_size: bool) -> tuple[tuple[int, ...], float]:
    config = resolved(folder, use_test_size)
    return config["input_size"], config["crop_pct"]


@pytest.mark.parametrize("size", [None, 64])
def test_of_a_run(size: int | None, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a", "val/b"):
        write_image(tmp_path / "images" / name / "0.png", (200, 60, 60), 0)
    run = tmp_path / "run"
    cbn.finetune(
        FinetuneConfig(
            data=str(tmp_path / "images"), model="resnet18", output=str(run), pretrained=False, img_size=size,
            max_steps=1, batch_size=1, mean=(0.1, 0.2, 0.3), workers=0, device="cpu",
        ),
        quiet=True,
    )  # fmt: skip
    trained = json.loads((run / "config.json").read_text())["data_config"]
    assert trained["input_size"] == [3, size or 224, size or 224]
    # an older version left in best/ what is of the weights that training started from
    best = json.loads((run / "best/config.json").read_text())
    best["pretrained_cfg"].update(test_input_size=[3, 288, 288], test_crop_pct=1.0)
    for folder in ("best", "out"):
        if folder == "out":
            (run / "best/config.json").write_text(json.dumps(best))
            export_run(run, run / "out", fold="conv")
        for use_test_size in (False, True):
            assert json.loads(json.dumps(resolved(run / folder, use_test_size))) == trained
    pool = timm.create_model(f"local-dir:{run}/out", pretrained=True).pretrained_cfg["pool_size"]
    assert pool == (None if size else [7, 7])


def test_of_a_model_as_it_is(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=2)
    plain = cbn.export(model, tmp_path / "plain", data_config={"mean": (0.1, 0.2, 0.3)})
    assert [size_and_crop(plain, test) for test in (False, True)] == [TRAINED, EVALUATED]
    crop = cbn.export(model, tmp_path / "crop", data_config={"crop_pct": 0.8})
    assert [size_and_crop(crop, test) for test in (False, True)] == [((3, 224, 224), 0.8), ((3, 288, 288), 0.8)]
    small = cbn.export(model, tmp_path / "small", data_config={"input_size": (3, 64, 96)})
    assert [size_and_crop(small, test) for test in (False, True)] == [((3, 64, 96), 0.95)] * 2
    assert timm.create_model(f"local-dir:{small}", pretrained=True).pretrained_cfg["pool_size"] is None


def test_of_a_model_that_is_made_for_other_images(tmp_path: Path) -> None:
    model = create_model(ModelSpec("resnet18", pretrained=False, img_size=64))
    assert [resolve_model_data_config(model, use_test_size=test)["input_size"] for test in (False, True)] == [
        (3, 64, 64)
    ] * 2
    folder = cbn.export(model, tmp_path / "out")
    assert [size_and_crop(folder, test) for test in (False, True)] == [((3, 64, 64), 0.95)] * 2
    # which timm would not go below
    for size, smallest in ((64, None), (160, (3, 128, 128))):
        cfg = create_model(ModelSpec("lambda_resnet26t", pretrained=False, img_size=size)).pretrained_cfg
        assert cfg.get("min_input_size") == smallest


@pytest.mark.parametrize("key", ["input_size", "min_input_size"])
@pytest.mark.parametrize("value", [5, [3, "a", 64], [64, 64]])
def test_damaged_settings(key: str, value: Any, tmp_path: Path) -> None:
    folder = cbn.export(timm.create_model("test_resnet", num_classes=2), tmp_path / "out")
    about = json.loads((folder / "config.json").read_text())
    about["pretrained_cfg"][key] = value
    about["model_args"] = {}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match=r"cannot load local-dir|which no image has") as error:
        create_model(ModelSpec(f"local-dir:{folder}", img_size=32), 2)
    assert "\n" not in str(error.value)
