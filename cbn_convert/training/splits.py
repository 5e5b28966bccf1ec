"""Which images there are, of which classes, and which of them are for training and for validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import CbnWarning, DataError, is_utf8, printable
from . import named
from .folders import VALIDATION, are_splits, class_folders, composed, find_images, layout_error
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

    With train/ and val/ inside, those; without val/ the first of valid/, validation/ and test/ serves, which a warning
    says. Else `val_fraction` of each class, chosen by `seed`, is held out from train/ or from the folder itself. Raises
    DataError if a folder or its images are missing, a class is empty or has its images in folders of its own, there are
    fewer than two classes, or val/ has a class that train/ has not.
    """
    if not is_utf8(data):
        raise DataError(f"the name of {data} is not UTF-8, so that it cannot be stored in a run; rename it")
    if named.is_name(data):
        training = _several(_named_split(data, ("train",)), data)
        if val_fraction is not None:
            return _hold_out(training, val_fraction, seed)
        return training, _named_split(data, named.VALIDATION, training.classes)
    root = _folder(data)
    train, val = root / "train", _validation(root, val_fraction)
    if (root / "val").is_dir() and not train.is_dir():
        raise DataError(f"{root} has val/ but no train/; add the training images as train/CLASS/*.jpg")
    source = train if train.is_dir() else root
    training = _several(read_classes(source), str(source))
    if val is None:
        if val_fraction is None:
            raise DataError(
                f"{root} has no val/ folder; add one, or hold out a part of the images with --val-fraction 0.2"
            )
        return _hold_out(training, val_fraction, seed)
    if val_fraction is not None:
        raise DataError(f"{root} has a {val.name}/ folder, so --val-fraction has no use; leave it out")
    _say_which(root, val)
    validation = read_classes(val, training.classes)
    if shared := _folders(training) & _folders(validation):
        _warn(f"{min(shared)} holds training images and validation images alike, which makes the validation too good")
    return training, validation


def _validation(root: Path, val_fraction: float | None) -> Path | None:
    """The folder of the validation images, if train/ has one beside it.

    Where a part of the training images is held out for it, test/ stays what it is.
    """
    if not (root / "train").is_dir():
        return None
    names = VALIDATION if val_fraction is None else [name for name in VALIDATION if name != "test"]
    return next((root / name for name in names if _may_validate(root / name)), None)


def _may_validate(folder: Path) -> bool:
    """A test/ without class folders, as competitions have it, does not."""
    return folder.is_dir() and (folder.name == "val" or bool(class_folders(folder)))


def _say_which(root: Path, val: Path) -> None:
    if val.name == "test":
        _warn(
            f"{root} has no val/ folder, so test/ serves for validation, and is no test any more of the model that it "
            "chooses; hold out a part of the training images with --val-fraction 0.2 to keep it"
        )
    elif others := [name for name in VALIDATION if name not in (val.name, "test") and _may_validate(root / name)]:
        _warn(f"{root} has {val.name}/ and {others[0]}/; {val.name}/ is taken for validation")
    elif val.name != "val":
        _warn(f"{root} has no val/ folder, so {val.name}/ serves for validation")


def _several(split: Split, where: str) -> Split:
    """The split. Raises DataError if it has no two classes with images, or only such as are splits by their names."""
    classes = [name for name, count in zip(split.classes, split.counts(), strict=True) if count]
    if len(classes) < 2:
        what = f"only one class, {classes[0]!r}, so that there is nothing to tell apart" if classes else "no images"
        raise DataError(f"{where} has {what}; put the images of each class into a folder of its own")
    if are_splits(classes):
        raise DataError(
            f"{where} has splits such as {classes[0]!r} where classes should be; put the images of each class into a "
            "folder of its own, in train/CLASS/ and val/CLASS/"
        )
    return split


def _folders(split: Split) -> set[str]:
    return {os.path.realpath(parent) for parent in {os.path.dirname(path) for path, _ in split.samples}}  # noqa: PTH120


