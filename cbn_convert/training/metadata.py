"""What surrounds the pixels of an image, and may be damaged where they are not."""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_JPEG = b"\xff\xd8"
_JPEG_SCAN = 0xDA
# APP1 to APP15 and comments, but for Adobe's APP14, which says what the colours are
_JPEG_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}


class Bare(NamedTuple):
    """A file without its metadata, and the EXIF block that it had."""

    content: bytes
    exif: bytes


def upright(image: Image.Image, exif: bytes = b"") -> Image.Image:
    """The image turned as its EXIF or XMP data say, as far as these can be read; `exif`: a block that it has lost.

    Pillow's exif_transpose would also write the block anew, which fails if anything in it is damaged.
    """
    try:
        tags = image.getexif()
        orientation, readable = tags.get(ExifTags.Base.Orientation), len(tags) > 0
    except Exception:  # of many types
        readable = False
    if not readable:
        orientation = _orientation(exif or image.info.get("exif", b""))
    turn = _TURNS.get(orientation or 0)
    return image if turn is None else image.transpose(turn)


def _orientation(exif: bytes) -> int:
    """The orientation in a damaged block, wherever its entry stands; 0 if there is none."""
    for order in "<>":
        entry = struct.pack(f"{order}HHI", ExifTags.Base.Orientation, 3, 1)  # one short number
        place = exif.find(entry)
        if 0 <= place <= len(exif) - len(entry) - 2:
            return int(struct.unpack_from(f"{order}H", exif, place + len(entry))[0])
    return 0


def without_metadata(content: bytes) -> Bare | None:
    """The same JPEG or PNG file with nothing but what the pixels need; None for another file, or without pixels."""
    if content.startswith(_JPEG):
        return _bare_jpeg(content)
    return _bare_png(content) if content.startswith(_PNG) else None


def _bare_jpeg(content: bytes) -> Bare | None:
    kept, exif, place = [_JPEG], b"", len(_JPEG)
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == _JPEG_SCAN:
            return Bare(b"".join([*kept, content[place:]]), exif)
        segment = content[place : place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
        elif segment[4:].startswith(b"Exif"):
            exif = segment[4:]
        place += len(segment)
    return None


def _bare_png(content: bytes) -> Bare:
    kept, exif, place = [_PNG], b"", len(_PNG)
    while place < len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        chunk = content[place : place + 12 + size]
        if kind in _PNG_PIXELS:
            kept.append(chunk)
        elif kind == b"eXIf":
            exif = chunk[8:-4]
        place += len(chunk)
    return Bare(b"".join(kept), exif)
