"""Trains torchvision's FCOS on a timm backbone with CBN, two images per step, then exports the backbone to plain timm.

    python examples/detection.py                      # about a minute on one CPU core
    python examples/detection.py --norm bn            # the same with BatchNorm, or frozen
    python examples/detection.py --pretrained --backbone resnet50 --device cuda

The images are made here: discs, squares and triangles on noise, new ones in every step. Replace `batches` by a data
loader and `SIZE`, `CLASSES` by its own for a detector of your own; what concerns CBN is in `build` and `main`.
Without pretrained weights the AP is that of 400 steps from scratch, and "frozen" has no statistics worth freezing.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork, box_iou

import cbn_convert as cbn
from cbn_convert.training.norms import apply_norm

SIZE = 128
CLASSES = ("disc", "square", "triangle")
LEVELS = (2, 3, 4)  # timm's features at strides 8, 16 and 32


class Pyramid(nn.Module):
    """A timm backbone under a feature pyramid; images [N, 3, H, W] to one map [N, 64, h, w] per level."""

    out_channels = 64

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps by level."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def build(args: argparse.Namespace) -> FCOS:
    """FCOS on the backbone, whose BatchNorm has become what --norm says; pyramid and head have no BatchNorm."""
    weights = {"pretrained_cfg_overlay": {"file": args.checkpoint}} if args.checkpoint else {}
    pretrained = args.pretrained or args.checkpoint is not None
    body = timm.create_model(args.backbone, pretrained, features_only=True, out_indices=LEVELS, **weights)
    apply_norm(body, args.norm)  # for "cbn" this is cbn.convert(body)
    strides = body.feature_info.reduction()
    return FCOS(
        Pyramid(body),
        num_classes=len(CLASSES),
        head=FCOSHead(Pyramid.out_channels, num_anchors=1, num_classes=len(CLASSES), num_convs=2),
        anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides)),
        min_size=SIZE,
        max_size=SIZE,
    )


def picture(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One to three coloured shapes on noise: an image [3, SIZE, SIZE] with its boxes [n, 4] and labels [n]."""
    image = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=generator)
    count = int(torch.randint(1, 4, (1,), generator=generator))
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    radii = torch.randint(12, 30, (count,), generator=generator)
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]
    boxes = []
    for label, r in zip(labels.tolist(), radii.tolist(), strict=True):
        y, x = torch.randint(r, SIZE - r, (2,), generator=generator).tolist()
        down, right = rows - y, columns - x
        square = (down.abs() <= r) & (right.abs() <= r)
        inside = (down**2 + right**2 <= r**2, square, square & (2 * right.abs() <= down + r))[label]
        image = torch.where(inside, torch.rand(3, 1, 1, generator=generator), image)
        boxes.append([x - r, y - r, x + r + 1, y + r + 1])
    return image.clamp(0, 1), {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels}


def batches(count: int, size: int, seed: int, device: str) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """`count` batches of images and targets, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        pairs = [picture(generator) for _ in range(size)]
        yield [image.to(device) for image, _ in pairs], [{k: v.to(device) for k, v in t.items()} for _, t in pairs]


def train(model: FCOS, args: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    model.train()
    losses = []
    for step, (images, targets) in enumerate(batches(args.steps, args.batch_size, args.seed, args.device), 1):
        parts = model(images, targets)
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # filters under a norm grow without it
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.2f} ({', '.join(f'{k} {v.item():.2f}' for k, v in parts.items())})")
    return losses


@torch.inference_mode()
def average_precision(model: FCOS, count: int, device: str) -> float:
    """Area under precision over recall at IoU 0.5, all classes together, on `count` images never trained on."""
    model.eval()
    found, objects = [], 0
    for images, targets in batches(count, 1, 10**6, device):
        out, target = model(images)[0], targets[0]
        objects += len(target["labels"])
        overlaps = box_iou(out["boxes"], target["boxes"]) * (out["labels"][:, None] == target["labels"])
        for i in out["scores"].argsort(descending=True).tolist():
            best, which = overlaps[i].max(0)
            found.append((float(out["scores"][i]), bool(best >= 0.5)))
            if best >= 0.5:
                overlaps[:, which] = 0  # an object is found once
    if not found:
        return 0.0
    hits = torch.tensor([hit for _, hit in sorted(found, reverse=True)]).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hits).sum() / objects)


def check_export(body: Any, output: Path, device: str) -> float:
    """Writes the backbone for plain timm; returns the largest difference of plain timm's features."""
    cbn.export(body, output, overwrite=True)
    plain = timm.create_model(f"local-dir:{output}", pretrained=True, features_only=True, out_indices=LEVELS)
    images = torch.rand(2, 3, SIZE, SIZE, device=device)
    with torch.inference_mode():
        pairs = zip(body.eval()(images), plain.eval().to(device)(images), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


def main() -> None:
    """Build, train, measure, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mobilenetv2_035", help="any timm model with features_only")
    parser.add_argument("--norm", default="cbn", choices=["cbn", "bn", "frozen"])
    parser.add_argument("--pretrained", action="store_true", help="timm's weights from the hub")
    parser.add_argument("--checkpoint", help="a file of weights for the backbone")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eval-images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("out-detection"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = build(args).to(args.device)
    losses = train(model, args)
    ends = min(10, len(losses))
    print(f"loss, mean of {ends} steps: first {sum(losses[:ends]) / ends:.2f}, last {sum(losses[-ends:]) / ends:.2f}")
    print(f"AP50 on {args.eval_images} new images: {average_precision(model, args.eval_images, args.device):.3f}")
    difference = check_export(model.backbone.body, args.output, args.device)
    print(f"backbone in {args.output}, plain timm's features differ by at most {difference:g}")


if __name__ == "__main__":
    main()
