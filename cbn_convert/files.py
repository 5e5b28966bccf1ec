"""Writing that leaves nothing half done: temporary name in the same folder, fsync, rename, old one deleted last."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import RunError, is_utf8


def check_output(path: Path, overwrite: bool) -> None:
    """Raises RunError if `path` is a file, a folder with something in it and `overwrite` is False, or no UTF-8."""
    if not is_utf8(str(path.absolute())):  # safetensors writes to no such path
        raise RunError(f"the name of {path.absolute()} is not UTF-8; choose another output folder")
    if path.is_file():
        raise RunError(f"{path} is a file; choose a folder as output")
    if path.is_dir() and not overwrite and not all(_is_litter(entry.name) for entry in path.iterdir()):
        raise RunError(f"{path} is not empty; choose another output folder or pass --overwrite (overwrite=True)")


def _is_litter(name: str) -> bool:
    """Whether nobody misses it: what a killed run leaves before it has written anything, or a file manager anywhere."""
    return name == ".lock" or name in LITTER or _TEMPORARY.fullmatch(name) is not None


# what this package puts into the folders that it replaces as a whole
OWN_FILES = {
    "model.safetensors", "config.json", "README.md", "class_map.txt",
    "model.onnx", "model.onnx.data",  # the latter for weights above 2 GB, ONNX's limit
    "model.pt2", "conversion.json", "training.pt", "manifest.json",
}  # fmt: skip
_RANK = re.compile(r"rank-\d+\.pt")
# as mkdtemp and mkstemp name them here
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[a-z0-9_]{8}")
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


def check_replaceable(path: Path) -> None:
    """Raises RunError if the folder holds a file that this package did not write."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    foreign = sorted(name for name in names - OWN_FILES - LITTER if not _RANK.fullmatch(name))
    if foreign:
        raise RunError(f"{path} holds {foreign[0]}, which overwriting would delete; choose another output folder")


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `path` at the end, or vanishes on an error.

    Raises RunError as `check_output` does, if `overwrite` would delete a file that this package did not write, or if
    the folder cannot be written. Errors of the caller's code that are not of writing there pass as they are.
    """
    path = path.resolve()
    check_output(path, overwrite)
    check_replaceable(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        with writing(path, temporary):
            yield temporary
        with writing(path):
            _open_to_umask(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _fsync(temporary)
            replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns an error of writing into a RunError that says that `path` cannot be written, and why.

    With `temporary`, the file or folder written to, every other error that the block may have passes as it is: one of
    another file, of the network, and so on.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = _as_os_error(error)
        if told is None or (temporary is not None and not _is_of(told, temporary)):
            raise
        if told.errno in _NO_SPACE:
            advice = "free some space or choose another folder"
        elif told.errno in _NOT_ALLOWED:
            advice = "choose an output folder that you may write to"
        else:
            advice = "check the disk or choose another folder"
        raise RunError(f"cannot write {path}: {told.strerror or told}; {advice}") from error


def _as_os_error(error: Exception) -> OSError | None:
    """The operating system's error that safetensors has in its message, and torch.save before its own error."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)(?: at path \"(.*)\")?", str(error))
        return OSError(int(found[1]), os.strerror(int(found[1])), found[2]) if found else None
    cause = error if isinstance(error, OSError) else error.__context__
    return cause if isinstance(cause, OSError) else None


def _is_of(error: OSError, temporary: Path) -> bool:
    """Whether it is about that file or folder; an error of writing to an open file names none."""
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        return Path(os.fsdecode(error.filename)).is_relative_to(temporary)
    return error.errno in (*_NO_SPACE, errno.EROFS, errno.EIO)


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


def remove_directory(path: Path) -> None:
    """Deletes a folder; interrupted, it leaves none of that name that is half deleted."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    path.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Undoes what a process that was killed has left half done in a folder that nobody else writes to.

    A folder that was moved aside, and whose successor had not come yet, is put back; temporary ones are deleted.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not (match := _TEMPORARY.fullmatch(path.name)):
            continue
        final = folder / match["name"]
        if match["kind"] == "old" and path.is_dir() and not final.exists() and any(path.iterdir()):
            path.replace(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def replaced_file(path: Path, binary: bool = False) -> Iterator[Any]:
    """A file to write text or bytes to that takes the place of `path` at the end, or vanishes on an error.

    Raises RunError if it cannot be written.
    """
    with writing(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    temporary = Path(name)
    # a file name that is no UTF-8 has characters that UTF-8 lacks; escaped, they are valid in JSON
    text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with writing(path, temporary):
            with os.fdopen(descriptor, "wb" if binary else "w", **text) as file:
                yield file
        with writing(path):
            _fsync(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically. Raises RunError if it cannot be written."""
    with replaced_file(path) as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")


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
