"""That `make gpu` runs, on a tiny network on the CPU: nobody sees it otherwise until there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NORMS = ["bn", "frozen", "tune", "cbn"]


def test_the_script_writes_all_of_its_parts(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text())["parts"]
    assert parts["tests"]["exit_code"] == 0
    steps = [rows for name, rows in parts.items() if name.startswith("{")]
    assert len(steps) == 2
    for rows in steps:
        assert [row["column"] for row in rows] == NORMS
    assert parts["launches"]["cbn"]["operations"] > parts["launches"]["bn"]["operations"]
    assert [parts[f"finetuning {norm}"]["steps"] for norm in NORMS] == [4] * 4


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--output", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1
    assert "torch sees no GPU here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "gpu.json").exists()
