"""What is trained: networks of smp and torchvision on EfficientNet-Lite0 with its ImageNet weights.

Encoder and new layers are two parts of a `root` module, which holds every norm that a treatment is about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from . import data, metrics

WEIGHTS = "weights/tf_efficientnet_lite0_imagenet.timm.safetensors"
MEAN, STD = 127 / 255, 128 / 255
HEAD_OF_CLASSIFIER = ("conv_head.", "bn2.", "classifier.")
AT_ONCE = 8  # images of an evaluation


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        kind: of the network.
        folder: of the data, in --data.
        size: H, W that images are brought to.
        images: that a run sees, whatever its batch size.
        rate: where the search of learning rates begins, at two images per step.
        metric: by which rates are chosen, on the validation split.
        classes: without background, or the class that is to be ignored.
    """

    kind: str
    folder: str
    size: tuple[int, int]
    images: int
    rate: float
    metric: str
    classes: int

    encoder = ""  # the name of the pretrained part in `root`

    def pairs(self, root: Path, split: str) -> data.Pairs:
        """All images of a split."""
        raise NotImplementedError

    def build(self, weights: dict[str, Tensor]) -> nn.Module:
        """The network, its encoder with these weights."""
        raise NotImplementedError

    def root(self, model: nn.Module) -> nn.Module:
        """The part of it that holds encoder and new norms, and takes images [N, 3, H, W]."""
        return model

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
        """Of a batch of uint8 images."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, pairs: data.Pairs) -> dict[str, float]:
        """The metrics of a split, in percent."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """As JSON has them."""
        return {**asdict(self), "size": list(self.size)}


class Segmentation(Task):
    """smp's Unet or DeepLabV3Plus."""

    encoder = "encoder"

    def pairs(self, root: Path, split: str) -> data.Pairs:
        return data.scenes(root / self.folder, split, self.size)

    def build(self, weights: dict[str, Tensor]) -> nn.Module:
        import segmentation_models_pytorch as smp

        options = {"encoder_weights": None, "classes": self.classes}
        model = getattr(smp, self.kind)("tu-tf_efficientnet_lite0", **options)
        load(model.encoder.model, weights)
        return model

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
        wanted = torch.stack(targets).long()
        return F.cross_entropy(model(scaled(images)), wanted, ignore_index=self.classes)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, pairs: data.Pairs) -> dict[str, float]:
        model.eval()
        counts = metrics.Confusion(self.classes)
        for first in range(0, len(pairs), AT_ONCE):
            images, targets = zip(*pairs[first : first + AT_ONCE], strict=True)
            counts.add(model(scaled(images)).argmax(1), torch.stack(targets))
        return {"miou": counts.mean_iou(), "pixels": counts.accuracy()}


class Pyramid(nn.Module):
    """A backbone under a feature pyramid with BatchNorm."""

    def __init__(self, body: Any, channels: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = body
        self.out_channels = channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """One map for each level."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


class Detection(Task):
    """torchvision's FCOS or FasterRCNN on three levels."""

    encoder = "body"
    strides = (8, 16, 32)
    channels = 64

    def pairs(self, root: Path, split: str) -> data.Pairs:
        return data.boxes(root / self.folder, split, self.size)

    def build(self, weights: dict[str, Tensor]) -> nn.Module:
        from torchvision.models import detection
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        body = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4))
        load(body, weights)
        options: dict[str, Any] = {
            "min_size": min(self.size), "max_size": max(self.size), "image_mean": [MEAN] * 3, "image_std": [STD] * 3
        }  # fmt: skip
        pyramid, classes = Pyramid(body, self.channels), self.classes + 1
        if self.kind == "FCOS":
            anchors = AnchorGenerator(tuple((s,) for s in self.strides), ((1.0,),) * 3)
            return detection.FCOS(pyramid, classes, anchor_generator=anchors, **options)
        # fewer proposals and a narrower head than for COCO, since these are small images on a CPU
        anchors = AnchorGenerator(tuple((3 * s,) for s in self.strides), ((0.5, 1.0, 2.0),) * 3)
        proposals = {"pre": (1000, 300), "post": (500, 150)}
        options |= {
            f"rpn_{when}_nms_top_n_{mode}": n
            for when, both in proposals.items()
            for mode, n in zip(("train", "test"), both, strict=True)
        }
        return detection.FasterRCNN(
            pyramid, rpn_anchor_generator=anchors, box_batch_size_per_image=128,
            box_head=detection.faster_rcnn.TwoMLPHead(49 * self.channels, 256),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(256, classes), **options,
        )  # fmt: skip

    def root(self, model: Any) -> nn.Module:
        return model.backbone

    def loss(self, model: nn.Module, images: list[Tensor], targets: list[Any]) -> Tensor:
        return torch.stack(list(model([image / 255 for image in images], targets).values())).sum()

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, pairs: data.Pairs) -> dict[str, float]:
        model.eval()
        found = [one for image, _ in pairs for one in model([image / 255])]
        return metrics.coco(found, [target for _, target in pairs])


def scaled(images: Iterable[Tensor]) -> Tensor:
    """uint8 images as the encoder's weights take them."""
    return (torch.stack(tuple(images)) / 255 - MEAN) / STD


def load(encoder: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads the weights of a classifier into its features; raises RuntimeError unless all find their place."""
    own = encoder.state_dict()
    encoder.load_state_dict({k: v for k, v in weights.items() if k in own or not k.startswith(HEAD_OF_CLASSIFIER)})


def pretrained(root: Path) -> dict[str, Tensor]:
    """The weights with which every encoder starts."""
    return load_file(root / WEIGHTS)


TASKS: dict[str, Task] = {
    "camvid-unet": Segmentation("Unet", "camvid", (160, 224), 600, 0.03, "miou", 11),
    "camvid-deeplab": Segmentation("DeepLabV3Plus", "camvid", (160, 224), 600, 0.03, "miou", 11),
    "bccd-fcos": Detection("FCOS", "bccd", (240, 320), 500, 0.03, "map", 3),
    "bccd-fcos-long": Detection("FCOS", "bccd", (240, 320), 1500, 0.03, "map", 3),
    "neu-fcos": Detection("FCOS", "neu_det", (224, 224), 6000, 0.03, "map", 6),
    "bccd-faster-rcnn": Detection("FasterRCNN", "bccd", (240, 320), 500, 0.03, "map", 3),
    "bccd-faster-rcnn-long": Detection("FasterRCNN", "bccd", (240, 320), 1500, 0.03, "map", 3),
}
