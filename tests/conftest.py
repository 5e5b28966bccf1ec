"""Fixtures that several folders use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 is obeyed

if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # as precise as the CPU
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, as timm does

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers look in turns from their second step on, instead of in all of their first steps."""
    monkeypatch.setattr("cbn_convert.norm.carried.FIRST_LOOKS", 1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "clothing").is_dir():
        pytest.skip(f"real data are not at {SHARED}")
    return SHARED


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Returns as soon as the condition holds, and fails if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing came of it in {seconds:.0f} s"
        time.sleep(0.02)


def randomize_norms(model: nn.Module) -> nn.Module:
    """Gives every BatchNorm random γ, β and running statistics, so that a fold has something to fold."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
    return model


def write_image(path: Path, color: tuple[int, int, int], noise_seed: int, size: int = 32) -> None:
    """A noisy image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randint(-40, 41, (size, size, 3), generator=generator)
    pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_colors(folder: Path) -> Path:
    """An image folder of two classes that a small network tells apart at once, with train/ and val/."""
    for split, count in (("train", 16), ("val", 6)):
        for label, color in (("blue", (60, 60, 200)), ("red", (200, 60, 60))):
            for i in range(count):
                write_image(folder / split / label / f"{i}.png", color, 1000 * (split == "val") + i)
    return folder


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """`write_colors` in a folder of its own."""
    return write_colors(tmp_path / "colors")
