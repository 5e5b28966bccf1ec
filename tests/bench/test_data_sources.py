"""What gets the images and weights of the figures: all of an item and what was measured with, or nothing of it."""

from __future__ import annotations

import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn

from benchmarks.data import fetch as data


def picture(width: int, height: int, *channels: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 12, (height, width, *channels), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"repository-0123/{name}", content)
    return path


def prepared(name: str, sources: list[Path], target: Path) -> Any:
    """What an item makes of its downloads."""
    return next(item for item in data.ITEMS if item.name == name).prepare(sources, target)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with one data set, whose source is a file, and whose sum is recorded."""
    splits = ("train", "validation", "test")
    files = {f"{split}/hat/{n}.jpg": picture(200 + n, 320, 3) for split in splits for n in (1, 2)}
    source = write_zip(tmp_path / "source.zip", {**files, "README.md": b"hats"})
    item = data.ITEMS[0]
    assert item.name == "clothing"
    monkeypatch.setattr(data, "SUMS", tmp_path / "data.json")
    monkeypatch.setattr(data, "ITEMS", [at(item, source.as_uri())])
    item.prepare([source], tmp_path / "prepared/clothing")
    assert data.main(["--record", str(tmp_path / "prepared")]) == 0
    return data


def at(item: Any, *addresses: str, **changes: Any) -> Any:
    return type(item)(**{**vars(item), "addresses": addresses, **changes})


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_made_from_its_source(fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake.main(["--to", str(tmp_path / "to")]) == 0
    out = capsys.readouterr().out
    assert out == f"clothing: CC0-1.0, from {(tmp_path / 'source.zip').as_uri()}\nclothing ok\n"
    assert names(tmp_path / "to") == [f"clothing/{s}/hat/{n}.jpg" for s in ("test", "train", "val") for n in (1, 2)]
    assert Image.open(tmp_path / "to/clothing/val/hat/2.jpg").size == (160, 253)
    (tmp_path / "source.zip").unlink()
    assert fake.main(["--to", str(tmp_path / "to")]) == 0  # is there, so that nothing is downloaded
    assert fake.main(["--check", str(tmp_path / "to")]) == 0
    assert capsys.readouterr().out == "clothing ok\n" * 2


def change_a_byte(folder: Path) -> None:
    path = folder / "train/hat/1.jpg"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        change_a_byte,
        lambda folder: (folder / "train/hat/1.jpg").unlink(),
        lambda folder: (folder / "train/hat/3.jpg").write_bytes(b""),
        lambda folder: (folder / "train/hat/1.jpg").rename(folder / "train/hat/0.jpg"),
    ],
    ids=["changed", "missing", "additional", "renamed"],
)
def test_a_file_that_is_not_as_recorded(
    damage: Any, fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path / "prepared/clothing")
    before = names(tmp_path / "prepared")
    assert fake.main(["--check", str(tmp_path / "prepared")]) == 1
    assert capsys.readouterr().out == "clothing differs\n"
    assert fake.main(["--to", str(tmp_path / "prepared")]) == 1
    assert "is not the clothing of the figures, and is left alone: move it away" in capsys.readouterr().err
    assert names(tmp_path / "prepared") == before
    assert fake.main(["--to", str(tmp_path / "to"), "--from", str(tmp_path / "prepared")]) == 1
    assert not (tmp_path / "to").exists()


def test_from_a_folder(fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*(tmp_path / "prepared").rglob("*"), tmp_path / "prepared"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "source.zip").unlink()
    assert fake.main(["--to", str(tmp_path / "to"), "--from", str(tmp_path / "prepared")]) == 0
    assert names(tmp_path / "to") == names(tmp_path / "prepared")
    assert (tmp_path / "to/clothing").stat().st_mode & 0o200
    assert fake.main(["--to", str(tmp_path / "other"), "--from", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} has no clothing\n"


class Half(http.server.BaseHTTPRequestHandler):
    """Says that there are 1000 bytes, and sends 100."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(100))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def half() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/source.zip"
    server.shutdown()
    server.server_close()


