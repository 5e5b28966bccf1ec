"""Images of any shape become what timm makes of them, without gigabytes on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from cbn_convert.training import transforms
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.loading import training_loader
from cbn_convert.training.splits import Split
from cbn_convert.training.transforms import PlainTransform

WAYS: list[dict[str, Any]] = [
    {}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": (3, 96, 160)}, {"interpolation": "bilinear"},
    {"input_size": (3, 96, 160), "crop_mode": "border"}, {"crop_pct": 1.0},
]  # fmt: skip


def settings(way: dict[str, Any]) -> dict[str, Any]:
    return {**resolve_data_config({"img_size": 128}), **way}


def smooth(width: int, height: int) -> Image.Image:
    """A photo-like image: without overshoots at edges, which Pillow cuts off after each of its two passes."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 256, (max(1, height // 4), max(1, width // 4), 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(few.numpy()).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size", [(300, 301), (64, 48), (2000, 40), (40, 2001), (7, 900)])
def test_ordinary_images_are_those_of_timm_and_long_ones_but_for_rounding(
    way: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, wanted = smooth(*size), create_transform(**settings(way), is_training=False)
    assert torch.equal(PlainTransform(settings(way))(image), wanted(image))
    monkeypatch.setattr(transforms, "LARGE", 0)
    levels = (
        (PlainTransform(settings(way))(image) - wanted(image)).abs()
        * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        * 255
    )
    assert levels.max() < 2.1


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size", [(60_000, 40), (40, 60_000), (30_000, 1)])
@pytest.mark.parametrize("no_aug", [True, False])
def test_a_long_image_is_never_much_larger_than_it_was(
    way: dict[str, Any], size: tuple[int, int], no_aug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, new: tuple[int, int], *more: Any, **named: Any) -> Image.Image:
        made.append(new[0] * new[1])
        return resize(self, new, *more, **named)

    monkeypatch.setattr(Image.Image, "resize", spy)
    split = Split([("x", 0), ("x", 1)], ["a", "b"], open=lambda path, channels: Image.new("RGB", size, (200, 100, 50)))
    config = FinetuneConfig("d", "m", "o", batch_size=2, workers=0, no_aug=no_aug)
    data_config = settings(way)
    loader, _ = training_loader(split, data_config, config)
    (batch,) = list(loader)
    assert tuple(batch.images.shape[1:]) == data_config["input_size"]
    assert max(made) <= 2 * 128 * 160
