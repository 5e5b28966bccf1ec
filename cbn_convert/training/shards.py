"""WebDataset: tar files of images with labels, read by an index instead of as a stream.

timm's reader streams the shards, so that a run cannot go on in the middle of an epoch, and an evaluation by several
processes is not exact. The members of a tar file that is not compressed lie there as they are: their places are noted
once, after which every image is as near as in a folder. Names, `_info.json` and labels are timm's.
"""

from __future__ import annotations

import json
import tarfile
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import CbnWarning, DataError, printable
from .images import endings, open_image

_INFO = ("_info.json", "info.json")
_ALIASES = {"validation": ("validation", "val")}
_ORDER = ("jpg", "png", "webp")  # in which timm takes the image of a key that has several
_LAYOUT = "KEY.jpg and KEY.cls, the latter holding the number of the class"

Member = tuple[str, int, int]  # the shard, and where in it the image begins and how many bytes it has


Images = tuple[list[tuple[str, int]], list[str], partial[Image.Image | Tensor]]


def read(folder: Path, splits: tuple[str, ...]) -> tuple[str, Images]:
    """The first of these splits that is there, names of its images with class indices, classes, what opens an image.

    The shards are those that `_info.json` lists for the split, as timm has it, or SPLIT-*.tar. Labels are in KEY.cls,
    or in the field of KEY.json that `_info.json` calls the split's alt_label; the classes are named by their numbers.
    Raises DataError if the folder has no such split, or a shard cannot be indexed.
    """
    split, shards, field = _shards(folder, splits)
    members: dict[str, Member] = {}
    samples: list[tuple[str, int]] = []
    left_out: list[str] = []
    for shard, length in shards:
        before = len(samples)
        found, unseen = _indexed(shard, field)
        left_out += unseen
        for key, member, label in found:
            name = f"{shard}/{key}"
            members[name] = member
            samples.append((name, label))
        if length is not None and len(samples) - before != length:
            raise DataError(
                f"{shard} holds {len(samples) - before} images, but {folder}/{_INFO[0]} says {length}; fetch the file "
                "again or correct the number"
            )
    if not samples:
        raise DataError(f"the shards of {split} in {folder} hold no images; they should hold {_LAYOUT}")
    if left_out:
        text = f"{len(left_out)} labels of {split} in {folder} belong to no image that can be read here, such as "
        warnings.warn(printable(f"{text}{left_out[0]}; convert the images to .png or .jpg"), CbnWarning, stacklevel=2)
    classes = [str(number) for number in range(max(label for _, label in samples) + 1)]
    return split, (samples, classes, partial(_open, members))


def _shards(folder: Path, splits: tuple[str, ...]) -> tuple[str, list[tuple[Path, int | None]], str | None]:
    """The split, its shards with the images that each should hold, if that is known, and the field of the labels."""
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist; give wds/FOLDER with a folder of .tar files")
    names = [(split, name) for split in splits for name in _ALIASES.get(split, (split,))]
    info = next((folder / name for name in _INFO if (folder / name).is_file()), None)
    if info is not None:
        try:
            listed: dict[str, Any] = json.loads(info.read_text(encoding="utf-8"))["splits"]
            for split, name in names:
                if (own := listed.get(name)) is not None:
                    lengths = own.get("shard_lengths") or [None] * len(own["filenames"])
                    files = [folder / file for file in own["filenames"]]
                    return split, list(zip(files, lengths, strict=True)), own.get("alt_label") or None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{info} is not as timm writes it ({error}); repair or remove it") from error
    for split, name in names:
        if files := sorted(folder.glob(f"{name}-*.tar")) or sorted(folder.glob(f"{name}.tar")):
            return split, [(file, None) for file in files], None
    short = _ALIASES.get(splits[0], splits)[-1]
    raise DataError(
        f"{folder} has no {short}-*.tar and no {_INFO[0]} with the split {splits[0]}; add them, or hold a part of the "
        "images out with --val-fraction 0.2"
    )


def _indexed(shard: Path, field: str | None) -> tuple[list[tuple[str, Member, int]], list[str]]:
    """Key, place and label of each image of a shard, and the keys that have a label but no image."""
    readable = endings()
    places: dict[str, tuple[int, Member]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:  # refuses compressed files, in which a place means nothing
            for item in archive:
                if not item.isfile():
                    continue
                parent, slash, name = item.name.rpartition("/")
                key, _, extension = name.partition(".")
                key, extension = parent + slash + key, extension.lower()
                if f".{extension}" in readable:
                    rank = _ORDER.index(extension) if extension in _ORDER else len(_ORDER)
                    if key not in places or rank < places[key][0]:
                        places[key] = (rank, (str(shard), item.offset_data, item.size))
                elif extension == ("json" if field else "cls"):
                    text = archive.extractfile(item).read()  # type: ignore[union-attr]  # None for what is no file
                    labels[key] = _label(json.loads(text)[field] if field else text, shard, key)
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar file of {_LAYOUT} ({error}); write or fetch it again"
        ) from error
    if missing := [key for key in places if key not in labels]:
        raise DataError(f"{shard} has no label for {missing[0]}; each image needs {_LAYOUT}")
    found = [(key, place, labels[key]) for key, (_, place) in places.items()]
    return found, [f"{shard}/{key}" for key in labels if key not in places]


def _label(value: Any, shard: Path, key: str) -> int:
    label = int(value)
    if label < 0:
        raise DataError(f"{shard} gives {key} the class {label}; classes are numbered from 0")
    return label


def _open(members: dict[str, Member], name: str, channels: int = 3) -> Image.Image | Tensor:
    shard, start, size = members[name]
    try:
        with Path(shard).open("rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise DataError(
            f"cannot read {shard} ({error.strerror}); the folder must not change while a run lasts"
        ) from error
    return open_image(name, BytesIO(content), channels)