def read_classes(folder: Path, classes: list[str] | None = None) -> Split:
    """Images of one folder with a subfolder per class; `classes` gives the indices, if they are known already.

    Names that look the same are the same, whether é is one character or two. Files that look like images and are not
    read are counted in a warning. Raises DataError as `read_splits` does.
    """
    folder = _folder(str(folder))
    found = {name: find_images(folder / name) for name in class_folders(folder)}
    if not found:
        raise DataError(f"{folder} has no class folders; put the images into {folder}/CLASS/, {_IMAGES}")
    order = classes or list(found)
    indices = {**{composed(name): i for i, name in enumerate(order)}, **{name: i for i, name in enumerate(order)}}
    labels = {name: indices.get(name, indices.get(composed(name), -1)) for name in found}
    if (error := layout_error(folder, found)) is not None:
        raise error
    if unknown := [name for name, label in labels.items() if label < 0]:
        raise DataError(f"{folder} has the class {unknown[0]!r}, which is none of the {len(order)} training classes")
    for name, files in found.items():
        if not files.images:
            but = f" but files such as {files.left_out[0]}, which are not read" if files.left_out else ""
            raise DataError(
                f"class folder {folder / name} holds no images{but}; add some, {_IMAGES}, or remove the folder"
            )
    left_out = [path for files in found.values() for path in files.left_out]
    if left_out:
        count = f"1 file in {folder} is" if len(left_out) == 1 else f"{len(left_out)} files in {folder} are"
        _warn(
            f"{count} not read for an ending that is none of an image's that can be read here, such as {left_out[0]}; "
            "convert to .png or .jpg, or correct the name"
        )
    return Split([(path, label) for name, label in labels.items() for path in found[name].images], order)


def _warn(text: str) -> None:
    warnings.warn(printable(text), CbnWarning, stacklevel=3)


def evaluation_split(data: str, classes: list[str], split: str | None) -> Split:
    """Images to evaluate on: data/`split`, by default the validation images, else `data`, unless it has train/."""
    if named.is_name(data):
        return _named_split(data, named.VALIDATION if split is None else (split,), classes)
    root = _folder(data)
    if split is not None:
        return read_classes(root / split, classes)
    trained = (root / "train").is_dir() and "train" not in classes
    # without train/, a folder with the name of a class is that class
    names = [name for name in VALIDATION if _may_validate(root / name) and (trained or name not in classes)]
    if names:
        if names[0] != "val":
            _warn(f"{root} has no val/ folder, so the evaluation is of {names[0]}/")
        return read_classes(root / names[0], classes)
    if trained:
        raise DataError(f"{root} has train/ but no val/; say which images are meant, such as --split train")
    return read_classes(root, classes)


def test_split(data: str, classes: list[str], val_fraction: float | None) -> Split | None:
    """The images of data/test, for a folder that also has data/train, unless they serve for validation.

    A test/ without class folders, whose labels nobody has, is left out with a warning. `val_fraction` as for
    `read_splits`. Raises DataError if they cannot be read.
    """
    if named.is_name(data) or not all((Path(data) / name).is_dir() for name in ("train", "test")):
        return None
    test = Path(data) / "test"
    if not _may_validate(test):
        _warn(f"{test} has no class folders, so the accuracies are of the validation images")
        return None
    return None if _validation(Path(data), val_fraction) == test else read_classes(test, classes)


def refuse_among_images(output: Path, data: str) -> None:
    """Raises DataError if what is written to `output` would be read as images or classes of the folder `data`."""
    if named.is_name(data):
        return
    root = Path(data).resolve()
    read = [root / name for name in ("train", *VALIDATION)] if (root / "train").is_dir() else [root]
    if any(output.resolve().is_relative_to(folder) for folder in read):
        raise DataError(f"{output} lies among the images of {data}; choose an output folder elsewhere")


def _named_split(data: str, splits: tuple[str, ...], classes: list[str] | None = None) -> Split:
    split, (samples, found, opened) = named.read(data, splits)
    if split not in splits[:1]:
        _warn(f"{data} has no split {splits[0]}, so {split} serves for it")
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
