"""Data sets of Hugging Face, here made of a folder without the hub, and tar files of WebDataset."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.runs import config
from PIL import Image
from timm.data import create_dataset

import cbn_convert as cbn
from cbn_convert.errors import CbnWarning, DataError
from cbn_convert.training.splits import evaluation_split, read_splits


def test_a_data_set_is_as_good_as_its_folder(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    name = f"hfds/{colors}"
    training, validation = read_splits(name, None, 0)
    assert (training.classes, training.counts(), validation.counts()) == (["blue", "red"], [16, 16], [6, 6])
    held = read_splits(name, 0.25, 0)
    assert [len(split.samples) for split in held] == [24, 8]
    folder, _ = read_splits(str(colors), None, 0)
    own = {(split.open(path).tobytes(), label) for split in [folder] for path, label in split.samples}
    assert {(training.open(path).tobytes(), label) for path, label in training.samples} == own
    for workers in (0, 2):
        run = tmp_path / f"run{workers}"
        result = cbn.finetune(config(name, run, workers=workers, max_steps=8), quiet=True)
        assert cbn.evaluate(run, name, device="cpu", workers=0).top1 == pytest.approx(result.best_top1)
    states = [torch.load(tmp_path / f"run{w}/checkpoints/step-00000008/training.pt", weights_only=True) for w in (0, 2)]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    with pytest.raises(DataError, match=r"the split nonsense of .* cannot be read \("):
        cbn.evaluate(tmp_path / "run0", name, split="nonsense", device="cpu")


def test_without_the_package_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets; pip install datasets"):
        read_splits("hfds/beans", None, 0)
    with pytest.raises(DataError, match=r"tfds/photos is a stream, in which .*; use hfds/NAME, or unpack it"):
        read_splits("tfds/photos", None, 0)


def _shard(path: Path, samples: list[tuple[str, Path, int]], field: str | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for key, image, label in samples:
            text = json.dumps({field: label}) if field else str(label)
            for extension, content in (
                (image.suffix, image.read_bytes()),
                (".json" if field else ".cls", text.encode()),
            ):
                item = tarfile.TarInfo(key + extension)
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))


def _shards(colors: Path, folder: Path) -> str:
    """The images of `colors` in shards of ten, without an index file."""
    folder.mkdir()
    for split in ("train", "val"):
        paths = sorted((colors / split).rglob("*.png"))
        samples = [(f"{i:04d}", path, int(path.parent.name == "red")) for i, path in enumerate(paths)]
        for number, start in enumerate(range(0, len(samples), 10)):
            _shard(folder / f"{split}-{number:04d}.tar", samples[start : start + 10])
    return f"wds/{folder}"


def test_shards_are_as_good_as_their_folder(colors: Path, tmp_path: Path) -> None:
    name = _shards(colors, tmp_path / "shards")
    for shards, folder in zip(read_splits(name, None, 0), read_splits(str(colors), None, 0), strict=True):
        assert [label for _, label in shards.samples] == [label for _, label in folder.samples]
        for (own, _), (path, _) in zip(shards.samples, folder.samples, strict=True):
            assert shards.open(own).tobytes() == folder.open(path).tobytes()
    runs = [cbn.finetune(config(data, tmp_path / str(i), workers=2 * i, max_steps=8), quiet=True)
            for i, data in enumerate((str(colors), name))]  # fmt: skip
    assert runs[0].best_top1 == runs[1].best_top1
    states = [torch.load(tmp_path / f"{i}/checkpoints/step-00000008/training.pt", weights_only=True) for i in (0, 1)]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    assert cbn.evaluate(tmp_path / "1", name, device="cpu", workers=0).top1 == pytest.approx(runs[1].best_top1)


def test_shards_hold_what_timm_streams(colors: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    name = _shards(colors, tmp_path / "shards")
    files = sorted(path.name for path in (tmp_path / "shards").glob("train-*"))
    info = {"name": "train", "filenames": files, "shard_lengths": [10, 10, 10, 2], "num_samples": 32}
    (tmp_path / "shards" / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    streamed = create_dataset("wds/any", root=str(tmp_path / "shards"), split="train", is_training=False)
    split = read_splits(name, None, 0)[0]
    own = [(split.open(path).tobytes(), label) for path, label in split.samples]
    assert [(image.tobytes(), label) for image, label in streamed.reader] == own


def test_labels_in_a_field_and_a_part_held_out(colors: Path, tmp_path: Path) -> None:
    paths = sorted((colors / "train").rglob("*.png"))
    _shard(tmp_path / "a.tar", [(f"x/{i}", p, 1 + 2 * (p.parent.name == "red")) for i, p in enumerate(paths)], "kind")
    info = {"filenames": ["a.tar"], "shard_lengths": [32], "num_samples": 32, "name": "train", "alt_label": "kind"}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    training, validation = read_splits(f"wds/{tmp_path}", 0.25, 0)
    assert training.classes == ["0", "1", "2", "3"]  # two of them without an image
    assert (training.counts(), validation.counts()) == ([0, 12, 0, 12], [0, 4, 0, 4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"train-0001.tar cannot be read as an uncompressed tar file .*; write or fetch it again"),
        ("compressed", r"train-0001.tar cannot be read as an uncompressed tar file"),
        ("short", r"train-0003.tar holds 2 images, but .*_info.json says 7; fetch the file again"),
        ("info", r"_info.json is not as timm writes it \(.*\); repair or remove it"),
        ("missing", r"train-0009.tar cannot be read"),
        ("unlabelled", r"train-0001.tar has no label for 0000; each image needs KEY.jpg and KEY.cls"),
        ("word", r"train-0001.tar cannot be read as .* of KEY.jpg and KEY.cls.*invalid literal"),
        ("negative", r"train-0001.tar gives 0000 the class -1; classes are numbered from 0"),
        ("split", r"has no val-\*.tar and no _info.json with the split validation; .*--val-fraction"),
        ("other", r"has other classes in its split validation"),
        ("folder", r"folder .*nowhere does not exist; give wds/FOLDER"),
    ],
)
def test_damaged_shards(damage: str, message: str, colors: Path, tmp_path: Path) -> None:
    name = _shards(colors, tmp_path / "shards")
    shard = tmp_path / "shards" / "train-0001.tar"
    image = next((colors / "train").rglob("*.png"))
    info = {"splits": {"train": {"filenames": ["train-0003.tar"], "shard_lengths": [7]}}}
    if damage == "cut":
        with tarfile.open(shard) as archive:
            place = archive.getmembers()[4].offset_data
        shard.write_bytes(shard.read_bytes()[: place + 10])
    elif damage == "compressed":
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    elif damage in ("unlabelled", "word", "negative"):
        _shard(shard, [("0000", image, {"word": "red", "negative": -1}.get(damage, 0))])  # type: ignore[list-item]
        if damage == "unlabelled":
            shard.write_bytes(shard.read_bytes().replace(b"0000.cls", b"0001.cls"))
            with tarfile.open(shard, "w") as archive:
                archive.add(image, "0000.png")
    elif damage in ("short", "info", "missing"):
        if damage == "missing":
            info["splits"]["train"]["filenames"] = ["train-0009.tar"]
        text = "{" if damage == "info" else json.dumps(info)
        (tmp_path / "shards" / "_info.json").write_text(text)
    elif damage == "split":
        for path in (tmp_path / "shards").glob("val*"):
            path.unlink()
    elif damage == "other":
        _shard(tmp_path / "shards" / "val-0000.tar", [("0000", image, 7)])
    else:
        name = f"wds/{tmp_path / 'nowhere'}"
    with pytest.raises(DataError, match=message):
        read_splits(name, None, 0)


def test_an_image_in_a_shard_that_cannot_be_read_is_named(colors: Path, tmp_path: Path) -> None:
    name = _shards(colors, tmp_path / "shards")
    split = read_splits(name, None, 0)[0]
    _, start, size = split.open.args[0][split.samples[3][0]]  # type: ignore[attr-defined]  # a partial of the index
    with (tmp_path / "shards" / "train-0000.tar").open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    with pytest.raises(DataError, match=r"cannot read the image .*train-0000.tar/0003 \("):
        cbn.finetune(config(name, tmp_path / "run", max_steps=8), quiet=True)
    result = cbn.finetune(config(name, tmp_path / "run2", max_steps=8, skip_bad_images=True), quiet=True)
    assert result.steps == 8


@pytest.mark.parametrize("name", ["valid", "test"])
@pytest.mark.parametrize("listed", [False, True])
def test_other_splits_of_shards_serve_for_validation(name: str, listed: bool, colors: Path, tmp_path: Path) -> None:
    data = _shards(colors, tmp_path / "shards")
    for path in (tmp_path / "shards").glob("val-*"):
        path.rename(path.with_name(path.name.replace("val", name)))
    if listed:
        splits = {
            split: {"filenames": sorted(path.name for path in (tmp_path / "shards").glob(f"{split}-*"))}
            for split in ("train", name)
        }
        (tmp_path / "shards" / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.warns(CbnWarning, match=f"has no split validation, so {name} serves for it"):
        _, validation = read_splits(data, None, 0)
    assert validation.counts() == [6, 6]
    with pytest.warns(CbnWarning, match=f"so {name} serves for it"):
        assert evaluation_split(data, ["0", "1"], None).samples == validation.samples
    with pytest.raises(DataError, match=r"no _info\.json with the split validation"):
        evaluation_split(data, ["0", "1"], "validation")


def test_other_splits_of_a_data_set_serve_for_validation(colors: Path) -> None:
    pytest.importorskip("datasets")
    (colors / "val").rename(colors / "test")
    with pytest.warns(CbnWarning, match="has no split validation, so test serves for it"):
        _, validation = read_splits(f"hfds/{colors}", None, 0)
    assert validation.counts() == [6, 6]


def test_shards_of_one_class_and_labels_without_an_image(colors: Path, tmp_path: Path) -> None:
    paths = sorted((colors / "train").rglob("*.png"))
    _shard(tmp_path / "train.tar", [(f"{i}", path, 1) for i, path in enumerate(paths)])
    with pytest.raises(DataError, match=r"has only one class, '1', so that"):
        read_splits(f"wds/{tmp_path}", 0.25, 0)
    (tmp_path / "x.heic").write_bytes(b"none that is read")
    more = [("a", tmp_path / "x.heic", 0), ("b", tmp_path / "x.heic", 0)]
    _shard(tmp_path / "train.tar", [*((f"{i}", path, i % 2) for i, path in enumerate(paths)), *more])
    with pytest.warns(CbnWarning, match=r"^2 labels of train in .* belong to no image .*, such as .*train\.tar/a;"):
        training, _ = read_splits(f"wds/{tmp_path}", 0.25, 0)
    assert training.counts() == [12, 12]


def test_of_several_images_of_a_key_timms_is_taken(colors: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        orders = ((".jpg", ".png", ".webp", ".gif"), (".gif", ".webp", ".png", ".jpg"), (".gif", ".webp"))
        for number, order in enumerate(orders):
            for place, suffix in enumerate(order):
                image = io.BytesIO()
                Image.new("RGB", (8 + place, 8)).save(image, Image.registered_extensions()[suffix])
                for end, content in ((suffix, image.getvalue()), (".cls", str(number % 2).encode())):
                    if end != ".cls" or not place:
                        item = tarfile.TarInfo(f"{number}{end}")
                        item.size = len(content)
                        archive.addfile(item, io.BytesIO(content))
    info = {"name": "train", "filenames": ["train-0.tar"], "shard_lengths": [3], "num_samples": 3}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": info}}))
    streamed = create_dataset("wds/any", root=str(tmp_path), split="train", is_training=False)
    split = evaluation_split(f"wds/{tmp_path}", ["0", "1"], "train")
    assert [split.open(path).size for path, _ in split.samples] == [image.size for image, _ in streamed.reader]
