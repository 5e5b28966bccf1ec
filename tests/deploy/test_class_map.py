"""timm's own reader of image folders scores an export as this package does, whatever the classes are called."""

from __future__ import annotations

import colorsys
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import cbn_convert as cbn
from cbn_convert.errors import ExportError
from cbn_convert.models import ModelSpec, create_model
from cbn_convert.training.run_export import export_run
from cbn_convert.training.splits import evaluation_split

# natural order is 1, 2, .., 10; and Apple and apple are the same without case
NAMES = sorted([*map(str, range(1, 11)), "Apple", "apple", "Banana", "cherry", "été"])
ODD = ["a\nb", "a\rb", " a", "a ", "a\u2028", "", "caf\udce9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/CLASS/0.png, each class of a colour of its own."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
        (folder / "val" / name).mkdir(parents=True)
        color = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(number / len(NAMES), 1, 1))
        Image.new("RGB", (64, 64), color).save(folder / "val" / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def knowing(data: Path) -> torch.nn.Module:
    """A model that answers each colour with its class: the head picks the features that are nearest."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=len(NAMES)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(Image.open(data / "val" / name / "0.png")) for name in NAMES])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        features = (features - features.mean(0)).double()
        model.fc.weight.copy_(torch.linalg.pinv(features).T)
        model.fc.bias.copy_(-(model.fc.weight @ model.forward_head(model.forward_features(images), True).mean(0)))
        assert torch.equal(model(images).argmax(1), torch.arange(len(NAMES)))
    return model


def timm_top1(model: torch.nn.Module, dataset: torch.utils.data.Dataset) -> float:
    """In percent, of what timm reads."""
    with torch.no_grad():
        hits = [int(model(image[None]).argmax()) == label for image, label in dataset]
    return 100 * sum(hits) / len(hits)


def test_timm_scores_an_export_as_we_do(data: Path, knowing, tmp_path: Path, monkeypatch) -> None:
    out = cbn.export(knowing, tmp_path / 'the "export"', class_names=NAMES)
    assert cbn.evaluate(out, str(data), device="cpu", workers=0).top1 == 100
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset("", root=str(data / "val"), class_map=out / "class_map.txt", transform=transform)
    assert timm_top1(model, dataset) == 100
    assert timm_top1(model, timm.data.create_dataset("", root=str(data / "val"), transform=transform)) < 50
    assert model.pretrained_cfg["label_names"] == NAMES

    # as the card says
    monkeypatch.chdir(tmp_path)
    call = re.search(r"`(timm\.data\.create_dataset\(.*?\))`", (out / "README.md").read_text(encoding="utf-8"))[1]
    scope = {"timm": timm, "transform": transform}
    assert timm_top1(model, eval(call.replace("DATA", str(data)), scope)) == 100

    # once more, from the folder alone
    listed = export_run(out, tmp_path / "again", dry_run=True)["files"]
    export_run(out, tmp_path / "again", fold="conv")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(listed)
    cbn.export(model, tmp_path / "again", overwrite=True)  # by the names that timm has read
    assert (tmp_path / "again/class_map.txt").read_bytes() == (out / "class_map.txt").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text())["label_names"] == NAMES


def test_a_folder_of_timm_that_names_classes_by_their_numbers(data: Path, knowing, tmp_path: Path) -> None:
    labels = {"label_names": dict(enumerate(NAMES))}
    timm.models.save_for_hf(knowing, tmp_path / "timm", model_config=labels, safe_serialization=True)
    assert cbn.evaluate(tmp_path / "timm", str(data), device="cpu", workers=0).top1 == 100


@pytest.mark.parametrize("channels", [1, 4])
def test_of_other_images_than_rgb(channels: int, data: Path, tmp_path: Path, monkeypatch) -> None:
    spec = ModelSpec("test_resnet", pretrained=False, model_kwargs={"in_chans": channels})
    out = cbn.export(create_model(spec, len(NAMES)), tmp_path / "out", class_names=NAMES)
    card = (out / "README.md").read_text(encoding="utf-8")
    call = re.search(r"`(timm\.data\.create_dataset\(.*?\))`", card)
    if channels == 4:  # of which timm's validate.py would make greyscale ones
        assert call is None
        assert "`cbn evaluate` reads them" in card
        return
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("local-dir:out", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = eval(call[1].replace("DATA", str(data)), {"timm": timm, "transform": transform})
    ours = evaluation_split(str(data), NAMES, None)
    paths = [path for path, _ in ours.samples]
    for path, (image, label) in zip(dataset.filenames(absolute=True), dataset, strict=True):
        assert label == ours.samples[paths.index(path)][1]
        assert torch.equal(image, transform(ours.open(path, channels=1)))


@pytest.mark.parametrize("odd", ODD)
def test_names_that_the_file_cannot_hold(odd: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    out = cbn.export(model, tmp_path / "out", class_names=["fine", odd])
    assert not (out / "class_map.txt").exists()
    assert f"cannot hold the name {odd!r}; `cbn evaluate`" in (out / "README.md").read_text(encoding="utf-8")
    assert "class_map.txt" not in export_run(out, tmp_path / "again", dry_run=True)["files"]
    assert json.loads((out / "config.json").read_text())["label_names"] == ["fine", odd]


def test_names_of_other_weights(tmp_path: Path) -> None:
    """Those that a model brings along hold for as many classes as they are."""
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ExportError, match="class_names has 2 names and the model 3 classes"):
        cbn.export(model, tmp_path / "out", class_names=["a", "b"])
    out = cbn.export(model, tmp_path / "out", class_names=["a", "b", "c"])
    other = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=2)
    cbn.export(other, tmp_path / "other")
    assert not (tmp_path / "other/class_map.txt").exists()
    plain = timm.create_model(f"local-dir:{tmp_path / 'other'}", pretrained=True)
    assert not plain.pretrained_cfg.get("label_names")
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 3, "label_names": {"0": "x", "2": "z", "1": "y"}}
    model.pretrained_cfg["label_descriptions"] = {"x": "of old"}
    assert (cbn.export(model, tmp_path / "index") / "class_map.txt").read_text() == "x\ny\nz\n"
    new = timm.create_model(f"local-dir:{cbn.export(model, tmp_path / 'new', class_names=['x', 'b', 'c'])}")
    assert new.pretrained_cfg["label_names"] == ["x", "b", "c"]
    assert "label_descriptions" not in new.pretrained_cfg
