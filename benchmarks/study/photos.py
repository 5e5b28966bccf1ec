"""Photos of ../shared/data in memory, and the network with ImageNet weights that is trained on them."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

from cbn_convert.classifier import reset_head


def images(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """All images of a folder of classes, uint8 [N, C, H, W], with a margin for crops of a size, and labels."""
    larger = size * 9 // 8
    load = transforms.Compose([transforms.Resize(larger), transforms.CenterCrop(larger), transforms.PILToTensor()])
    pairs = list(ImageFolder(folder, load))
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def crops(x: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Crops, random with a generator and central without, scaled to -1 .. 1."""
    margin = x.shape[-1] - size
    corners = torch.full((len(x), 2), margin // 2)
    if generator is not None:
        corners = torch.randint(margin + 1, (len(x), 2), generator=generator)
    cut = [im[:, i : i + size, j : j + size] for im, (i, j) in zip(x, corners.tolist(), strict=True)]
    return torch.stack(cut).float() / 127.5 - 1


def mobilenet(data: Path) -> nn.Module:
    """MobileNetV2-0.35 with its ImageNet weights and a new head of ten classes."""
    model = timm.create_model("mobilenetv2_035", num_classes=10, pad_type="same")
    model.load_state_dict(load_file(data / "weights" / "mobilenetv2_035_keras.timm.safetensors"), strict=False)
    reset_head(model)
    return model
