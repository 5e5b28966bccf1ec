"""The examples run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.models import randomize_norms
from torch import nn

import cbn_convert as cbn

ROOT = Path(__file__).resolve().parents[1]


def printed(example: str, *arguments: str) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("by", ["fx", "pt2e"])
def test_int8(by: str) -> None:
    if by == "pt2e":
        pytest.importorskip("torchao")
    text = printed("int8.py", "--by", by, "--steps", "60")
    as_trained, folded = re.findall(r"(?:as trained|folded): top-1 ([\d.]+) %", text)
    assert as_trained == folded
    assert float(re.findall(r"agree on ([\d.]+) %", text)[0]) > 90


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["fx", "pt2e"])
def test_every_conv_is_quantised(by: str) -> None:
    if by == "pt2e":
        pytest.importorskip("torchao")
    example = runpy.run_path(str(ROOT / "examples/int8.py"))
    model = randomize_norms(timm.create_model("test_resnet", num_classes=2))
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cbn.convert(model, example_input=x)
    folded = cbn.fold(model, example_input=x)
    convs = sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    with torch.no_grad():
        int8, expected = example[f"by_{by}"](folded, x), folded(x)
        assert (int8(x) - expected).norm() / expected.norm() < 0.1
    if by == "fx":
        found = sum("quantized" in type(m).__module__ and "Conv" in type(m).__name__ for m in int8.modules())
    else:
        found = sum("conv2d" in str(n.target) and "dequantize" in str(n.args[1].target) for n in int8.graph.nodes)
    assert found == convs


# each in a few steps, which says that it runs; what it learns is in examples/README.md
RECIPES = {
    "lightning_classification": ("lightning", "top-1"),
    "huggingface_classification": ("transformers", "top-1"),
    "timm_loop": ("timm", "top-1"),
    "mmengine_norm_eval": ("mmengine", "top-1"),
    "detection": ("torchvision", "AP50"),
    "frozen_backbone": ("torchvision", "AP50"),
    "smp_unet": ("segmentation_models_pytorch", "mIoU"),
    "monai_unet3d": ("monai", "Dice"),
    "ultralytics_yolo": ("ultralytics", "mAP50"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, shared_data: Path) -> None:
    package, figure = RECIPES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-integrations installs it")
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) < 80
    few = ["--images", "4"] if figure in ("AP50", "mIoU") else []
    text = printed(f"{name}.py", "--data", str(shared_data), "--steps", "6", *few)
    assert re.search(rf"^cbn: {figure} \[%\] [\d.]+ on \d+ ", text, re.MULTILINE), text


def test_faster_rcnn(shared_data: Path) -> None:
    options = ["--detector", "faster_rcnn", "--steps", "4", "--images", "2"]
    assert "cbn: AP50 [%] " in printed("detection.py", "--data", str(shared_data), *options)
