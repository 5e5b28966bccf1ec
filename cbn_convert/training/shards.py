"""WebDataset: tar files of images with labels, read by an index instead of as a stream.

timm's reader streams the shards, so that a run cannot go on in the middle of an epoch, and an evaluation by several
processes is not exact. The members of a tar file that is not compressed lie there as they are: their places are noted
once, after which every image is as near as in a folder. Names, `_info.json` and labels are timm's.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError
from .images import open_image

_INFO = ("_info.json", "info.json")
_SPLITS = {"validation": ("validation", "val")}
_LAYOUT = "KEY.jpg and KEY.cls, the latter holding the number of the class"

Member = tuple[str, int, int]  # the shard, and where in it the image begins and how many bytes it has


def read(folder: Path, split: str) -> tuple[list[tuple[str, int]], list[str], partial[Image.Image | Tensor]]:
    """Names of the images with class indices, the classes, and what opens an image of that name.

    The shards are those that `_info.json` lists for the split, as timm has it, or SPLIT-*.tar. Labels are in KEY.cls,
    or in the field of KEY.json that `_info.json` calls the split's alt_label; the classes are named by their numbers.
    Raises DataError if the folder has no such split, or a shard cannot be indexed.
    """
    shards, field = _shards(folder, split)
    members: dict[str, Member] = {}
    samples: list[tuple[str, int]] = []
    for shard, length in shards:
        before = len(samples)
        for key, member, label in _indexed(shard, field):
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
    classes = [str(number) for number in range(max(label for _, label in samples) + 1)]
    return samples, classes, partial(_open, members)


def _shards(folder: Path, split: str) -> tuple[list[tuple[Path, int | None]], str | None]:
    """The shards with the images that each should hold, if that is known, and the field of the labels."""
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist; give wds/FOLDER with a folder of .tar files")
    names = _SPLITS.get(split, (split,))
    info = next((folder / name for name in _INFO if (folder / name).is_file()), None)
    if info is not None:
        try:
            splits: dict[str, Any] = json.loads(info.read_text(encoding="utf-8"))["splits"]
            own = next((splits[name] for name in names if name in splits), None)
            if own is not None:
                lengths = own.get("shard_lengths") or [None] * len(own["filenames"])
                files = [folder / file for file in own["filenames"]]
                return list(zip(files, lengths, strict=True)), own.get("alt_label") or None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{info} is not as timm writes it ({error}); repair or remove it") from error
    for name in names:
        if files := sorted(folder.glob(f"{name}-*.tar")) or sorted(folder.glob(f"{name}.tar")):
            return [(file, None) for file in files], None
    raise DataError(
        f"{folder} has no {names[-1]}-*.tar and no {_INFO[0]} with the split {split}; add them, or hold a part of the "
        "images out with --val-fraction 0.2"
    )


def _indexed(shard: Path, field: str | None) -> Iterator[tuple[str, Member, int]]:
    """Key, place and label of each image of a shard."""
    places: dict[str, Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:  # refuses compressed files, in which a place means nothing
            for item in archive:
                if not item.isfile():
                    continue
                parent, slash, name = item.name.rpartition("/")
                key, _, extension = name.partition(".")
                key, extension = parent + slash + key, extension.lower()
                if f".{extension}" in IMG_EXTENSIONS:
                    places[key] = (str(shard), item.offset_data, item.size)
                elif extension == ("json" if field else "cls"):
                    text = archive.extractfile(item).read()  # type: ignore[union-attr]  # None for what is no file
                    labels[key] = _label(json.loads(text)[field] if field else text, shard, key)
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar file of {_LAYOUT} ({error}); write or fetch it again"
        ) from error
    for key, place in places.items():
        if key not in labels:
            raise DataError(f"{shard} has no label for {key}; each image needs {_LAYOUT}")
        yield key, place, labels[key]


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
