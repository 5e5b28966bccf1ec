"""Images of one channel, or of more than three, from the files to the exported model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cbn_convert.cli.main import app
from helpers.runs import config
from PIL import Image
from timm.data import create_transform, resolve_input_data_config, resolve_model_data_config
from typer.testing import CliRunner

import cbn_convert as cbn
from cbn_convert.errors import CbnWarning, DataError, ModelError, RunError
from cbn_convert.models import ModelSpec, create_model
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.images import open_image
from cbn_convert.training.loading import batches, plain_loader, training_loader
from cbn_convert.training.splits import Split, read_splits

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 4, 4), dtype=np.uint8)
PIXELS[:3, :, 3] = 0  # colours that are not to be seen


def read(path: Path, channels: int) -> np.ndarray:
    """[C, H, W]"""
    image = open_image(str(path), channels=channels)
    assert isinstance(image, torch.Tensor)
    assert image.dtype == torch.float32
    return image.numpy()


def test_greyscale_is_read_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "grey.png")
    image = open_image(str(tmp_path / "grey.png"), channels=1)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), PIXELS[..., 0])
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "rgb.png")
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(open_image(str(tmp_path / "rgb.png"), channels=1), PIXELS[..., :3] @ weights, atol=1)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "deep.png")
    deep = open_image(str(tmp_path / "deep.png"), channels=1)
    assert np.array_equal(np.asarray(deep), np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(("mode", "name"), [("RGBA", "x.png"), ("RGBA", "x.tif"), ("CMYK", "x.tif")])
def test_four_channels_are_independent(mode: str, name: str, tmp_path: Path) -> None:
    """Colours under transparent pixels are data like others, also when the image is resized."""
    Image.fromarray(PIXELS, mode).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name, 4), PIXELS.transpose(2, 0, 1) / np.float32(255))
    transform = create_transform((4, 3, 2), mean=(0.0,) * 4, std=(1.0,) * 4, crop_pct=1.0, interpolation="bilinear")
    small = transform(open_image(str(tmp_path / name), channels=4))
    for channel in range(4):
        alone = Image.fromarray(PIXELS[..., channel]).resize((2, 3), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(small[channel], np.asarray(alone) / 255, atol=1 / 255)


def test_pages_of_a_tiff_are_channels(tmp_path: Path) -> None:
    pages = RANDOM.integers(0, 65536, (6, 5, 7), dtype=np.uint16)
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(tmp_path / "x.tif", save_all=True, append_images=rest)
    np.testing.assert_allclose(read(tmp_path / "x.tif", 6), pages / 65535, rtol=1e-6)


@pytest.mark.parametrize("order", ["H, W, C", "C, H, W"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float64, np.bool_])
def test_arrays(order: str, dtype: type, tmp_path: Path) -> None:
    values = RANDOM.random((5, 7, 9))
    most = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    stored = (values * most).round().astype(dtype) if most > 1 or dtype == np.bool_ else values.astype(dtype)
    np.save(tmp_path / "x.npy", stored if order == "C, H, W" else stored.transpose(1, 2, 0))
    np.testing.assert_allclose(read(tmp_path / "x.npy", 5), stored.astype(np.float64) / most, rtol=1e-6)
    np.save(tmp_path / "swapped.npy", stored.astype(stored.dtype.newbyteorder(">")))  # as ImageJ writes
    assert np.array_equal(read(tmp_path / "swapped.npy", 5), read(tmp_path / "x.npy", 5))


def test_arrays_for_models_of_one_and_three_channels_are_images(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", PIXELS[:1, :, 0])
    image = open_image(str(tmp_path / "flat.npy"), channels=1)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), PIXELS[:1, :, 0])
    np.save(tmp_path / "rgb.npy", PIXELS[..., :3] / 255)
    image = open_image(str(tmp_path / "rgb.npy"))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), PIXELS[..., :3])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5)), r"x.npy has 1 channel, but the model takes 6; .* --in-chans 1$"),
        (np.zeros((9, 9, 4)), r"x.npy has 4 channels, but the model takes 6; .* --in-chans 4$"),
        (np.zeros((6, 9, 6)), r"may be \[H, W, C\] or \[C, H, W\]"),
        (np.zeros(6), r"shape \(6,\) is no image"),
        (np.zeros((6, 0, 3)), r"shape \(6, 0, 3\) is no image"),
        (np.full((6, 4, 4), 1.5), "floats must lie between 0 and 1"),
        (np.full((6, 4, 4), np.nan), "floats must lie between 0 and 1"),
        (np.zeros((6, 4, 4), dtype=np.int32), "int32 pixels have no known range"),
        (np.array([{}]), "allow_pickle"),
    ],
)
def test_arrays_that_are_no_such_image(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=message) as error:
        open_image(str(tmp_path / "x.npy"), channels=6)
    assert str(tmp_path / "x.npy") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mode", "has"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("LA", 2), ("P", 3)])
def test_files_of_another_number_of_channels(mode: str, has: int, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=rf"x\.png has {has} channels?, but the model takes 5; .* --in-chans {has}$"):
        open_image(str(tmp_path / "x.png"), channels=5)


def write(path: Path, channels: int, level: int, seed: int) -> None:
    """Noise in all channels; its level in the last one tells the classes apart."""
    pixels = np.random.default_rng(seed).integers(0, 80, (32, 32, channels), dtype=np.uint8)
    pixels[..., -1] += np.uint8(level)
    path.parent.mkdir(parents=True, exist_ok=True)
    if channels == 6:
        np.save(path.with_suffix(".npy"), pixels)
    else:
        Image.fromarray(pixels.squeeze(), {1: "L", 4: "RGBA"}[channels]).save(path)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_the_whole_way(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    for split, count in (("train", 16), ("val", 6)):
        for name, level in (("dark", 0), ("light", 170)):
            for i in range(count):
                write(data / split / name / f"{i}.png", channels, level, 1000 * (split == "val") + level + i)
    command = [
        "finetune", data, "-m", "test_resnet", "-o", run, "--in-chans", channels, "--no-pretrained", "--img-size", 32,
        "--mean", 0.2, "--epochs", 2, "--lr", 0.01, "--no-aug", "--workers", 0, "--device", "cpu", "--window", 4,
        "--ema", 0.5, "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["best_top1"] > 90
    # resumed, it is the same network
    resumed = cbn.resume(run, quiet=True)
    assert resumed.best_top1 > 90
    command = ["export", run, "-o", out, "--fold", "conv"] + ["--onnx", "--torch-export"] * (channels == 4)
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 0, result.stderr

    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for about in (resolve_model_data_config(plain), resolve_input_data_config(plain)):
        assert about["input_size"] == (channels, 32, 32)
        assert list(about["mean"]) == [0.2] * channels
        assert len(about["std"]) == channels
    # timm's transform of what a user would open agrees with evaluation
    transform = create_transform(**resolve_model_data_config(plain))
    files = sorted((data / "val").rglob("*.*"))
    images = torch.stack([transform(open_image(str(file), channels=channels)) for file in files])
    hits = (plain(images).argmax(1) == torch.tensor([file.parent.name == "light" for file in files])).float()
    scored = cbn.evaluate(out, str(data), workers=0, device="cpu")
    assert scored.top1 == pytest.approx(100 * float(hits.mean()))
    card = (out / "README.md").read_text()
    assert f"{channels} × 32 × 32" in card
    # and so does timm's reader, called as the card says
    monkeypatch.chdir(tmp_path)
    calls = re.findall(r"`(timm\.data\.create_dataset\(.*?\))`", card)
    assert len(calls) == (channels == 1)
    for call in calls:
        read_by_timm = list(eval(call.replace("DATA", "data"), {"timm": timm, "transform": transform}))
        logits = plain(torch.stack([image for image, _ in read_by_timm]))
        hits = (logits.argmax(1) == torch.tensor([label for _, label in read_by_timm])).float()
        assert scored.top1 == pytest.approx(100 * float(hits.mean()))
    if channels == 4:
        import onnx

        metadata = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
        assert json.loads(metadata["mean"]) == [0.2] * 4
        assert json.loads(metadata["input_size"]) == [4, 32, 32]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_means_are_those_that_timm_resolves(channels: int) -> None:
    spec = ModelSpec("test_resnet", pretrained=False, model_kwargs={"in_chans": channels})
    got = resolve_model_data_config(create_model(spec, 3))
    want = resolve_input_data_config(timm.create_model("test_resnet", in_chans=channels))
    assert got["input_size"] == want["input_size"]
    for key in ("mean", "std"):
        assert got[key] == want[key] * (channels if len(want[key]) == 1 else 1)
        assert len(got[key]) == channels


def test_means_of_another_number() -> None:
    spec = ModelSpec("test_resnet", pretrained=False, model_kwargs={"in_chans": 4}, std=(0.1, 0.2, 0.3))
    with pytest.raises(ModelError, match="std has 3 values, but test_resnet takes images with 4 channels; give one"):
        create_model(spec, 3)


def test_augmentation_of_grey_and_of_many_channels(tmp_path: Path) -> None:
    def loader(channels: int, **changes: object):
        settings = config(tmp_path / str(channels), tmp_path / "run", no_aug=False, random_erasing=0.5, **changes)
        for name in ("a", "b"):
            for i in range(4):
                write(tmp_path / str(channels) / name / f"{i}.png", channels, 0, i)
        split, _ = read_splits(str(tmp_path / str(channels)), 0.25, 0)
        about = {"input_size": (channels, 24, 24), "mean": (0.5,) * channels, "std": (0.2,) * channels}
        return training_loader(split, about, settings)[0]

    for batch in batches(loader(1, auto_augment="rand-m9-mstd0.5")):
        assert batch.images.shape[1:] == (1, 24, 24)
    for channels in (4, 6):
        with pytest.warns(
            CbnWarning, match=rf"images with {channels} channels have no colours .*--color-jitter is left"
        ):
            images = loader(channels)
        assert {batch.images.shape[1:] for batch in batches(images)} == {(channels, 24, 24)}
        loader(channels, color_jitter=0.0)
        with pytest.raises(RunError, match="auto_augment changes colours, which images with"):
            loader(channels, auto_augment="rand-m9-mstd0.5")
        with pytest.raises(RunError, match="color_jitter changes colours"):
            loader(channels, color_jitter=0.2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_that_cannot_be_read_are_left_out(channels: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new({1: "L", 3: "RGB", 4: "RGBA"}[channels], (8, 8)).save(path)
    paths[1].write_bytes(b"junk")
    split = Split([(str(path), 0) for path in paths], ["a"])
    about = {
        "input_size": (channels, 8, 8),
        "interpolation": "bicubic",
        "mean": (0.5,) * channels,
        "std": (0.2,) * channels,
    }
    (batch,) = batches(plain_loader(split, about, 4, 0, skip_bad=True))
    assert batch.labels.tolist() == [0, -100, 0]
    assert batch.images.shape == (3, channels, 8, 8)


def test_inspect_and_convert(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["inspect", "test_resnet", "--in-chans", "4"]).exit_code == 0
    made = ["convert", "test_resnet", "--no-pretrained", "--in-chans", "1", "--mean", "0.5", "-o", f"{tmp_path}/out"]
    assert runner.invoke(app, made).exit_code == 0
    plain = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    assert plain(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)
    assert list(resolve_model_data_config(plain)["mean"]) == [0.5]
    twice = runner.invoke(app, [*made, "--model-kwargs", "in_chans=1", "--overwrite"])
    assert twice.exit_code == 2
    with pytest.raises(RunError, match="in_chans is in model_kwargs, too"):
        FinetuneConfig("d", "m", "o", in_chans=1, model_kwargs={"in_chans": 1}).check()
