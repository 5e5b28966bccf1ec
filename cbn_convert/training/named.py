"""Data sets that have a name as timm knows them instead of a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch import Tensor

from ..errors import DataError, first_line
from . import shards
from .images import open_image

Images = tuple[list[tuple[str, int]], list[str], Callable[..., Image.Image | Tensor]]

VALIDATION = ("validation", "val", "valid", "test")  # splits that may serve for validation, the first that is there
_HUB, _SHARDS = "hfds/", "wds/"
_STREAMS = ("hfids/", "tfds/")


def is_name(data: str) -> bool:
    """Whether it is a name as timm has them, not a folder. Raises DataError for a stream."""
    if data.startswith(_STREAMS):
        raise DataError(
            f"{data} is a stream, in which a run cannot go on where it was interrupted; use hfds/NAME, or unpack it "
            "into train/CLASS/* and val/CLASS/*"
        )
    return data.startswith((_HUB, _SHARDS))


def read(name: str, splits: tuple[str, ...]) -> tuple[str, Images]:
    """The first of these splits that is there, names of its images with class indices, classes, what opens an image.

    "hfds/NAME" is read through timm's create_dataset and the package `datasets`, "wds/FOLDER" by an index of its .tar
    files. Raises DataError if that package is not installed, or there is no such data set or split.
    """
    if name.startswith(_SHARDS):
        return shards.read(Path(name.removeprefix(_SHARDS)), splits)
    try:
        import_module("datasets")  # without it timm prints, and raises
    except ImportError:
        raise DataError(f"{name} needs the package datasets; pip install datasets") from None
    absent: Exception | None = None
    for split in splits:
        try:
            return split, _read_hub(name, split)
        except Exception as error:  # whatever the package and its hub raise
            absent = absent or error
            if not (isinstance(error, ValueError) and "Unknown split" in str(error)):
                absent = error
                break
    assert absent is not None
    reason = first_line(absent)
    raise DataError(
        f"the split {splits[0]} of {name} cannot be read ({reason}); check the name, or hold a part of the images out "
        "with --val-fraction 0.2"
    ) from absent


def _read_hub(name: str, split: str) -> Images:
    reader = create_dataset(name, root=None, split=split).reader
    classes = [label for label, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1])]
    labels = [int(label) for label in reader.iter_targets()]
    samples = [(f"{name}/{split}/{number}", label) for number, label in enumerate(labels)]
    return samples, classes, partial(_open, reader)


def _open(reader: Any, name: str, channels: int = 3) -> Image.Image | Tensor:
    file, _ = reader[int(name.rpartition("/")[2])]
    with file:
        return open_image(name, file, channels)
