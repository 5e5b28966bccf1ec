"""The examples run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_detection(tmp_path: Path) -> None:
    arguments = ["--backbone", "test_resnet", "--steps", "6", "--eval-images", "2", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, ROOT / "examples/detection.py", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "loss, mean of 6 steps: first " in done.stdout
    assert "AP50 on 2 new images: 0." in done.stdout
    assert "plain timm's features differ by at most 0\n" in done.stdout
    assert (tmp_path / "out/model.safetensors").is_file()
