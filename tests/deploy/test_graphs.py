"""model.onnx and model.pt2: run here by onnxruntime and torch.export, and held against the model itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers.models import randomize_norms
from PIL import Image
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.deploy import exporting
from cbn_convert.deploy.graphs import write_graphs
from cbn_convert.errors import ExportError
from cbn_convert.training.run_export import export_run

SMALL = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def run_pt2(path: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


def test_any_batch_size_and_what_the_file_says(tmp_path: Path, capfd) -> None:
    model = randomize_norms(timm.create_model("test_resnet", num_classes=2)).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(5, 3, 64, 64)
    cbn.convert(model, example_input=x)
    capfd.readouterr()
    out = cbn.export(
        model, tmp_path / "out", class_names=["Hemd", "Schürze"], data_config=SMALL, onnx=True, torch_export=True
    )
    assert capfd.readouterr().out == ""
    for count in (1, 2, 5):
        with torch.no_grad():
            expected = model(x[:count])
        assert error(run_onnx(out / "model.onnx", x[:count])[0], expected) < 1e-5
        assert error(run_pt2(out / "model.pt2", x[:count]), expected) < 1e-5
    for file in ("model.onnx", "model.pt2"):
        assert b"site-packages" not in (out / file).read_bytes()

    written = onnx.load(out / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [i.name for i in written.graph.input] == ["images"]
    assert [o.name for o in written.graph.output] == ["logits"]
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}
    said = {p.key: p.value for p in written.metadata_props}
    assert (said["cbn_convert"], said["architecture"]) == (cbn.__version__, "test_resnet")
    assert json.loads(said["classes"]) == ["Hemd", "Schürze"]
    assert tuple(json.loads(said["input_size"])) == SMALL["input_size"]
    assert (tuple(json.loads(said["mean"])), tuple(json.loads(said["std"]))) == (SMALL["mean"], SMALL["std"])
    plain = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}"), use_test_size=True)
    assert json.loads(said["crop_pct"]) == plain["crop_pct"]
    assert [said[key] for key in ("crop_mode", "interpolation")] == [plain["crop_mode"], plain["interpolation"]]

    files = {"model.safetensors", "config.json", "README.md"}
    assert {p.name for p in out.iterdir()} == {*files, "class_map.txt", "model.onnx", "model.pt2"}
    cbn.export(model, out, data_config=SMALL, overwrite=True)
    assert {p.name for p in out.iterdir()} == files


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        return self.first(x), self.second(x)


TWO_HEADS: dict[str, Any] = {
    "architecture": "two_heads",
    "pretrained_cfg": {
        "input_size": [3, 8, 8],
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bicubic",
        "crop_mode": "center",
        "crop_pct": 0.9,
    },
}


@torch.no_grad()
def test_several_outputs(tmp_path: Path) -> None:
    model = randomize_norms(TwoHeads()).eval()
    write_graphs(model, tmp_path, TWO_HEADS, onnx=True, torch_export=False)
    assert [o.name for o in onnx.load(tmp_path / "model.onnx").graph.output] == ["logits_0", "logits_1"]
    x = torch.randn(4, 3, 8, 8)
    for got, expected in zip(run_onnx(tmp_path / "model.onnx", x), model(x), strict=True):
        assert error(got, expected) < 1e-5


def test_real_weights_and_photos(shared_data: Path, tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv2_035", pad_type="same").eval()
    cbn.models.load_weights(model, shared_data / "weights/mobilenetv2_035_keras.timm.safetensors")
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # halves the time that the conversion to ONNX takes
    config = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    out = cbn.export(
        model, tmp_path / "out", model_args={"pad_type": "same"}, data_config=config, onnx=True, torch_export=True
    )
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    photos = sorted((shared_data / "clothing/test").glob("*/*.jpg"))[::60]
    x = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])
    assert len(x) >= 5
    with torch.no_grad():
        expected = plain(x)
    for got in (run_onnx(out / "model.onnx", x)[0], run_pt2(out / "model.pt2", x)):
        assert error(got, expected) < 1e-4
        assert torch.equal(got.argmax(1), expected.argmax(1))


class OneBatchSize(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * [1.0, 1.0, 1.0, 1.0][int(x.shape[0])]


class OtherWhenTraced(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.001 if torch.compiler.is_compiling() else 1)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (OneBatchSize, r"test_resnet cannot be traced for batches of any size \(.+\); leave out --onnx"),
        (OtherWhenTraced, r"outputs of model.pt2 on 2 images differ by 1\..e-03 from the model's; leave out --torch"),
    ],
)
def test_a_failure_leaves_nothing(head: type[nn.Linear], message: str, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2).eval()
    model.fc = head(model.num_features, 2)
    with pytest.raises(ExportError, match=message) as raised:
        cbn.export(model, tmp_path / "out", data_config=SMALL, onnx=True, torch_export=True)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_noticed(tmp_path: Path, monkeypatch) -> None:
    def save_damaged(self: Any, path: Path, **kwargs: Any) -> None:
        save(self, path, **kwargs)
        written = onnx.load(path)
        bias = next(t for t in written.graph.initializer if t.name == "second.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.01, bias.name))
        onnx.save(written, path)

    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save_damaged)
    with pytest.raises(
        ExportError, match=r"outputs of model.onnx on 2 images differ by .+ from the model's; leave out"
    ):
        write_graphs(TwoHeads(), tmp_path, TWO_HEADS, onnx=True, torch_export=False)


def test_an_absent_package_is_named_before_any_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(exporting, "fold_model", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ExportError, match=r"ONNX export needs onnxscript; pip install onnxscript$"):
        cbn.export(timm.create_model("test_resnet"), tmp_path / "out", onnx=True)
    with pytest.raises(ExportError, match="ONNX export needs onnxscript"):
        export_run(tmp_path / "nowhere", tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []
