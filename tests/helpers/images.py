"""Image folders that a test writes."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def write_image(path: Path, color: tuple[int, int, int], noise_seed: int, size: int = 32) -> None:
    """A noisy image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randint(-40, 41, (size, size, 3), generator=generator)
    pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_colors(folder: Path) -> Path:
    """An image folder of two classes that a small network tells apart at once, with train/ and val/."""
    for split, count in (("train", 16), ("val", 6)):
        for label, color in (("blue", (60, 60, 200)), ("red", (200, 60, 60))):
            for i in range(count):
                write_image(folder / split / label / f"{i}.png", color, 1000 * (split == "val") + i)
    return folder
