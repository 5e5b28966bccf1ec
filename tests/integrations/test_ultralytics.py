"""CbnTrainerMixin in ultralytics' trainers, with models built of their yaml files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop import different, everything
from PIL import Image

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin

os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()  # not the user's own; and nothing is fetched or installed
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
pytest.importorskip("ultralytics", reason="ultralytics is not installed; make test-integrations installs it")
from ultralytics import YOLO
from ultralytics.data import build_dataloader
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

from cbn_convert.integrations.ultralytics import CbnTrainerMixin

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ultralytics")]


class Trainer(CbnTrainerMixin, DetectionTrainer):
    """The order of images is the same in every epoch; by default a resumed run begins with that of the first one."""

    def get_dataloader(self, dataset_path: str, batch_size: int = 2, rank: int = 0, mode: str = "train") -> Any:
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        return build_dataloader(dataset, batch=batch_size, workers=0, shuffle=False, rank=rank)


class Classifier(CbnTrainerMixin, ClassificationTrainer):
    pass


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with one bright square each; the yaml file of the data set."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(4):
        pixels = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        x, y = 8 + 8 * i, 32 - 6 * i
        pixels[y : y + 20, x : x + 20] = 230
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"0 {(x + 10) / 64} {(y + 10) / 64} {20 / 64} {20 / 64}\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n")
    return folder / "data.yaml"


OPTIONS: dict[str, Any] = {
    "imgsz": 64, "batch": 2, "nbs": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False, "rect": True,
    "optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0, "save_period": 1, "exist_ok": True, "deterministic": True,
    "mosaic": 0, "fliplr": 0, "translate": 0, "scale": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "erasing": 0,
    "auto_augment": None, "close_mosaic": 0,
}  # fmt: skip


def train(model: YOLO, data: Path, folder: Path, trainer: Any = Trainer, **options: Any) -> Any:
    model.train(data=str(data), project=str(folder), name="run", trainer=trainer, **{**OPTIONS, **options})
    return model.trainer


def yolo(name: str = "yolo11n.yaml") -> YOLO:
    torch.manual_seed(0)
    return YOLO(name)


def weights(folder: Path, name: str) -> Path:
    return folder / "run" / "weights" / name


def end(trainer: Any) -> dict[str, torch.Tensor]:
    averages = {f"ema.{k}": v for k, v in trainer.ema.ema.state_dict().items()}
    return everything(trainer.model) | averages


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolov8n.yaml"])
def test_resume_is_exact(name: str, squares: Path, tmp_path: Path) -> None:
    whole = train(yolo(name), squares, tmp_path, epochs=3)  # its bf16 needs CUDA
    assert sum(isinstance(m, CrossIterationMixin) for m in whole.model.modules()) > 50
    path = weights(tmp_path, "epoch0.pt")
    resumed = train(YOLO(path), squares, tmp_path, resume=True)
    assert different(end(whole), end(resumed)) == []

    path.with_suffix(".cbn").unlink()
    with pytest.warns(cbn.errors.CbnWarning, match="goes on from the averages"):
        without = train(YOLO(path), squares, tmp_path, resume=True)
    assert len(different(end(whole), end(without))) > 100


LOADED = """
import sys, torch
sys.modules["cbn_convert"] = None
from ultralytics import YOLO
model = YOLO(sys.argv[1])
torch.save(model.model.float().eval()(torch.load(sys.argv[2]))[0], sys.argv[3])
"""


def test_saved_files_load_and_export_without_the_package(squares: Path, tmp_path: Path) -> None:
    trainer = train(yolo(), squares, tmp_path, epochs=1)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    for name in ("last.pt", "best.pt", "epoch0.pt"):
        arguments = [str(weights(tmp_path, name)), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
        subprocess.run([sys.executable, "-W", "ignore", "-c", LOADED, *arguments], check=True, capture_output=True)
        expected = trainer.ema.ema.half().float().eval()(x)[0]
        assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
    assert not weights(tmp_path, "last.cbn").exists()  # nothing is left to resume it with
    exported = YOLO(weights(tmp_path, "best.pt")).export(format="torchscript", imgsz=64, device="cpu")
    assert Path(exported).is_file()
    assert YOLO(weights(tmp_path, "best.pt")).val(data=str(squares), imgsz=64, device="cpu", plots=False, workers=0)


def test_the_averages_follow_weights_and_statistics(squares: Path, tmp_path: Path) -> None:
    trainer = train(yolo(), squares, tmp_path, epochs=2)
    assert not any(isinstance(m, CrossIterationMixin) for m in trainer.ema.ema.modules())
    fresh: Any = yolo().model
    for name, value in trainer.ema.ema.state_dict().items():
        if name.endswith(("conv.weight", "running_mean")) and "dfl" not in name:
            assert not torch.equal(value, fresh.state_dict()[name]), name


def test_frozen_stages_stay_as_they_are(squares: Path, tmp_path: Path) -> None:
    fresh = yolo()
    before = {k: v.half().float() for k, v in fresh.model.state_dict().items()}  # as ultralytics saves them
    fresh.save(tmp_path / "start.pt")
    trainer = train(YOLO(tmp_path / "start.pt"), squares, tmp_path, epochs=1, freeze=3)
    frozen = {k: v for k, v in trainer.model.state_dict().items() if k.startswith(("model.0.", "model.1.", "model.2."))}
    assert [k for k, v in frozen.items() if not torch.equal(v.float(), before[k])] == []


def test_a_classifier_trains(colors: Path, tmp_path: Path) -> None:
    trainer = train(yolo("yolo11n-cls.yaml"), colors, tmp_path, trainer=Classifier, epochs=1)
    assert any(isinstance(m, CrossIterationMixin) for m in trainer.model.modules())
    loaded: Any = YOLO(weights(tmp_path, "best.pt")).model
    assert not any(isinstance(m, CrossIterationMixin) for m in loaded.modules())


def test_keywords_reach_convert(squares: Path, tmp_path: Path) -> None:
    class Short(Trainer):
        cbn_keywords = {"window": 1024, "history": "ema", "exclude": "model.23.*"}  # noqa: RUF012

    trainer = train(yolo(), squares, tmp_path, trainer=Short, epochs=1)
    layers = {n: m for n, m in trainer.model.named_modules() if isinstance(m, CrossIterationMixin)}
    assert {layer.window.size for layer in layers.values()} == {1024}
    assert not any(name.startswith("model.23.") for name in layers)
