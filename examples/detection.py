"""torchvision's FCOS or Faster R-CNN on a backbone with ImageNet weights, one image per step; then its export.

python examples/detection.py                               # FCOS; --norm bn or frozen to compare
python examples/detection.py --detector faster_rcnn

The one line converts the backbone, behind its weights and before the optimizer. For a backbone whose BatchNorm is
frozen already, as in torchvision's own detectors and in detectron2, see frozen_backbone.py.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from typing import Any

import torch
from cells import CLASSES, average_precision, cells
from common import arguments, network, say
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import cbn_convert as cbn

STRIDES = (8, 16, 32)


class Pyramid(nn.Module):
    """A timm backbone under a feature pyramid, neither of which torchvision needs to know."""

    out_channels = 64

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """One map for each level."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def detector(kind: str, body: Any) -> nn.Module:
    """On the backbone; pyramid and heads have no BatchNorm."""
    sizes: dict[str, Any] = {"min_size": 240, "max_size": 320, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind == "fcos":
        anchors = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 3)
        return FCOS(Pyramid(body), num_classes=CLASSES, anchor_generator=anchors, **sizes)
    anchors = AnchorGenerator(tuple((3 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(Pyramid(body), num_classes=CLASSES, rpn_anchor_generator=anchors, **sizes)


def train(model: nn.Module, args: Any) -> nn.Module:
    """As it is with BatchNorm."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    pairs = cells(args, "train")
    for step in range(args.steps):
        image, target = pairs[step % len(pairs)]
        sum(model.train()([image], [target]).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


if __name__ == "__main__":
    args = arguments(__doc__, steps=250, lr=0.01, detector="fcos", images=87)
    body = network(args, features_only=True, out_indices=(2, 3, 4))
    if args.norm == "cbn":
        print(cbn.convert(body).summary())  # the one line
    model = train(detector(args.detector, body), args)
    if args.norm == "cbn":
        with tempfile.TemporaryDirectory() as folder:
            cbn.export(body, folder, overwrite=True)  # plain timm loads it, with features_only=True too
    say(args, "AP50 [%]", average_precision(model, cells(args, "val")[: args.images]), f"{args.images} photos of cells")