def refused(fake: ModuleType, address: str, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """The sentence that getting the item from there ends with; nothing is left."""
    fake.ITEMS[:] = [at(fake.ITEMS[0], address)]
    assert fake.main(["--to", str(folder)]) == code
    assert not folder.exists()
    (sentence,) = capsys.readouterr().err.splitlines()
    return str(sentence)


def test_half_a_download(fake: ModuleType, half: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(fake, half, tmp_path / "to", capsys)
    assert sentence in {
        f"error: {half} broke off after 100 of 1000 bytes: start again",
        f"error: cannot get {half} (IncompleteRead(100 bytes read, 900 more expected)); "
        "without a network, --from FOLDER takes what is prepared already",
    }


def test_no_network(fake: ModuleType, half: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = half.replace("127.0.0.1", "nowhere.invalid")
    sentence = refused(fake, address, tmp_path / "to", capsys)
    assert sentence.startswith(f"error: cannot get {address} (")
    assert sentence.endswith("); without a network, --from FOLDER takes what is prepared already")
    sentence = refused(fake, "pip:no-package==:", tmp_path / "to", capsys)
    assert sentence.startswith("error: pip cannot get no-package==: (")


def test_a_damaged_source(fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.zip"
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    sentence = refused(fake, source.as_uri(), tmp_path / "to", capsys)
    assert sentence.startswith(f"error: clothing cannot be made from {source.as_uri()}: BadZipFile, ")
    for files in ({"train/hat/1.jpg": picture(200, 320, 3)}, {"README.md": b""}):
        write_zip(source, files)
        sentence = refused(fake, source.as_uri(), tmp_path / "to", capsys)
        assert f"what {source.as_uri()} gives is not the clothing of the figures" in sentence


def test_an_interruption(
    fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", interrupted)
    sentence = refused(fake, (tmp_path / "source.zip").as_uri(), tmp_path / "to", capsys, code=130)
    assert sentence == "error: interrupted; what was begun is not there, and the same command goes on"


def test_what_cannot_be_made(fake: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and is a failure where it was asked for."""
    fake.ITEMS[:] = [at(fake.ITEMS[0], prepare=None, lost="nobody knows how")]
    sentence = "clothing missing: cannot be made from its source, since nobody knows how; --from FOLDER takes it\n"
    for action in ("--to", "--check"):
        assert fake.main([action, str(tmp_path / "to")]) == 0
        assert fake.main([action, str(tmp_path / "to"), "--only", "clothing"]) == 1
        assert capsys.readouterr().out == sentence * 2


@pytest.mark.parametrize("options", [["--to", "x", "--only", "hats"], ["--check", "x", "--from", "y"], []])
def test_wrong_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        data.main(options)
    assert ": error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("size", [(400, 822), (400, 797), (742, 400)])
def test_the_bytes_are_those_of_one_step_of_pillow_13(size: tuple[int, int], tmp_path: Path) -> None:
    """Which measured images were made with; others begin tall images with the other side."""
    content = picture(*size, 3)
    source = write_zip(tmp_path / "s.zip", {"train/hat/a.jpg": content})
    prepared("clothing", [source], tmp_path / "made")
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow is older")
    scale = 160 / 400
    expected = io.BytesIO()
    image = Image.open(io.BytesIO(content)).resize((round(size[0] * scale), round(size[1] * scale)))
    image.save(expected, "JPEG", quality=78)
    assert (tmp_path / "made/train/hat/a.jpg").read_bytes() == expected.getvalue()


def test_hands_by_number(tmp_path: Path) -> None:
    photos = {f"Dataset/{digit}/IMG_{1000 + n}.JPG": picture(100, 100, 3) for digit in (0, 7) for n in range(20)}
    prepared("sign_digits", [write_zip(tmp_path / "s.zip", photos)], tmp_path / "hands")
    for split, numbers in {"train": range(14), "val": range(14, 17), "test": range(17, 20)}.items():
        expected = [f"{digit}/IMG_{1000 + n}.jpg" for digit in (0, 7) for n in numbers]
        assert names(tmp_path / "hands" / split) == expected


def box(name: str, *corners: int) -> str:
    """An object of Pascal VOC."""
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def test_cells_in_the_format_of_coco(tmp_path: Path) -> None:
    size = "<size><width>640</width><height>480</height></size>"
    first = f"<annotation>{size}{box('Platelets', 1, 2, 4, 8)}{box('RBC', 5, 5, 5, 5)}</annotation>"
    files = {f"BCCD/ImageSets/Main/{split}.txt": b"" for split in ("train", "val")}
    files |= {"BCCD/ImageSets/Main/test.txt": b"b\na\n", "BCCD/JPEGImages/a.jpg": b"A", "BCCD/JPEGImages/b.jpg": b"B"}
    files |= {"BCCD/Annotations/a.xml": first.encode(), "BCCD/Annotations/b.xml": first.encode()}
    prepared("bccd", [write_zip(tmp_path / "s.zip", files)], tmp_path / "cells")
    assert (tmp_path / "cells/test/b.jpg").read_bytes() == b"B"
    made = json.loads((tmp_path / "cells/test.json").read_text())
    assert [image["file_name"] for image in made["images"]] == ["a.jpg", "b.jpg"]
    assert [(b["id"], b["image_id"], b["category_id"], b["bbox"], b["area"]) for b in made["annotations"]] == [
        (1, 1, 3, [1, 2, 3, 6], 18),
        (2, 2, 3, [1, 2, 3, 6], 18),
    ]


def test_defects_by_number_wherever_they_lie(tmp_path: Path) -> None:
    note = f"<annotation><size><width>200</width><height>200</height></size>{box('scratches', 1, 2, 4, 8)}</annotation>"
    files = {}
    for defect in ("rolled-in_scale", "crazing"):
        for n in range(1, 21):
            start = "Validation_" if n == 7 else ""
            files[f"{start}{'Images' if start else 'IMAGES'}/{defect}_{n}.jpg"] = f"{defect} {n}".encode()
            files[f"{start}{'Annotations' if start else 'ANNOTATIONS'}/{defect}_{n}.xml"] = note.encode()
    prepared("neu_det", [write_zip(tmp_path / "s.zip", files)], tmp_path / "steel")
    for split, numbers in {"train": range(1, 15), "val": range(15, 18), "test": range(18, 21)}.items():
        made = json.loads((tmp_path / f"steel/{split}.json").read_text())
        expected = [f"{defect}_{n}.jpg" for defect in ("crazing", "rolled-in_scale") for n in numbers]
        assert [image["file_name"] for image in made["images"]] == expected
        assert {one["category_id"] for one in made["annotations"]} == {6}
        assert names(tmp_path / "steel" / split) == sorted(expected)
    assert (tmp_path / "steel/train/crazing_7.jpg").read_bytes() == b"crazing 7"


def test_streets(tmp_path: Path) -> None:
    files = {"CamVid/val/a_1.png": picture(480, 360, 3), "CamVid/valannot/a_1.png": picture(480, 360)}
    prepared("camvid", [write_zip(tmp_path / "s.zip", files)], tmp_path / "streets")
    assert names(tmp_path / "streets") == ["val/a_1.jpg", "val_labels/a_1.png"]
    label = Image.open(tmp_path / "streets/val_labels/a_1.png")
    assert (label.size, label.mode) == ((320, 240), "L")
    assert set(np.unique(np.asarray(label))) <= set(range(12))


def test_weights_of_keras(tmp_path: Path) -> None:
    """A network of timm's, written as TensorFlow.js has it, comes back."""
    model = timm.create_model("mobilenetv2_035", num_classes=0)
    entries: list[dict[str, Any]] = []
    statistics: list[dict[str, Any]] = []
    parts: dict[str, list[bytes]] = {"weights": [], "statistics": []}

    def put(name: str, tensor: torch.Tensor, late: bool = False) -> None:
        (statistics if late else entries).append({"name": name, "shape": list(tensor.shape), "dtype": "float32"})
        parts["statistics" if late else "weights"].append(tensor.detach().contiguous().numpy().tobytes())

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            deep = module.groups > 1
            kernel = module.weight.permute((2, 3, 0, 1) if deep else (2, 3, 1, 0))
            put(f"{name}/{'depthwise_' if deep else ''}kernel", kernel)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1)
            put(f"{name}/gamma", module.weight)
            put(f"{name}/beta", module.bias)
            put(f"{name}/moving_mean", module.running_mean, late=True)
            put(f"{name}/moving_variance", module.running_var - 0.00099, late=True)
    put("dense_Dense1/kernel", torch.zeros(1280, 2))
    manifest = {"weightsManifest": [{"paths": ["weights.bin"], "weights": entries + statistics}]}
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    (tmp_path / "weights.bin").write_bytes(b"".join(parts["weights"] + parts["statistics"]))
    made = prepared("mobilenetv2_035_keras", [tmp_path / "model.json", tmp_path / "weights.bin"], tmp_path)
    torch.testing.assert_close(made, dict(model.state_dict()), rtol=1e-6, atol=1e-6)


def test_the_sum_of_weights(tmp_path: Path) -> None:
    """Neither the order of the header counts, which is left to chance, nor is anything else passed over."""
    content = save({"w": torch.arange(4.0)}, {"a": "1", "b": "2"})
    first, second = b'"a":"1","b":"2"', b'"b":"2","a":"1"'  # one of which is there
    swapped = content.replace(first, second) if first in content else content.replace(second, first)
    for name, changed in {
        "same": content,
        "swapped": swapped,
        "metadata": content.replace(b'"1"', b'"3"'),
        "tensor": content[:-1] + b"\0",
        "longer": content + b"\0",
        "shorter": content[:-1],
        "broken": b"junk",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(changed)
    sums = {path.stem: data.sum_of(path) for path in tmp_path.glob("*.safetensors")}
    assert swapped != content
    assert sums["same"] == sums["swapped"]
    assert len(set(sums.values())) == 6


def test_every_item_is_pinned_and_recorded() -> None:
    assert list(json.loads(data.SUMS.read_text())) == [item.path for item in data.ITEMS]
    for item in data.ITEMS:
        assert item.licence
        assert (item.prepare is None) == bool(item.lost)
        for address in item.addresses:
            assert re.search(r"/[0-9a-f]{40}[/.]|==", address)


def test_the_folder_that_the_figures_were_made_with(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = [item for item in data.ITEMS if (shared_data / item.path).exists()]
    assert {item.name for item in data.ITEMS} - {item.name for item in there} <= {"neu_det"}  # which may be absent
    assert data.main(["--check", str(shared_data), "--only", ",".join(item.name for item in there)]) == 0
    assert capsys.readouterr().out == "".join(f"{item.path} ok\n" for item in there)
    assert data.main(["--to", str(tmp_path), "--from", str(shared_data), "--only", "resnet56_cifar10"]) == 0
    file = "weights/resnet56_cifar10.safetensors"
    torch.testing.assert_close(load_file(tmp_path / file), load_file(shared_data / file), rtol=0, atol=0)
