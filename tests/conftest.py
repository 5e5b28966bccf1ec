"""Fixtures that several folders use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.images import write_colors

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
    """Layers look in turns from their second step on, instead of in all of their first steps; at patches, too."""
    monkeypatch.setattr("cbn_convert.norm.carried.FIRST_LOOKS", 1)
    monkeypatch.setattr("cbn_convert.norm.carried.PATCH_TURNS", 1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "clothing").is_dir():
        pytest.skip(f"real data are not at {SHARED}")
    return SHARED


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """`write_colors` in a folder of its own."""
    return write_colors(tmp_path / "colors")
