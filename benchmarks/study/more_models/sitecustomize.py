"""On PYTHONPATH it gives timm networks of the study that have no name there."""

from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from timm.models.convmixer import _create_convmixer
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import Tensor, nn


@register_model
def mobilenetv1_025(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNet V1 of a quarter of the width, as in Pytorch_Retinaface."""
    model = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pretrained=pretrained, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "mobilenetv1_025"}  # as an export names it
    return model


@register_model
def convmixer_96_6(pretrained: bool = False, **kwargs: Any) -> Any:
    """A small ConvMixer, which normalises behind its activations."""
    model = _create_convmixer("convmixer_768_32", pretrained, dim=96, depth=6, kernel_size=7, patch_size=6, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "convmixer_96_6"}
    return model


class _Block(nn.Module):
    """Two 3x3 convs beside a shortcut without weights: every second pixel, and zeros for new channels (option A)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.stride, self.more = (1 if channels == out else 2), out - channels
        self.conv1 = nn.Conv2d(channels, out, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The residual network for 32x32 images of He et al., arXiv 1512.03385, section 4.2; names as in akamaster's."""

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop_rate = num_classes, 64, drop_rate
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (channels, out) in enumerate(((16, 16), (16, 32), (32, 64))):
            stage = [_Block(channels if j == 0 else out, out) for j in range(blocks)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.linear = nn.Linear(64, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> Any:
    """ResNet-56 for CIFAR-10."""
    described = {
        "architecture": "resnet56_cifar", "input_size": (3, 32, 32), "mean": IMAGENET_DEFAULT_MEAN, "crop_pct": 1.0,
        "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic", "first_conv": "conv1", "classifier": "linear",
        "num_classes": 10, "pool_size": (8, 8),
    }  # fmt: skip
    given = kwargs.pop("pretrained_cfg", None) or described
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, pretrained_cfg=given, blocks=9, **kwargs)
