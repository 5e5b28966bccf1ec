"""Image files of every kind become the 8-bit RGB that a viewer shows, or an error that names the file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbn_convert.errors import DataError
from cbn_convert.training.images import open_image

NOISE = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    image = open_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: list[list[int]]) -> np.ndarray:
    return np.repeat(np.array(values)[..., None], 3, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_any_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (9, 5)).save(tmp_path / "x.png")
    image = open_image(str(tmp_path / "x.png"))
    assert (image.mode, image.size) == ("RGB", (9, 5))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(levels).save(path)
    assert Image.open(path).mode == "I;16"
    assert np.array_equal(read(path), grey(np.arange(256).reshape(16, 16).tolist()))
    Image.fromarray(np.array([[0, 100, 200, 386]], dtype=np.uint16)).save(path)  # a dark one is dark, and rounded
    assert np.array_equal(read(path), grey([[0, 0, 1, 2]]))


def test_thirty_two_bits_hold_eight_or_sixteen(tmp_path: Path) -> None:
    for values, expected in (
        ([[0, 7, 255]], [[0, 7, 255]]),
        ([[0, 257 * 99, 65535]], [[0, 99, 255]]),
        ([[-5, 65535, 10**6]], [[0, 255, 255]]),
    ):
        Image.fromarray(np.array(values, dtype=np.int32)).save(tmp_path / "x.tif")
        assert Image.open(tmp_path / "x.tif").mode == "I"
        assert np.array_equal(read(tmp_path / "x.tif"), grey(expected))


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def test_transparent_pixels_are_white_whatever_colour_they_have(tmp_path: Path) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (6, 4), dtype=np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 255
    Image.fromarray(np.dstack([NOISE, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([NOISE[..., 0], alpha]), "LA").save(tmp_path / "la.png")
    for name, colors in (("rgba", NOISE), ("la", NOISE[..., :1].repeat(3, 2))):
        got = read(tmp_path / f"{name}.png")
        np.testing.assert_allclose(got, on_white(colors, alpha), atol=1)
        assert got[0, 0].tolist() == [255, 255, 255]
        assert np.array_equal(got[0, 1], colors[0, 1])


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    table = np.array([[200, 0, 10], [0, 150, 20], [30, 0, 100]], dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(table.tobytes())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "one.png", transparency=1)
    image.save(tmp_path / "one.gif", transparency=1)
    image.save(tmp_path / "levels.png", transparency=bytes([255, 0, 51]))
    assert np.array_equal(read(tmp_path / "plain.png"), table[indices])
    cut = table.copy()
    cut[1] = 255
    assert np.array_equal(read(tmp_path / "one.png"), cut[indices])
    assert np.array_equal(read(tmp_path / "one.gif"), cut[indices])
    mixed = on_white(table, np.array([255, 0, 51]))[indices]
    np.testing.assert_allclose(read(tmp_path / "levels.png"), mixed, atol=1)


def test_one_transparent_colour_of_an_opaque_mode(tmp_path: Path) -> None:
    colors = np.full((2, 2, 3), 9, dtype=np.uint8)
    colors[0, 1] = (1, 2, 3)
    Image.fromarray(colors).save(tmp_path / "x.png", transparency=(1, 2, 3))
    assert read(tmp_path / "x.png").tolist() == [[[9] * 3, [255] * 3], [[9] * 3, [9] * 3]]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:] = (0, 255, 255, 0)  # magenta and yellow: red
    Image.fromarray(inks, "CMYK").save(tmp_path / "x.jpg", quality=100)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    np.testing.assert_allclose(read(tmp_path / "x.jpg"), np.full((16, 16, 3), (255, 0, 0)), atol=3)


# what is stored -> what is seen, from the EXIF standard's words (the 0th row is the visual top, ..)
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read(tmp_path / "x.png"), TURNED[orientation](NOISE))


def test_exif_that_makes_no_sense_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    Image.fromarray(NOISE).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read(tmp_path / "x.png"), NOISE)
    Image.fromarray(NOISE).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(tmp_path / "x.jpg").shape == NOISE.shape


def exif_block(orientation: int) -> bytes:
    """What a camera writes: numbers, texts, fractions, folders for the exposure and for the place."""
    exif = Image.Exif()
    exif.update({0x010F: "Camera", 0x0112: orientation, 0x011A: 72.0, 0x011B: 72.0, 0x0132: "2020:01:01 00:00:00"})
    exif.get_ifd(0x8769).update({0x829A: (1, 100), 0x9003: "2020:01:01 00:00:00", 0x927C: b"maker" * 8})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return exif.tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_costs_no_pixels(suffix: str, tmp_path: Path) -> None:
    """Any damage to the block, with the checksum that a writer of the damaged block would give it."""
    generator = np.random.default_rng(0)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(NOISE).save(path, quality=100, lossless=True)
    pixels = read(path)
    possible = {turn(pixels).tobytes() for turn in TURNED.values()}
    for number in range(400):
        block = bytearray(exif_block(6))
        for place in generator.integers(0, len(block), 1 + number % 6):
            block[place] = generator.choice([0, 1, 255, generator.integers(256)])
        if number % 10 == 0:
            del block[generator.integers(8, len(block)) :]
        Image.fromarray(NOISE).save(path, quality=100, lossless=True, exif=bytes(block))
        assert read(path).tobytes() in possible


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", [b"Exif", b"MM\0*", b"\0\x08", b"\x01\x1a\0\x05"])
def test_the_orientation_of_a_damaged_block_counts(damage: bytes, suffix: str, tmp_path: Path) -> None:
    block = exif_block(6)
    assert block.count(damage) >= 1
    Image.fromarray(NOISE).save(tmp_path / f"x.{suffix}", lossless=True, exif=block.replace(damage, b"\xfe\xfd", 1))
    assert np.array_equal(read(tmp_path / f"x.{suffix}"), TURNED[6](NOISE))


def test_bytes_that_a_disk_has_changed_beside_the_pixels(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(NOISE).save(path, exif=exif_block(6), icc_profile=b"profile" * 9)
        content, whole = path.read_bytes(), read(path)
        begin = content.index(b"Camera")
        for place in range(begin, begin + 60):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
            assert np.array_equal(read(path), whole)
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content.replace(b"IDAT", b"IDBT"))
    with pytest.raises(DataError, match=r"cannot read the image .*x\.png"):
        open_image(str(tmp_path / "x.png"))


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "x.tif") == (200, 0, 0)).all()


def test_images_of_any_size_and_the_limit_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "large.png")
    (tmp_path / "junk.png").write_bytes(b"junk")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "large.png").shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError):
        open_image(str(tmp_path / "junk.png"))
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    "kind", ["truncated.jpg", "truncated.png", "text.jpg", "empty.png", "float.tif", "missing.png"]
)
def test_unreadable_files_are_named_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind.startswith("truncated"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind != "missing.png":
        path.write_text("not an image\nin two lines\n" if kind == "text.jpg" else "")
    if kind == "float.tif":
        Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    with pytest.raises(DataError) as error:
        open_image(str(path))
    message = str(error.value)
    assert message.startswith(f"cannot read the image {path} (")
    assert message.endswith("repair or remove it, or pass --skip-bad-images")
    assert "\n" not in message
    if kind == "float.tif":
        assert "floating-point" in message
