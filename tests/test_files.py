"""Writing of folders and files: as a whole or not at all, and only its own errors are said to be of writing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cbn_convert.deploy.graphs import _write_pt2
from cbn_convert.errors import RunError, first_line
from cbn_convert.files import new_directory, replaced_file


def os_error(number: int, *filename: Any) -> OSError:
    return OSError(number, os.strerror(number), *filename)


@contextmanager
def folder_at(path: Path) -> Iterator[Path]:
    with new_directory(path, overwrite=True) as folder:
        (folder / "README.md").write_text("new")
        yield folder / "config.json"


@contextmanager
def file_at(path: Path) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    with replaced_file(path / "README.md") as file:
        file.write("new")
        file.flush()
        yield next(path.glob(".README.md.tmp-*"))


WAYS = pytest.mark.parametrize("way", [folder_at, file_at])


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file that must be the same at the end, and nothing beside it."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "README.md").write_text("old")
    yield path
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("README.md", "old")]
    assert list(tmp_path.iterdir()) == [path]


@WAYS
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("the hub does not answer"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        os_error(errno.ENOENT, "photos/3.png"),
        os_error(errno.EACCES, "weights.safetensors"),
        os_error(errno.ENOSPC, "/tmp/cache/kernel.so"),
        os_error(errno.EMFILE),
        RuntimeError("CUDA error"),
        KeyError("a"),
    ],
    ids=repr,
)
def test_errors_of_the_callers_code_pass_as_they_are(way: Any, error: Exception, old: Path) -> None:
    with pytest.raises(type(error)) as raised, way(old):
        raise error
    assert raised.value is error


@WAYS
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; free some space or choose another folder"),
        (errno.EDQUOT, ".*; free some space or choose another folder"),
        (errno.EROFS, "Read-only file system; choose an output folder that you may write to"),
        (errno.EIO, "Input/output error; check the disk or choose another folder"),
    ],
)
def test_errors_of_writing_say_what_to_do(way: Any, number: int, advice: str, old: Path) -> None:
    with pytest.raises(RunError, match=f"^cannot write {old}.*: {advice}$"), way(old):
        raise os_error(number)


@WAYS
def test_an_error_of_a_file_of_its_own_is_one_of_writing(way: Any, old: Path) -> None:
    with pytest.raises(RunError, match="Permission denied; choose an output folder"), way(old) as own:
        raise os_error(errno.EACCES, str(own))


def save_pt(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(torch.zeros(300, 300), file)


def save_pt2(path: Path) -> None:
    _write_pt2(torch.export.export(nn.Linear(300, 300), (torch.zeros(1, 300),)), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(bytes(300_000)),
    "torch.save": save_pt,
    "safetensors": lambda path: save_file({"t": torch.zeros(300, 300)}, path),
    "torch.export": save_pt2,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_however_it_is_written(writer: str, old: Path) -> None:
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(RunError, match=f"^cannot write {old}: File too large; free some space"),
            new_directory(old, overwrite=True) as folder,
        ):
            WRITERS[writer](folder / "model.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_without_a_message_is_told_by_its_class() -> None:
    assert first_line(ValueError()) == "ValueError"
    assert first_line(RuntimeError("no memory.\nTraceback")) == "no memory"
