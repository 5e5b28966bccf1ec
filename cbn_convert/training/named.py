"""Data sets that have a name instead of a folder, read through timm's create_dataset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from PIL import Image
from timm.data import create_dataset

from ..errors import DataError
from .images import open_image

_PREFIX = "hfds/"
_STREAMS = ("hfids/", "wds/", "tfds/")


def is_name(data: str) -> bool:
    """Whether it is a name as timm has them, not a folder. Raises DataError for a stream."""
    if data.startswith(_STREAMS):
        raise DataError(
            f"{data} is a stream, in which a run cannot go on where it was interrupted; unpack it into train/CLASS/* "
            "and val/CLASS/*, or use hfds/NAME"
        )
    return data.startswith(_PREFIX)


def read(name: str, split: str) -> tuple[list[tuple[str, int]], list[str], Callable[[str], Image.Image]]:
    """Names of the images with class indices, the classes, and what opens an image of that name.

    Raises DataError if the package `datasets` is not installed, or there is no such data set or split.
    """
    try:
        import_module("datasets")  # without it timm prints, and raises
    except ImportError:
        raise DataError(f"{name} needs the package datasets; pip install datasets") from None
    try:
        reader = create_dataset(name, root=None, split=split).reader
        classes = [label for label, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1])]
        labels = [int(label) for label in reader.iter_targets()]
    except Exception as error:  # whatever the package and its hub raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(
            f"the split {split} of {name} cannot be read ({reason}); check the name, or hold a part of the images out "
            "with --val-fraction 0.2"
        ) from error
    samples = [(f"{name}/{split}/{number}", label) for number, label in enumerate(labels)]
    return samples, classes, partial(_open, reader)


def _open(reader: Any, name: str) -> Image.Image:
    file, _ = reader[int(name.rpartition("/")[2])]
    with file:
        return open_image(name, file)
