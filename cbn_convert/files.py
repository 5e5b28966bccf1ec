"""Writing that leaves nothing half done: temporary name in the same folder, fsync, rename, old one deleted last."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RunError


def check_output(path: Path, overwrite: bool) -> None:
    """Raises RunError if `path` is a file, or a folder with something in it and `overwrite` is False."""
    if path.is_file():
        raise RunError(f"{path} is a file; choose a folder as output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise RunError(f"{path} is not empty; choose another output folder or pass --overwrite (overwrite=True)")


# what this package puts into the folders that it replaces as a whole
OWN_FILES = {
    "model.safetensors", "config.json", "README.md",
    "model.onnx", "model.onnx.data",  # the latter for weights above 2 GB, ONNX's limit
    "model.pt2", "conversion.json", "training.pt",
}  # fmt: skip
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


def check_replaceable(path: Path) -> None:
    """Raises RunError if the folder holds a file that this package did not write."""
    foreign = sorted({entry.name for entry in path.iterdir()} - OWN_FILES - LITTER) if path.is_dir() else []
    if foreign:
        raise RunError(f"{path} holds {foreign[0]}, which overwriting would delete; choose another output folder")


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `path` at the end, or vanishes on an error.

    Raises RunError as `check_output` does, if `overwrite` would delete a file that this package did not write, or if
    the folder cannot be written.
    """
    path = path.resolve()
    check_output(path, overwrite)
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; choose an output folder that you may write to"
        ) from error
    try:
        yield temporary
        _open_to_umask(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(temporary)
        replace_directory(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that is there already is moved aside first and deleted last."""
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        path.replace(old)
    try:
        new.replace(path)
    except OSError:
        if old is not None:
            old.replace(path)
        raise
    _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_json(path: Path, what: str) -> Any:
    """Reads JSON. Raises RunError, calling the file `what`, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{what} {path} is not valid JSON ({error}); the file is damaged") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _open_to_umask(directory: Path) -> None:
    """Gives files and folders the modes that the umask grants; safetensors and tempfile make them private."""
    mask = _umask()
    directory.chmod(0o777 & ~mask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
