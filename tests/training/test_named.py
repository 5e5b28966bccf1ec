"""Data sets of Hugging Face, here made of a folder without the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_engine import config

import cbn_convert as cbn
from cbn_convert.errors import DataError
from cbn_convert.training.data import read_splits


def test_a_data_set_is_as_good_as_its_folder(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    name = f"hfds/{colors}"
    training, validation = read_splits(name, None, 0)
    assert (training.classes, training.counts(), validation.counts()) == (["blue", "red"], [16, 16], [6, 6])
    held = read_splits(name, 0.25, 0)
    assert [len(split.samples) for split in held] == [24, 8]
    folder, _ = read_splits(str(colors), None, 0)
    own = {(split.open(path).tobytes(), label) for split in [folder] for path, label in split.samples}
    assert {(training.open(path).tobytes(), label) for path, label in training.samples} == own
    for workers in (0, 2):
        run = tmp_path / f"run{workers}"
        result = cbn.finetune(config(name, run, workers=workers, max_steps=8), quiet=True)
        assert cbn.evaluate(run, name, device="cpu", workers=0).top1 == pytest.approx(result.best_top1)
    states = [torch.load(tmp_path / f"run{w}/checkpoints/step-00000008/training.pt", weights_only=True) for w in (0, 2)]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    with pytest.raises(DataError, match=r"the split nonsense of .* cannot be read \("):
        cbn.evaluate(tmp_path / "run0", name, split="nonsense", device="cpu")


def test_without_the_package_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets; pip install datasets"):
        read_splits("hfds/beans", None, 0)
    with pytest.raises(DataError, match=r"wds/photos is a stream, in which .*; unpack it .* or use hfds/NAME"):
        read_splits("wds/photos", None, 0)
