"""Which files of a folder are images, and which of its folders are classes."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, is_utf8
from .channels import ARRAY
from .images import endings

# where the images may be by which a run is judged, in the order in which they are looked for
VALIDATION = ("val", "valid", "validation", "test")
_SPLITS = {*VALIDATION, "train", "training", "testing", "eval", "evaluation", "dev"}
# what systems, network drives and archives put into any folder, beside what is hidden; in lower case
_SYSTEM = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharesnap", "#recycle", "#snapshot", "~snapshot",
    "$recycle.bin", "found.000", "system volume information", "network trash folder",
    "temporary items", "lost+found", "__macosx", "__pycache__",
}  # fmt: skip
# images that Pillow does not read, at least not as a picture
_FOREIGN = {
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".dcm", ".dicom", ".svg", ".svgz", ".eps", ".ai", ".wmf",
    ".emf", ".xcf", ".kra", ".exr", ".hdr", ".pfm", ".fit", ".fits", ".fts", ".raw", ".dng", ".cr2", ".cr3", ".crw",
    ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".rwl", ".raf", ".pef", ".srw", ".3fr", ".iiq", ".x3f",
}  # fmt: skip
# what lies beside images by the thousand and need not be looked into
_SIDECARS = {".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".npz", ".db"}
_BEGINS_LIKE_AN_IMAGE = re.compile(
    rb"(?s)\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(heic|heix|mif1|avif)|.{128}DICM"
)
_BEGINNING = 132  # bytes


class Found(NamedTuple):
    """Paths of the images below a folder, and of files that look like images but have an ending of none."""

    images: list[str]
    left_out: list[str]


def class_folders(folder: Path) -> list[str]:
    """Names of the subfolders that a person has made, in order.

    Raises DataError if one is not UTF-8, or if two are written alike.
    """
    names: dict[str, str] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_system(entry.name)):
        if not is_utf8(name):
            raise DataError(f"the name of the class folder {folder / name} is not UTF-8; rename it")
        if (other := names.setdefault(composed(name), name)) != name:
            raise DataError(
                f"{folder} has two class folders {composed(name)!r}, {other!a} and {name!a} in Unicode; put "
                "the images of both into one"
            )
    return sorted(names.values())


def composed(name: str) -> str:
    """One form for names that look the same: systems write é as one character or as two."""
    return unicodedata.normalize("NFC", name)


def find_images(folder: Path) -> Found:
    """What is below the folder, links followed, each folder once though links may lead round in a circle.

    Arrays are images where there are no others; beside pictures they are what somebody has made of them. Raises
    DataError if a folder cannot be read.
    """
    readable = endings()
    found, arrays = Found([], []), []
    seen = {os.path.realpath(parent) for parent in folder.parents}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_system(name))
        for name in files:
            if name.startswith("."):
                continue
            path, ending = os.path.join(root, name), os.path.splitext(name)[1].lower()  # noqa: PTH118, PTH122
            if ending in readable:
                found.images.append(path)
            elif ending == ARRAY:
                arrays.append(path)
            elif ending in _FOREIGN or (ending not in _SIDECARS and _looks_like_an_image(path)):
                found.left_out.append(path)
    return Found(sorted(found.images or arrays), sorted(found.left_out))


def _is_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _looks_like_an_image(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            return _BEGINS_LIKE_AN_IMAGE.match(file.read(_BEGINNING)) is not None
    except OSError:
        return False


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename} ({error.strerror}); allow it or remove it") from error


def layout_error(folder: Path, found: dict[str, Found]) -> DataError | None:
    """What is wrong, with the likely way out, if a class has no images of its own but only in folders below."""
    nested = [name for name, files in found.items() if files.images and not _own(folder / name, files)]
    if not nested:
        return None
    if "train" in nested:
        return DataError(f"{folder} has splits where classes should be; give {folder} instead of the folder above it")
    if split := next((name for name in nested if name.lower() in _SPLITS), None):
        return DataError(
            f"{folder / split} looks like a split, not like a class; call the folder of the training images train/ "
            "and that of the validation images val/, or give one of them alone"
        )
    name = nested[0]
    if [other for other in found if found[other].images] == [name]:
        below = _first_with_several(folder / name)
        if folder.name in _SPLITS:
            return DataError(
                f"the classes in {folder} seem to lie deeper, in {below}; move its folders up into {folder}"
            )
        return DataError(f"the images in {folder} seem to lie deeper, in {below}; give that folder instead")
    return DataError(
        f"class folder {folder / name} holds no images of its own, only in folders such as "
        f"{Path(found[name].images[0]).parent}; put the images of each class right into its folder, or give "
        f"{folder / name} if it holds the classes"
    )


def are_splits(classes: list[str]) -> bool:
    """Whether all of these class folders have the names of splits, as where labels are in a table beside them."""
    return all(name.lower() in _SPLITS for name in classes)


def _own(folder: Path, files: Found) -> bool:
    return any(Path(path).parent == folder for path in files.images)


def _first_with_several(folder: Path) -> Path:
    """The first folder on the way down that has images or more than one folder with some."""
    while True:
        found = {name: find_images(folder / name) for name in class_folders(folder)}
        full = [name for name, files in found.items() if files.images]
        if len(full) != 1 or _own(folder / full[0], found[full[0]]):
            return folder
        folder = folder / full[0]
