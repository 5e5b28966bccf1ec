"""Images that are no photos: arrays, and files of another number of channels than one or three, as tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .metadata import upright

ARRAY = ".npy"  # what the name of an array ends in
MODES = {1: "L", 3: "RGB"}  # of Pillow's 8-bit images, by the number of channels; others are tensors
_PLANES = {"RGBA", "RGBX", "CMYK", "LA", "La", "RGBa"}  # modes of 8-bit channels side by side


def blank(channels: int) -> Image.Image | Tensor:
    """What stands for an image that cannot be read, where it is counted as none."""
    return Image.new(MODES[channels], (1, 1)) if channels in MODES else torch.zeros(channels, 1, 1)


def read_array(path: str, channels: int) -> Image.Image | Tensor:
    """A numpy file [H, W], [H, W, C] or [C, H, W], as a tensor [C, H, W] in [0, 1], or 8-bit image of 1 or 3 channels.

    Raises DataError if it has another number of channels, ValueError for what is no image.
    """
    array = np.load(path, allow_pickle=False)
    planes = array[None] if array.ndim == 2 else array
    if planes.ndim != 3 or not planes.size:
        raise ValueError(f"an array of shape {array.shape} is no image [H, W, C] or [C, H, W]")
    first, last = planes.shape[0], planes.shape[-1]
    if array.ndim == 3 and first == last == channels:
        raise ValueError(f"an array of shape {array.shape} may be [H, W, C] or [C, H, W]")
    if channels not in (first, last):
        raise _other_channels(path, min(first, last), channels)
    if first != channels:
        planes = planes.transpose(2, 0, 1)
    pixels = _scaled(planes)
    if channels not in MODES:
        return torch.from_numpy(pixels)
    levels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(levels[0] if channels == 1 else levels.transpose(1, 2, 0).copy())


def read_planes(path: str, image: Image.Image, channels: int) -> Tensor:
    """The channels of an open image, or its frames of one channel each, as a tensor [C, H, W] in [0, 1].

    Nothing is made of transparency. Raises DataError if there are more or fewer of them.
    """
    bands = 3 if image.mode == "P" else len(image.getbands())
    frames = getattr(image, "n_frames", 1) if bands == 1 else 1
    if (bands if frames == 1 else frames) != channels or (bands > 1 and image.mode not in _PLANES):
        raise _other_channels(path, bands if frames == 1 else frames, channels)
    planes = []
    for number in range(frames):
        image.seek(number)
        plane = np.asarray(upright(image))
        planes.append(plane.transpose(2, 0, 1) if bands > 1 else plane[None])
    return torch.from_numpy(np.concatenate([_scaled(plane) for plane in planes]))


def _scaled(values: np.ndarray) -> np.ndarray:
    """In [0, 1], as float32. Raises ValueError if the type does not say what 1 is."""
    if values.dtype.newbyteorder("=") in (np.uint8, np.uint16):  # ImageJ writes the other order
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if values.dtype.kind != "f":
        raise ValueError(f"{values.dtype} pixels have no known range; store uint8, uint16, or floats from 0 to 1")
    if not (values.min() >= 0 and values.max() <= 1):  # also where there is a NaN
        raise ValueError(f"floats must lie between 0 and 1, these between {values.min():g} and {values.max():g}")
    return values.astype(np.float32)


def _other_channels(path: str, found: int, channels: int) -> DataError:
    return DataError(
        f"{path} has {found} channel{'s' * (found > 1)}, but the model takes {channels}; convert or remove it, or "
        f"train with --in-chans {found}"
    )
