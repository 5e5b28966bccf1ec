"""Which images there are, of which classes, and which of them are for training and for validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError
from . import named
from .channels import ARRAY
from .images import open_image

_IMAGES = "such as .jpg or .png"


@dataclass(frozen=True)
class Split:
    """Image files with class indices; the indices are those of the training classes in every split."""

    samples: list[tuple[str, int]]
    classes: list[str]
    open: Callable[..., Image.Image | Tensor] = open_image  # of a name, and the number of channels

    def counts(self) -> list[int]:
        """Images of each class."""
        return torch.bincount(
            torch.tensor([label for _, label in self.samples], dtype=torch.long), minlength=len(self.classes)
        ).tolist()


def read_splits(data: str, val_fraction: float | None, seed: int) -> tuple[Split, Split]:
    """Training and validation images of a folder, or of a name as in `named`.

    With train/ and val/ inside, those; else `val_fraction` of each class, chosen by `seed`, is held out from train/ or
    from the folder itself. Raises DataError if a folder or its images are missing, a class is empty, or val/ has a
    class that train/ has not.
    """
    if named.is_name(data):
        training = _named_split(data, "train")
        if val_fraction is not None:
            return _hold_out(training, val_fraction, seed)
        return training, _named_split(data, "validation", training.classes)
    root = _folder(data)
    train, val = root / "train", root / "val"
    if val.is_dir() and not train.is_dir():
        raise DataError(f"{root} has val/ but no train/; add the training images as train/CLASS/*.jpg")
    if val.is_dir():
        if val_fraction is not None:
            raise DataError(f"{root} has a val/ folder, so --val-fraction has no use; leave it out")
        training = read_classes(train)
        return training, read_classes(val, training.classes)
    source = train if train.is_dir() else root
    if val_fraction is None:
        raise DataError(f"{root} has no val/ folder; add one, or hold out a part of the images with --val-fraction 0.2")
    return _hold_out(read_classes(source), val_fraction, seed)


def read_classes(folder: Path, classes: list[str] | None = None) -> Split:
    """Images of one folder with a subfolder per class; `classes` gives the indices, if they are known already."""
    folder = _folder(str(folder))
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{folder} has no class folders; put the images into {folder}/CLASS/, {_IMAGES}")
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise DataError(f"{folder} has the class {unknown[0]!r}, which is none of the {len(classes)} training classes")
    order = classes or found
    samples = []
    for name in found:
        own = [(path, order.index(name)) for path in sorted(_images(folder / name))]
        if not own:
            raise DataError(f"class folder {folder / name} holds no images; add some, {_IMAGES}, or remove the folder")
        samples += own
    return Split(samples, order)


def _images(folder: Path) -> Iterator[str]:
    """Image files below the folder, links followed, each folder once though links may lead round in a circle."""
    seen = {os.path.realpath(parent) for parent in folder.parents}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith((*IMG_EXTENSIONS, ARRAY)) and not name.startswith("."):
                yield str(Path(root, name))


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename} ({error.strerror}); allow it or remove it") from error


def evaluation_split(data: str, classes: list[str], split: str | None) -> Split:
    """Images to evaluate on: data/`split`, by default data/val where it exists, else `data` itself."""
    if named.is_name(data):
        return _named_split(data, split or "validation", classes)
    root = _folder(data)
    if split is not None:
        return read_classes(root / split, classes)
    return read_classes(root / "val" if (root / "val").is_dir() else root, classes)


def test_split(data: str, classes: list[str]) -> Split | None:
    """The images of data/test, for a folder that also has data/train. Raises DataError if they cannot be read."""
    if named.is_name(data) or not all((Path(data) / name).is_dir() for name in ("train", "test")):
        return None
    return read_classes(Path(data) / "test", classes)


def refuse_among_images(output: Path, data: str) -> None:
    """Raises DataError if what is written to `output` would be read as images or classes of the folder `data`."""
    if named.is_name(data):
        return
    root = Path(data).resolve()
    read = [root / name for name in ("train", "val", "test")] if (root / "train").is_dir() else [root]
    if any(output.resolve().is_relative_to(folder) for folder in read):
        raise DataError(f"{output} lies among the images of {data}; choose an output folder elsewhere")


def _named_split(data: str, split: str, classes: list[str] | None = None) -> Split:
    samples, found, opened = named.read(data, split)
    if classes is not None and found != classes[: len(found)]:
        raise DataError(f"{data} has other classes in its split {split} than there are in training")
    return Split(samples, classes or found, opened)


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist; give a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    return folder


def _hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    generator = torch.Generator().manual_seed(seed)
    training, held = [], []
    for label, name in enumerate(split.classes):
        own = [sample for sample in split.samples if sample[1] == label]
        if not own:
            continue  # a data set with a name may have numbers that no image has
        if len(own) == 1:
            raise DataError(
                f"class {name!r} has one image, which cannot be in both parts; add images or remove the class"
            )
        count = min(max(1, round(len(own) * fraction)), len(own) - 1)
        order = torch.randperm(len(own), generator=generator).tolist()
        held += [own[i] for i in order[:count]]
        training += [own[i] for i in order[count:]]
    return replace(split, samples=sorted(training)), replace(split, samples=sorted(held))
