"""Image folders: classes, splits, errors."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
from helpers.images import write_image
from helpers.runs import config
from PIL import Image
from timm.data import resolve_data_config

import cbn_convert as cbn
from cbn_convert.errors import CbnWarning, DataError, RunError
from cbn_convert.training.loading import batches, plain_loader
from cbn_convert.training.splits import evaluation_split, read_classes, read_splits, refuse_among_images
from cbn_convert.training.splits import test_split as held_back


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


def test_one_class_is_nothing_to_learn_but_may_be_evaluated(colors: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(colors / split / "blue")
    with pytest.raises(DataError, match=r"train has only one class, 'red', .*each class into a folder of its own"):
        read_splits(str(colors), None, 0)
    (colors / "photos").mkdir()
    (colors / "train/red").rename(colors / "photos/red")
    with pytest.raises(DataError, match="photos has only one class, 'red'"):
        read_splits(str(colors / "photos"), 0.2, 0)
    alone = evaluation_split(str(colors / "photos"), ["blue", "red"], None)
    assert {label for _, label in alone.samples} == {1}


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"train": "set/train", "val": "set/val"}, r"seem to lie deeper, in DATA/set; give that folder instead$"),
        ({"train": "a/b/images", "val": None}, r"seem to lie deeper, in DATA/a/b/images; give that folder instead$"),
        ({"train": "images", "val": "labels"}, r"seem to lie deeper, in DATA/images; give"),
        ({"train": "train/all"}, r"classes in DATA/train seem to lie deeper, in DATA/train/all; move its folders up"),
        ({"train": "train/train", "val": "train/val"}, r"^DATA/train has splits where classes should be; give DATA/tr"),
        ({"train": "training", "val": "validation"}, r"^DATA/training looks like a split, not like a class; call the"),
        ({"val": "val/all"}, r"classes in DATA/val seem to lie deeper, in DATA/val/all; move"),
        ({"train": "cats", "val": "dogs"}, r"^class folder DATA/cats holds no images of its own, only in .*/cats/blue"),
        ({"train/blue": "train/blue/2020/05"}, r"^class folder DATA/train/blue holds no images of its own, only in"),
    ],
)  # fmt: skip
def test_images_that_lie_deeper_are_no_classes(moves: dict[str, str | None], message: str, colors: Path) -> None:
    for old, new in moves.items():
        (colors / old).rename(colors / "aside")
        if new == "labels":  # of another kind of data set
            (colors / new).mkdir()
            (colors / new / "0.txt").write_text("0 0.5 0.5 1 1")
        elif new is not None:
            (colors / new).parent.mkdir(parents=True, exist_ok=True)
            (colors / "aside").rename(colors / new)
        shutil.rmtree(colors / "aside", ignore_errors=True)
    with pytest.raises(DataError) as error:
        read_splits(str(colors), None if (colors / "val").is_dir() else 0.2, 0)
    assert re.search(message, str(error.value).replace(str(colors), "DATA"))
    assert "\n" not in str(error.value)


def test_splits_without_classes_are_no_classes(colors: Path) -> None:
    (colors / "train/red").rename(colors / "Training")
    (colors / "train/blue").rename(colors / "Testing")
    for name in ("train", "val"):
        shutil.rmtree(colors / name)
    with pytest.raises(DataError, match=r"has splits such as 'Testing' where classes should be; put the images of"):
        read_splits(str(colors), 0.2, 0)
    (colors / "Testing").rename(colors / "bus")  # one of several classes may have such a name
    assert read_splits(str(colors), 0.25, 0)[0].counts() == [12, 12]


def test_files_that_look_like_images_and_are_not_read_are_counted(colors: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    for name in ("red/IMG_0001.HEIC", "blue/x.dcm", "blue/noending", "red/deep/x.jpg_large", "red/y.dat"):
        (colors / "train" / name).parent.mkdir(exist_ok=True)
        (colors / "train" / name).write_bytes(jpeg.getvalue())
    for name in ("blue/0.txt", "blue/0.xml", "red/README", "red/Thumbs.db", "red/._0.heic", "red/z.dat"):
        (colors / "train" / name).write_bytes(b"no image")
    with pytest.warns(CbnWarning) as caught:
        training, _ = read_splits(str(colors), None, 0)
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith(f"5 files in {colors}/train are not read ")
    assert f"such as {colors}/train/blue/noending; convert" in text
    assert training.counts() == [16, 16]
    shutil.rmtree(colors / "train/blue")
    (colors / "train/blue").mkdir()
    (colors / "train/blue/0.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/blue holds no images but files such as .*blue/0\.heic, which are not"):
        read_splits(str(colors), None, 0)


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_every_kind_that_pillow_writes_and_opens_is_read(tmp_path: Path) -> None:
    kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    drawn = {"EPS", "WMF", "BUFR", "GRIB", "HDF5"}
    pictures = {ending for ending, kind in kinds.items() if kind in Image.OPEN and kind not in drawn}
    for ending in pictures - {".pfm"}:
        (tmp_path / "set/a").mkdir(parents=True, exist_ok=True)
        modes = {"XBM": "1", "MSP": "1", "XPM": "P", "BLP": "P"}
        Image.new(modes.get(kinds[ending], "RGB"), (32, 32)).save(tmp_path / f"set/a/x{ending.upper()}", kinds[ending])
    write_image(tmp_path / "set/b/0.png", (9, 9, 9), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CbnWarning)
        split = read_classes(tmp_path / "set")
    found = {Path(path).suffix.lower() for path, label in split.samples if label == 0}
    assert found >= pictures - {".pfm"} >= {".jpg", ".jfif", ".jp2", ".gif", ".tga", ".webp", ".avif", ".bmp", ".tiff"}
    sizes = {Path(path).suffix.lower(): split.open(path).size for path, _ in split.samples}
    assert {size for ending, size in sizes.items() if ending != ".icns"} == {(32, 32)}  # which Pillow writes in many


def test_folders_of_systems_and_drives_hold_no_images(colors: Path) -> None:
    for name in (
        "@eaDir",
        "#recycle",
        "__MACOSX",
        ".thumbnails",
        "$RECYCLE.BIN",
        "lost+found",
        "System Volume Information",
    ):
        for place in ("train", "train/red", "train/red/@eaDir/0.png", "val", "."):
            write_image(colors / place / name / "SYNOPHOTO_THUMB_M.jpg", (9, 9, 9), 0)
    write_image(colors / "train/blue/._0.jpg", (9, 9, 9), 0)
    training, validation = read_splits(str(colors), None, 0)
    assert (training.classes, training.counts(), validation.counts()) == (["blue", "red"], [16, 16], [6, 6])


def test_what_drives_call_their_bins_may_be_a_class(colors: Path) -> None:
    (colors / "train/red").rename(colors / "train/recycled")
    assert read_splits(str(colors / "train"), 0.25, 0)[0].classes == ["blue", "recycled"]


def test_names_that_look_the_same_are_one_class(colors: Path) -> None:
    one, two = "caf\u00e9", "cafe\u0301"  # as Linux and macOS write it
    (colors / "train/red").rename(colors / "train" / two)
    (colors / "val/red").rename(colors / "val" / one)
    training, validation = read_splits(str(colors), None, 0)
    assert (training.counts(), validation.counts()) == ([16, 16], [6, 6])
    assert evaluation_split(str(colors), [one, "blue"], None).counts() == [6, 6]
    (colors / "train" / one).mkdir()
    if len(list((colors / "train").iterdir())) == 2:
        pytest.skip("this file system does not tell them apart")
    write_image(colors / "train" / one / "0.png", (9, 9, 9), 0)
    with pytest.raises(DataError, match=r"two class folders 'caf\u00e9', 'cafe\\u0301' and 'caf\\xe9' in Unicode; put"):
        read_splits(str(colors), None, 0)


@pytest.fixture
def latin(colors: Path) -> Path:
    """`colors` with a file whose name is of another age than UTF-8."""
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(colors / "train/red/0.png", colors / "train/red" / name)
    except OSError:
        pytest.skip("this file system has no such names")
    return colors


def test_images_whose_names_are_not_utf8(latin: Path, tmp_path: Path) -> None:
    training, _ = read_splits(str(latin), None, 0)
    (path,) = [path for path, _ in training.samples if "caf" in path]
    assert training.open(path).size == (32, 32)
    Path(path).write_bytes(b"damaged")
    shutil.copytree(latin / "train", latin / "val", dirs_exist_ok=True)
    with pytest.raises(DataError) as error:
        training.open(path)
    assert r"red/caf\udce9.png (Unidentified" in str(error.value).encode().decode()
    result = cbn.finetune(config(latin, tmp_path / "run", skip_bad_images=True, max_steps=4), quiet=True)
    assert [Path(bad).name for bad in result.bad_images if "/val/" in bad] == [r"caf\udce9.png"]
    assert json.loads((tmp_path / "run/results.json").read_text())["bad_images"] == [
        bad for bad in result.bad_images if "/val/" in bad
    ]
    assert cbn.resume(tmp_path / "run").steps == 4


def test_folders_whose_names_are_not_utf8(latin: Path) -> None:
    name = os.fsdecode(b"gr\xfcn")
    (latin / "train/red").rename(latin / "train" / name)
    with pytest.raises(DataError) as error:
        read_splits(str(latin), None, 0)
    assert str(error.value).encode().decode().endswith(r"train/gr\udcfcn is not UTF-8; rename it")
    shutil.copytree(latin / "val", latin / name)
    with pytest.raises(DataError, match=r"gr\\udcfcn is not UTF-8, so that it cannot be stored in a run; rename it"):
        read_splits(str(latin / name), 0.2, 0)
    with pytest.raises(RunError, match=r"gr\\udcfcn is not UTF-8; choose another output folder"):
        cbn.finetune(config(latin, latin / name))


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_serve_for_validation_and_it_is_said(name: str, colors: Path, tmp_path: Path) -> None:
    (colors / "val").rename(colors / name)
    with pytest.warns(CbnWarning, match=f"has no val/ folder, so {name}/ serves for validation"):
        _, validation = read_splits(str(colors), None, 0)
    assert validation.counts() == [6, 6]
    assert all(f"/{name}/" in path for path, _ in validation.samples)
    with pytest.warns(CbnWarning, match=f"so the evaluation is of {name}/"):
        assert evaluation_split(str(colors), ["blue", "red"], None) == validation
    assert held_back(str(colors), ["blue", "red"], None) is None
    with pytest.raises(DataError, match="lies among the images"):
        refuse_among_images(colors / name / "run", str(colors))
    if name == "test":  # it stays what it is where other images serve
        assert sum(len(split.samples) for split in read_splits(str(colors), 0.25, 0)) == 32
        assert held_back(str(colors), ["blue", "red"], 0.25) == validation
    else:
        with pytest.raises(DataError, match=rf"has a {name}/ folder, so --val-fraction has no use; leave it out"):
            read_splits(str(colors), 0.25, 0)


def test_of_several_folders_for_validation_the_first_is_taken(colors: Path) -> None:
    for name, wanted in (("test", "val"), ("validation", "val"), ("valid", "val"), (None, "valid")):
        if name is None:
            shutil.rmtree(colors / "val")
        else:
            shutil.copytree(colors / "val", colors / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, validation = read_splits(str(colors), None, 0)
        assert {Path(path).parents[1].name for path, _ in validation.samples} == {wanted}
        assert [f"{wanted}/ is taken for validation" in str(warning.message) for warning in caught] == (
            [] if name == "test" else [True]
        )


def test_a_test_folder_without_classes_does_not_serve_for_validation(colors: Path) -> None:
    shutil.rmtree(colors / "val")
    write_image(colors / "test/0.png", (9, 9, 9), 0)
    with pytest.raises(DataError, match=r"has no val/ folder; add one, or hold out .* --val-fraction 0\.2"):
        read_splits(str(colors), None, 0)
    write_image(colors / "val/red/0.png", (9, 9, 9), 0)
    with pytest.warns(CbnWarning, match=r"/test has no class folders, so the accuracies are of the validation images"):
        assert held_back(str(colors), ["blue", "red"], None) is None


def test_an_evaluation_of_a_folder_with_training_images_alone_asks_which(colors: Path) -> None:
    shutil.rmtree(colors / "val")
    with pytest.raises(DataError, match=r"has train/ but no val/; say which images are meant, such as --split train"):
        evaluation_split(str(colors), ["blue", "red"], None)
    (colors / "train/red").rename(colors / "train/test")  # without splits it is a class
    assert evaluation_split(str(colors / "train"), ["blue", "test"], None).counts() == [16, 16]


def test_validation_by_the_training_images_is_said(colors: Path) -> None:
    shutil.rmtree(colors / "val")
    (colors / "val").symlink_to(colors / "train")
    with pytest.warns(CbnWarning, match=r"train/blue holds training images and validation images alike"):
        read_splits(str(colors), None, 0)


def test_arrays_are_images_where_there_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a/0.npy", "a/1.NPY", "b/2.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_image(tmp_path / "b/3.png", (9, 9, 9), 0)
    split = read_classes(tmp_path)
    assert split.samples == [
        (str(tmp_path / name), label) for name, label in (("a/0.npy", 0), ("a/1.NPY", 0), ("b/3.png", 1))
    ]
