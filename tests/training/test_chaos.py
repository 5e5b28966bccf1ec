"""A few cases of `make chaos`, and that its checks see what they are there to see."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.documents.reliability import tables
from benchmarks.provenance import ROOT
from benchmarks.robustness.chaos import planned_damage, planned_kill
from benchmarks.robustness.fuzz import DAMAGES, EDITS, TARGETS, changes, damage, snapshot
from benchmarks.robustness.kills import KILLS
from benchmarks.robustness.supervised import CheckError, Command, check_no_litter, difference


def test_a_few_kills_and_damaged_files(tmp_path: Path) -> None:
    """In a process of its own: it forks, which a process with torch's threads must not."""
    options = ["--kills", "2", "--fuzz", str(len(TARGETS)), "--output", tmp_path / "chaos.json"]
    command = [sys.executable, "-m", "benchmarks.robustness.chaos", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["failures"] == []
    assert sum(group["runs"] for group in report["kills"].values()) == 2
    assert {name: group["ok"] for name, group in report["targets"].items()} == dict.fromkeys(TARGETS, 1)
    assert f"| **all** | {len(TARGETS)} | {len(TARGETS)} |" in tables(report)["files"]


def test_a_full_run_has_cases_of_every_kind() -> None:
    assert {planned_kill(i, 0).kind for i in range(100)} == set(KILLS)
    damaged = {planned_damage(i, 0).kind for i in range(500)}
    assert damaged == {*DAMAGES, *EDITS}


@pytest.mark.parametrize("kind", [*DAMAGES, *EDITS])
def test_damage_is_done_and_depends_on_the_seed_alone(kind: str, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        path = tmp_path / name / "file.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"numbers": list(range(1, 9)), "text": {"key": "value"}}))
        before = snapshot(path.parent)
        damage(path, kind, random.Random("seed 1"))
        assert changes(before, snapshot(path.parent)) == ["file.json"]
        contents.append(path.read_bytes() if path.exists() else None)
    assert contents[0] == contents[1]


def test_one_bit_is_a_difference() -> None:
    want = {"model": {"weight": torch.tensor([1.0, float("nan"), 0.0])}, "records": [{"loss": 0.5}]}
    assert difference(want, want) == ""
    for place, other in (
        ("/model/weight", {**want, "model": {"weight": torch.tensor([1.0, float("nan"), -0.0])}}),
        ("/model/weight", {**want, "model": {"weight": want["model"]["weight"].double()}}),
        ("/records", {**want, "records": []}),
        ("/records/0/loss", {**want, "records": [{"loss": 0.25}]}),
        ("all", {"records": [{"loss": 0.5}]}),
    ):
        assert difference(other, want) == place


def test_a_temporary_file_is_litter(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").touch()
    check_no_litter(tmp_path)
    (tmp_path / "checkpoints/.step-00000001.tmp-12345678").mkdir()
    with pytest.raises(CheckError, match="left"):
        check_no_litter(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("error: one sentence\n", ""),
        ("warning: another one\nerror: one sentence\n", ""),
        ("error: one\nand more\n", "more than one line"),
        ("", "more than one line"),
        ("error: unexpected KeyError: 'x'\n", "unexpected KeyError"),
        ("Traceback (most recent call last):\nValueError: x\n", "traceback: ValueError: x"),
    ],
)
def test_faults_of_an_error_message(text: str, fault: str, tmp_path: Path) -> None:
    command = Command.__new__(Command)
    command.log, command.code = tmp_path / "log", 1
    command.log.write_text(text)
    assert fault in command.faults if fault else command.faults == ""
