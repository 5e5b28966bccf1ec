"""Image folders: classes, splits, errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import write_image
from timm.data import resolve_data_config

from cbn_convert.errors import DataError
from cbn_convert.training.data import evaluation_split, read_classes, read_splits
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


def test_any_folder_name_is_a_class(tmp_path: Path) -> None:
    names = ["Zürich", "a b", "grün & blau", "日本", "100%", ".hidden"]
    for name in names:
        write_image(tmp_path / name / "photo 1.png", (9, 9, 9), 0)
    (tmp_path / "notes.txt").write_text("no class")
    split = read_classes(tmp_path)
    assert split.classes == sorted(names[:-1])
    assert {Path(path).parent.name: label for path, label in split.samples} == {
        name: number for number, name in enumerate(sorted(names[:-1]))
    }


def test_images_of_nested_folders_but_nothing_hidden_and_no_other_files(tmp_path: Path) -> None:
    wanted = {"a/0.png", "a/1.PNG", "a/2020/05/2.jpeg", "b/x.webp"}
    for name in wanted:
        write_image(tmp_path / "set" / name, (9, 9, 9), 0)
    for name in ("a/.3.png", "a/.thumbs/4.png", "a/notes.txt", "a/Thumbs.db", "a/png"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"not an image")
    split = read_classes(tmp_path / "set")
    assert [label for _, label in split.samples] == [0, 0, 0, 1]
    assert {path for path, _ in split.samples} == {str(tmp_path / "set" / name) for name in wanted}


def test_links_are_followed_and_each_image_is_there_once(tmp_path: Path) -> None:
    for name in ("store/0.png", "store/1.png", "other/2.png", "set/a/3.png", "set/b/4.png", "set/d/5.png"):
        write_image(tmp_path / name, (9, 9, 9), 0)
    for link, target in (
        ("set/a/more", "store"),
        ("set/a/again", "store"),
        ("set/b/round", "set/b"),  # a loop
        ("set/c", "store"),  # a class that is a link
        ("set/d/there", "other"),
        ("set/d/up", "set"),  # to all classes
        ("other/back", "set/d"),  # a loop by a detour
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    split = read_classes(tmp_path / "set")
    assert split.classes == ["a", "b", "c", "d"]
    found = sorted((label, os.path.relpath(os.path.realpath(path), tmp_path)) for path, label in split.samples)
    wanted = [["set/a/3.png", "store/0.png", "store/1.png"], ["set/b/4.png"], ["store/0.png", "store/1.png"]]
    wanted.append(["other/2.png", "set/d/5.png"])
    assert found == [(label, name) for label, names in enumerate(wanted) for name in names]


def test_a_link_to_nowhere_is_named_when_it_is_read(colors: Path) -> None:
    link = colors / "train/blue/lost.png"
    link.symlink_to(colors / "moved away.png")
    training, _ = read_splits(str(colors), None, 0)
    with pytest.raises(DataError, match=r"cannot read the image .*train/blue/lost\.png \(FileNotFoundError"):
        list(batches(plain_loader(training, resolve_data_config({"img_size": 32}), 4, 0)))
