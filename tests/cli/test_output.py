"""What a command prints arrives whatever the encoding of its output, and a lost output is said or quiet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.images import write_colors

import cbn_convert as cbn
from cbn_convert.files import read_json, write_json
from cbn_convert.training.config import FinetuneConfig

pytestmark = pytest.mark.xdist_group("output")  # one process makes the run that these tests look at

CLASSES = [
    "bl\u00e5",
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439",
    "\U0001f600",
]  # Latin-1, beyond, and none of the first plane
SMALL = [
    "-m", "test_resnet", "--no-pretrained", "--img-size", "32", "--no-aug", "--workers", "0", "--device", "cpu",
    "--max-steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images whose classes no encoding has all of, and a run on them."""
    folder = tmp_path_factory.mktemp("output")
    data = write_colors(folder / "colors")
    for split in data.iterdir():
        for name, new in zip(("blue", "red"), CLASSES, strict=False):
            (split / name).rename(split / new)
        (split / CLASSES[2]).mkdir()
        for path in (split / CLASSES[0]).iterdir():
            (split / CLASSES[2] / path.name).write_bytes(path.read_bytes())
    settings = {"pretrained": False, "img_size": 32, "no_aug": True, "workers": 0, "device": "cpu", "max_steps": 1}
    cbn.finetune(FinetuneConfig(str(data), "test_resnet", str(folder / "run"), **settings), quiet=True)
    return data, folder / "run"


def run(
    *arguments: object, encoding: str = "ascii", stdout: Any = subprocess.PIPE, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose standard output has this encoding."""
    return subprocess.run(
        [sys.executable, "-m", "cbn_convert.cli", *map(str, arguments)],
        stdout=stdout, stderr=subprocess.PIPE, encoding=encoding, timeout=120, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, **(more or {})},
    )  # fmt: skip


def escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_table_says_what_it_can(encoding: str, trained: tuple[Path, Path]) -> None:
    data, folder = trained
    options = ["--per-class", "--workers", 0, "--device", "cpu"]
    done = run("evaluate", folder, data, *options, encoding=encoding)
    assert done.returncode == 0, done.stderr
    for name in CLASSES:
        assert f" {escaped(name, encoding)} " in done.stdout.replace("|", " ")


def test_json_is_ascii(trained: tuple[Path, Path]) -> None:
    data, folder = trained
    done = run("evaluate", folder, data, "--json", "--workers", 0, "--device", "cpu", encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["classes"] == sorted(CLASSES)


def test_a_run_in_a_locale_without_utf8(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = trained
    output = tmp_path / "l\u00e4ufe"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("finetune", data, *SMALL, "-o", output, more=plain)
    assert done.returncode == 0, done.stderr
    assert "best validation top-1" in done.stdout
    assert (output / "best/model.safetensors").is_file()


def test_a_comparison(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = trained
    grid = ["--norms", "bn", "--batch-sizes", "8", "--lrs", "0.01", "--seeds", "2", "--reference", "0"]
    done = run("compare", data, *SMALL[:-2], "--images", "8", *grid, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert r" \xb1 " in done.stdout  # between mean and scatter
    assert (tmp_path / "out/report.html").is_file()


def test_an_error_about_a_name(tmp_path: Path) -> None:
    missing = tmp_path / "d\u00e9tails"
    done = run("evaluate", missing, tmp_path, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"].startswith(f"{missing} does not exist")
    assert done.stderr.startswith(f"error: {escaped(str(missing), 'ascii')} does not exist")
    done = run("convert", "test_resnet", "--no-pretrained", "-o", tmp_path / "\udce4")
    assert done.returncode == 1
    assert done.stderr == rf"error: the name of {tmp_path}/\udce4 is not UTF-8; choose another output folder" + "\n"


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "test_resnet"]], ids=["at once", "at the end"])
def test_output_that_is_lost(arguments: list[str]) -> None:
    """The pipe was closed, as by `head`; the disk is full."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = run(*arguments, stdout=pipe)
    assert (done.returncode, "Traceback" in done.stderr, "rror" in done.stderr) == (1, False, False), done.stderr
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write to standard output: No space left on device; ")
    assert "Traceback" not in done.stderr


def test_a_file_keeps_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    said = {"classes": CLASSES, "nested": {"\udcfe": 1}}
    write_json(tmp_path / "said.json", said)
    assert read_json(tmp_path / "said.json", "a file") == said
    assert CLASSES[1] in (tmp_path / "said.json").read_text(encoding="utf-8")
