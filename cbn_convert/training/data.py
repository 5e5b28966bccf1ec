"""Image folders: classes, splits, transforms and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError

_IMAGES = "such as .jpg or .png"


@dataclass(frozen=True)
class Split:
    """Image files with class indices; the indices are those of the training classes in every split."""

    samples: list[tuple[str, int]]
    classes: list[str]


def open_image(path: str) -> Image.Image:
    """Reads an image as RGB. Raises DataError naming the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types, all of them about this file
        raise DataError(
            f"cannot read the image {path} ({type(error).__name__}: {error}); repair or remove it"
        ) from error


class ImageList(Dataset[Any]):
    """A split with a transform."""

    def __init__(self, split: Split, transform: Any) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.split.samples[index]
        return self.transform(open_image(path)), label


def read_splits(data: str, val_fraction: float | None, seed: int) -> tuple[Split, Split]:
    """Training and validation images of a folder.

    With train/ and val/ inside, those; else `val_fraction` of each class, chosen by `seed`, is held out from train/ or
    from the folder itself. Raises DataError if a folder or its images are missing, a class is empty, or val/ has a
    class that train/ has not.
    """
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
    mapping = {name: i for i, name in enumerate(order)}
    samples = ImageFolder.make_dataset(
        str(folder), {name: mapping[name] for name in found}, extensions=IMG_EXTENSIONS, allow_empty=True
    )
    samples = [sample for sample in samples if not Path(sample[0]).name.startswith(".")]
    present = {label for _, label in samples}
    if empty := [name for name in found if mapping[name] not in present]:
        raise DataError(f"class folder {folder / empty[0]} holds no images; add some, {_IMAGES}, or remove the folder")
    return Split(samples, order)


def evaluation_split(data: str, classes: list[str], split: str | None) -> Split:
    """Images to evaluate on: data/`split`, by default data/val where it exists, else `data` itself."""
    root = _folder(data)
    if split is not None:
        return read_classes(root / split, classes)
    return read_classes(root / "val" if (root / "val").is_dir() else root, classes)


def make_loader(
    split: Split,
    data_config: dict[str, Any],
    batch_size: int,
    workers: int,
    *,
    training: bool = False,
    augment: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Loader with timm's transforms for `data_config`; in training it shuffles and drops an incomplete last batch."""
    transform = create_transform(**data_config, is_training=training and augment)
    return DataLoader(
        ImageList(split, transform),
        batch_size=batch_size,
        shuffle=training,
        drop_last=training and len(split.samples) >= batch_size,
        num_workers=workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )


def batches(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates; an error about an image arrives as one sentence even from a worker process."""
    try:
        yield from loader
    except DataError as error:
        # a worker wraps the message into its traceback
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from error


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
        if len(own) < 2:
            raise DataError(
                f"class {name!r} has one image, which cannot be in both parts; add images or remove the class"
            )
        count = min(max(1, round(len(own) * fraction)), len(own) - 1)
        order = torch.randperm(len(own), generator=generator).tolist()
        held += [own[i] for i in order[:count]]
        training += [own[i] for i in order[count:]]
    return Split(sorted(training), split.classes), Split(sorted(held), split.classes)
