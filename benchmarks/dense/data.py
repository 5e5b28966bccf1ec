"""Photos with what is to be found in them, decoded once and kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# uint8 [3, H, W], with the class of every pixel [H, W], or with {"boxes": [n, 4], "labels": [n]}
Pairs = list[tuple[Tensor, Any]]


def scenes(folder: Path, split: str, size: tuple[int, int]) -> Pairs:
    """CamVid's street scenes of H, W with the class of every pixel."""
    pairs = []
    for path in sorted((folder / split).glob("*.*")):
        (label,) = (folder / f"{split}_labels").glob(f"{path.stem}.*")
        classes = np.asarray(Image.open(label).resize(size[::-1], Image.Resampling.NEAREST))
        pairs.append((_pixels(path, size), torch.tensor(classes)))
    return pairs


def boxes(folder: Path, split: str, size: tuple[int, int]) -> Pairs:
    """Photos of H, W with boxes, of a folder in COCO's format; without boxes that are no pixel wide or high."""
    found = json.loads((folder / f"{split}.json").read_text())
    pairs = []
    for image in found["images"]:
        scale = torch.tensor([size[1] / image["width"], size[0] / image["height"]] * 2)
        own = [a for a in found["annotations"] if a["image_id"] == image["id"]]
        corners = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4) * scale
        corners[:, 2:] += corners[:, :2]
        labels = torch.tensor([a["category_id"] for a in own], dtype=torch.int64)
        large = (corners[:, 2:] - corners[:, :2] >= 1).all(1)
        pixels = _pixels(folder / split / image["file_name"], size)
        pairs.append((pixels, {"boxes": corners[large], "labels": labels[large]}))
    return pairs


def _pixels(path: Path, size: tuple[int, int]) -> Tensor:
    image = Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def flipped(image: Tensor, target: Any) -> tuple[Tensor, Any]:
    """The other way round, left and right."""
    if isinstance(target, Tensor):
        return image.flip(-1), target.flip(-1)
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    return image.flip(-1), {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], 1)}


def batches(pairs: Pairs, batch: int, seed: int) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """Without end: every epoch in another order, each image flipped or not; what depends on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(pairs), generator=generator).split(batch):
            turned = torch.rand(len(chosen), generator=generator) < 0.5
            if len(chosen) == batch:
                some = [
                    flipped(*pairs[i]) if turn else pairs[i]
                    for i, turn in zip(chosen.tolist(), turned.tolist(), strict=True)
                ]
                yield [image for image, _ in some], [target for _, target in some]
