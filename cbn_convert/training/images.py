"""Reading image files, whatever they hold, as 8-bit RGB or in as many channels as a model takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .channels import ARRAY, MODES, read_array, read_planes
from .metadata import upright, without_metadata

_SIXTEEN_BIT = 65535 / 255
# formats that Pillow only recognizes, or that hold drawings, measurements, films, or (.pcd) mostly clouds of points
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "WMF"}


def endings() -> set[str]:
    """Endings, in lower case and with their dot, of the files that `open_image` reads; Pillow's plugins count."""
    kinds = Image.registered_extensions()
    pictures = {ending for ending, kind in kinds.items() if kind in Image.OPEN and kind not in _NO_PICTURES}
    return (pictures | {".mpo"}) - {".pfm"}  # the latter's floating-point values have no known range


def open_image(path: str, file: IO[bytes] | None = None, channels: int = 3) -> Image.Image | Tensor:
    """Reads an image as RGB: turned as its EXIF data say, on white where it is transparent, 16 bits scaled to 8.

    With `file`, what is open already, `path` is only its name. For a model that takes 1 of `channels` it is greyscale,
    for another number a tensor [C, H, W] in [0, 1] of all that the file has, be it RGBA, CMYK, a TIFF with a page for
    each, or an array as in `read_array`.

    Images of any size are read; the memory for one is 3 bytes a pixel. Metadata may be damaged. Raises DataError naming
    the file if its pixels cannot be read, are floating-point values or have another number of channels.
    """
    try:
        if file is None and path.lower().endswith(ARRAY):
            return read_array(path, channels)
        with _any_size():
            return _read(path, file, channels)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types, all of them about this file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no details"
        remedy = "repair or remove it" if channels in MODES else f"store it as an array in a {ARRAY} file"
        raise DataError(
            f"cannot read the image {path} ({type(error).__name__}: {reason}); {remedy}, or pass --skip-bad-images"
        ) from error


def _read(path: str, file: IO[bytes] | None, channels: int) -> Image.Image | Tensor:
    try:
        with Image.open(path if file is None else file) as image:
            return _pixels(path, image, channels, image.info.get("exif", b""))
    except DataError:
        raise
    except Exception:
        if file is None:
            content = Path(path).read_bytes()
        else:
            file.seek(0)
            content = file.read()
        if (bare := without_metadata(content)) is None:
            raise
        try:
            with Image.open(BytesIO(bare.content)) as image:
                return _pixels(path, image, channels, bare.exif)
        except Exception:
            pass  # it is the pixels that are damaged
        raise


def _pixels(path: str, image: Image.Image, channels: int, exif: bytes) -> Image.Image | Tensor:
    """Those of an open image; `exif`: the block of its metadata."""
    image.load()
    return read_planes(path, image, channels) if channels not in MODES else _rgb(upright(image, exif), MODES[channels])


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
