"""timm's transform of an evaluation, without gigabytes on its way where an image is extremely long or wide."""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio, str_to_pil_interp
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize

LARGE = 2**24  # pixels of a resized image up to which, or to four times those of a square one, it is made as a whole


class PlainTransform:
    """What timm makes of an image in an evaluation: resized, cropped in the middle, normalized.

    timm resizes by the shorter side, so that a strip of 60,000 x 40 pixels becomes one of 384,000 x 256, of which all
    but 224 x 224 is thrown away. Of such an image only what stays is computed, to the same values but for rounding.
    """

    def __init__(self, data_config: dict[str, Any]) -> None:
        self.steps = create_transform(**data_config, is_training=False).transforms
        self.filter = str_to_pil_interp(data_config["interpolation"])

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """The image as a tensor [C, H, W]; one that is a tensor in [0, 1] goes all of timm's way."""
        if isinstance(image, Tensor):
            return Compose(self.steps)(image)
        resize, crop, *rest = self.steps
        height, width = self._resized(resize, image)
        if not (height and width):  # kept whole, it would be thinner than a pixel
            return Compose([crop, *rest])(image.resize((max(1, width), max(1, height)), self.filter))
        if isinstance(crop, CenterCrop) and height * width > max(LARGE, 4 * min(height, width) ** 2):
            tall, wide = crop.size
            if tall <= height and wide <= width:
                return Compose(rest)(self._middle(image, (height, width), (tall, wide)))
        return Compose(self.steps)(image)

    def _resized(self, resize: Any, image: Image.Image) -> tuple[int, int]:
        """Height and width that timm's first step gives the image."""
        if isinstance(resize, ResizeKeepRatio):
            height, width = resize.get_params(image, resize.size, resize.longest)
        elif isinstance(resize, Resize) and isinstance(resize.size, int):
            short = min(image.size)
            width, height = (int(resize.size * side / short) for side in image.size)
        else:
            height, width = resize.size
        return height, width

    def _middle(self, image: Image.Image, resized: tuple[int, int], crop: tuple[int, int]) -> Image.Image:
        """What the crop leaves of the resized image."""
        top, left = (round((whole - part) / 2) for whole, part in zip(resized, crop, strict=True))
        down, across = image.height / resized[0], image.width / resized[1]
        box = (left * across, top * down, (left + crop[1]) * across, (top + crop[0]) * down)
        return image.resize(crop[::-1], self.filter, box)
