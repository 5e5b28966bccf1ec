"""Reading image files, whatever they hold, as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError

_SIXTEEN_BIT = 65535 / 255


def open_image(path: str, file: IO[bytes] | None = None) -> Image.Image:
    """Reads an image as RGB: turned as its EXIF data say, on white where it is transparent, 16 bits scaled to 8.

    With `file`, what is open already, `path` is only its name.

    Images of any size are read; the memory for one is 3 bytes a pixel. Raises DataError naming the file if it cannot be
    read or holds floating-point values.
    """
    try:
        with _any_size(), Image.open(path if file is None else file) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise many types, all of them about this file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
        raise DataError(
            f"cannot read the image {path} ({type(error).__name__}: {reason}); repair or remove it, or pass "
            "--skip-bad-images"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
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
    return image.convert("RGB")


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow refuses very large images from strangers; those of a user's own folder are what this package is for."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
