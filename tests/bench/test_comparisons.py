"""The comparisons of the study: what they are called with, how they go on, and what their JSON holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import comparisons

NAME = "hands-lite0-few"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Data of ten images of one class and three of another, a place for work; JSON goes to a folder of its own."""
    data, work = tmp_path / "data", tmp_path / "work"
    for split in ("train", "val", "test"):
        for group, count in (("a", 10), ("b", 3)):
            (data / "sign_digits" / split / group).mkdir(parents=True)
            for i in range(count):
                (data / "sign_digits" / split / group / f"{i}.png").touch()
    monkeypatch.setattr(comparisons, "STUDY", tmp_path / "study")
    return data, work


class FakeCompare:
    """Stands for `cbn compare`: leaves a run of each norm that has none, and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, command: str, words: list[str], threads: int = 1) -> None:
        self.calls.append(words)
        resumed = "--resume" in words
        folder = Path(words[words.index("--resume" if resumed else "--output") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        report: dict[str, Any] = {
            "config": {"run": {"data": words[0], "checkpoint": "/weights/lite0.safetensors", "output": str(folder)}},
            "cells": [], "images": {}, "versions": {},
        }  # fmt: skip
        if file.is_file():
            report = json.loads(file.read_text())
        norms = words[words.index("--norms") + 1].split(",")
        there = {cell["norm"] for cell in report["cells"]}
        report["cells"] += [{"norm": norm, "call": len(self.calls)} for norm in norms if norm not in there]
        file.write_text(json.dumps(report))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> FakeCompare:
    fake = FakeCompare()
    monkeypatch.setattr(comparisons, "cbn", fake)
    return fake


def stored() -> Any:
    return json.loads((comparisons.STUDY / f"{NAME}.json").read_text())


def test_a_part_of_the_training_images_of_every_class(folders: tuple[Path, Path]) -> None:
    data, work = folders
    for _ in range(2):  # the second time it is there
        made = comparisons.photos("hands, 15 %", data, work)
        assert sorted(p.name for p in (made / "train" / "a").iterdir()) == ["0.png", "5.png"]
        assert sorted(p.name for p in (made / "train" / "b").iterdir()) == ["0.png"]
    assert len(list((made / "val" / "a").iterdir())) == len(list((made / "test" / "a").iterdir())) == 10


def test_one_that_was_broken_off_is_completed(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, work = folders
    link = comparisons.link
    with monkeypatch.context() as broken:
        broken.setattr(
            comparisons, "link", lambda path, target: 1 / 0 if path.parent.name == "b" else link(path, target)
        )
        with pytest.raises(ZeroDivisionError):
            comparisons.photos("hands, 15 %", data, work)
    made = comparisons.photos("hands, 15 %", data, work)
    assert [len(list((made / "train" / group).iterdir())) for group in "ab"] == [2, 1]


def test_its_json_has_no_folder_of_this_machine(folders: tuple[Path, Path], compare: FakeCompare) -> None:
    comparisons.run(NAME, *folders, 1, {""})
    report = stored()
    assert str(folders[0].parent) not in json.dumps(report)
    assert report["config"]["run"] == {"data": "sign_digits-15", "checkpoint": "lite0.safetensors", "output": NAME}
    assert report["window"] == comparisons.default_window("lite0")


def test_it_goes_on_from_its_json(folders: tuple[Path, Path], compare: FakeCompare) -> None:
    data, work = folders
    comparisons.run(NAME, data, work, 1, {""})
    again = work.with_name("again")
    comparisons.run(NAME, data, again, 1, {"cbn"})
    calls = {cell["norm"]: cell["call"] for cell in stored()["cells"]}
    assert calls == {"bn": 1, "frozen": 1, "tune": 1, "brn": 1, "cbn": 2}
    words = compare.calls[1]
    assert words[words.index("--resume") + 1] == str(again / NAME)
    assert Path(words[0]) == again / "parts" / "sign_digits-15"


def test_runs_of_another_default_are_not_gone_on_with(
    folders: tuple[Path, Path], compare: FakeCompare, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, work = folders
    comparisons.run(NAME, data, work, 1, {""})
    monkeypatch.setattr(comparisons, "default_window", lambda network: "another one")
    for place in (work, work.with_name("again")):  # in the folder of the comparison, and from its JSON
        with pytest.raises(SystemExit, match="another default"):
            comparisons.run(NAME, data, place, 1, {""})
    comparisons.run(NAME, data, work.with_name("new"), 1, {"cbn"})
    assert stored()["window"] == "another one"


def test_norms_that_it_does_not_have_are_an_error(folders: tuple[Path, Path], compare: FakeCompare) -> None:
    data, work = folders
    comparisons.run(NAME, data, work, 1, {""})
    with pytest.raises(SystemExit, match="no runs of gn"):
        comparisons.run(NAME, data, work.with_name("again"), 1, {"gn"})
    with pytest.raises(SystemExit, match="is there already"):
        comparisons.run(NAME, data, work, 1, {"cbn"})
