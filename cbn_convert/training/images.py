"""Reading image files, whatever they hold, as 8-bit RGB or in as many channels as a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DataError
from .channels import ARRAY, MODES, read_array, read_planes

_SIXTEEN_BIT = 65535 / 255


def open_image(path: str, file: IO[bytes] | None = None, channels: int = 3) -> Image.Image | Tensor:
    """Reads an image as RGB: turned as its EXIF data say, on white where it is transparent, 16 bits scaled to 8.

    With `file`, what is open already, `path` is only its name. For a model that takes 1 of `channels` it is greyscale,
    for another number a tensor [C, H, W] in [0, 1] of all that the file has, be it RGBA, CMYK, a TIFF with a page for
    each, or an array as in `read_array`.

    Images of any size are read; the memory for one is 3 bytes a pixel. Raises DataError naming the file if it cannot be
    read, holds floating-point values or has another number of channels.
    """
    try:
        if file is None and path.lower().endswith(ARRAY):
            return read_array(path, channels)
        with _any_size(), Image.open(path if file is None else file) as image:
            image.load()
            if channels not in MODES:
                return read_planes(path, image, channels)
            return _rgb(ImageOps.exif_transpose(image), MODES[channels])
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types, all of them about this file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
        remedy = "repair or remove it" if channels in MODES else f"store it as an array in a {ARRAY} file"
        raise DataError(
            f"cannot read the image {path} ({type(error).__name__}: {reason}); {remedy}, or pass --skip-bad-images"
        ) from error


def _rgb(image: Image.Image, mode: str) -> Image.Image:
    """In the mode "RGB", or from there in "L"."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts everything above 255 off
        pixels = np.asarray(image).astype(np.float64)
        if pixels.max(initial=0) > 255 or image.mode != "I":
            pixels = pixels / _SIXTEEN_BIT
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # the colours under transparent pixels are arbitrary
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow refuses very large images from strangers; those of a user's own folder are what this package is for."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
