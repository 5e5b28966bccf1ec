"""Small runs of `finetune` on an image folder, and what they leave."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cbn_convert.training import checkpoint
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.learner import Learner
from cbn_convert.training.metrics import read_metrics

COMMAND = [sys.executable, "-m", "cbn_convert.cli", "finetune"]
FLAGS = [
    "-m", "test_resnet", "--no-pretrained", "--img-size", "32", "--no-aug", "--device", "cpu", "--window", "4",
    "--lr", "0.01",
]  # fmt: skip
TIMES = ("train_seconds", "images_per_second", "loader_wait")


def config(data: Path, output: Path, **changes) -> FinetuneConfig:
    """The settings of a run of two epochs, with changes."""
    base = FinetuneConfig(
        data=str(data), model="test_resnet", output=str(output), pretrained=False, img_size=32, epochs=2, lr=0.01,
        no_aug=True, workers=0, device="cpu", window=4,
    )  # fmt: skip
    return replace(base, **changes)


class Killed(BaseException):
    """Stands for the end of the process: nothing is caught, nothing is saved."""


def final_state(run: Path) -> dict[str, Any]:
    """All that the last checkpoint and the log say, without times."""
    newest = checkpoint.checkpoints(run)[0]
    shared = torch.load(newest / "training.pt", weights_only=True)
    for name in ("train_seconds", "wait_seconds"):
        del shared["state"][name]
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)]
    rank = torch.load(newest / "rank-0.pt", weights_only=True)
    return {"step": newest.name, "shared": shared, "rank": rank, "records": records}


def assert_equal(got: Any, want: Any, path: str = "") -> None:
    """Tensors bit by bit."""
    assert type(got) is type(want), path
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype, path
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), path
    elif isinstance(want, dict):
        assert list(got) == list(want), path
        for key in want:
            assert_equal(got[key], want[key], f"{path}/{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), path
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_equal(g, w, f"{path}/{i}")
    else:
        assert got == want, path


def kill_after(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends in the middle of the next update after this one."""
    original = Learner.step_unless_bad

    def killing(self: Any) -> Any:
        if self.updates == update:
            raise Killed
        return original(self)

    monkeypatch.setattr(Learner, "step_unless_bad", killing)
