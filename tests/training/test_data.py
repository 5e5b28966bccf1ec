"""Image folders: classes, splits, errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import write_image
from timm.data import resolve_data_config

from cbn_convert.errors import DataError
from cbn_convert.training.data import evaluation_split, read_splits
from cbn_convert.training.images import open_image
from cbn_convert.training.loading import batches, plain_loader


def test_train_and_val_share_one_class_map(colors: Path) -> None:
    write_image(colors / "train/aqua/0.png", (0, 200, 200), 0)
    training, validation = read_splits(str(colors), None, 0)
    assert training.classes == validation.classes == ["aqua", "blue", "red"]
    assert {label for path, label in validation.samples if "/red/" in path} == {2}
    assert len(training.samples) == 33
    assert len(validation.samples) == 12


def test_hold_out_is_stratified_and_seeded(colors: Path) -> None:
    shutil.rmtree(colors / "val")
    for i in range(4):
        (colors / f"train/red/{i}.png").unlink()
    training, validation = read_splits(str(colors), 0.25, 3)
    assert [sum(label == c for _, label in validation.samples) for c in (0, 1)] == [4, 3]
    assert not set(training.samples) & set(validation.samples)
    assert len(training.samples) + len(validation.samples) == 28
    assert read_splits(str(colors), 0.25, 3)[1] == validation
    assert read_splits(str(colors), 0.25, 4)[1] != validation
    assert read_splits(str(colors / "train"), 0.25, 3)[1].classes == ["blue", "red"]


def test_errors_name_the_folder_and_the_way_out(colors: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_splits("nowhere", None, 0)
    with pytest.raises(DataError, match="leave it out"):
        read_splits(str(colors), 0.2, 0)
    write_image(colors / "val/green/0.png", (0, 200, 0), 0)
    with pytest.raises(DataError, match=r"val has the class 'green'.* none of the 2 training classes"):
        read_splits(str(colors), None, 0)
    shutil.rmtree(colors / "val")
    with pytest.raises(DataError, match=r"--val-fraction 0\.2"):
        read_splits(str(colors), None, 0)
    (colors / "train/empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no images"):
        read_splits(str(colors), 0.2, 0)
    shutil.rmtree(colors / "train/empty")
    write_image(colors / "train/single/0.png", (0, 200, 0), 0)
    with pytest.raises(DataError, match="'single' has one image"):
        read_splits(str(colors), 0.2, 0)
    (colors / "bare").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        read_splits(str(colors / "bare"), 0.2, 0)


def test_evaluation_split(colors: Path) -> None:
    assert len(evaluation_split(str(colors), ["blue", "red"], None).samples) == 12
    assert len(evaluation_split(str(colors), ["blue", "red"], "train").samples) == 32
    assert evaluation_split(str(colors / "val"), ["black", "blue", "red"], None).samples[0][1] == 1
    with pytest.raises(DataError, match="'red'"):
        evaluation_split(str(colors), ["blue"], None)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_in_one_sentence(colors: Path, workers: int) -> None:
    bad = colors / "train/blue/3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    training, _ = read_splits(str(colors), None, 0)
    loader = plain_loader(training, resolve_data_config({"img_size": 32}), 4, workers)
    with pytest.raises(DataError) as error:
        list(batches(loader))
    assert "\n" not in str(error.value)
    assert str(bad) in str(error.value)
    assert str(error.value).endswith("repair or remove it, or pass --skip-bad-images")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new(mode, (9, 5)).save(tmp_path / "x.png")
    image = open_image(str(tmp_path / "x.png"))
    assert (image.mode, image.size) == ("RGB", (9, 5))
