"""Photos of blood cells with boxes, for the detectors among the recipes, and how well they are found."""

from __future__ import annotations

import json
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_tensor

CLASSES = 4  # background, red cells, white cells, platelets


def cells(args: Any, split: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images [3, 240, 320] with boxes and labels, of a folder in COCO's format."""
    found = json.loads((args.data / f"bccd/{split}.json").read_text())
    pairs = []
    for image in found["images"]:
        own = [a for a in found["annotations"] if a["image_id"] == image["id"] and min(a["bbox"][2:]) > 1]
        boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4) / 2
        boxes[:, 2:] += boxes[:, :2]
        pixels = Image.open(args.data / f"bccd/{split}" / image["file_name"]).convert("RGB").resize((320, 240))
        pairs.append((to_tensor(pixels), {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in own])}))
    return pairs


@torch.inference_mode()
def average_precision(model: nn.Module, pairs: list[Any]) -> float:
    """Area under precision over recall at IoU 0.5, all classes together, in percent."""
    found, objects = [(0.0, False)], 0
    for image, target in pairs:
        (out,) = model.eval()([image])
        objects += len(target["labels"])
        overlaps = box_iou(out["boxes"], target["boxes"]) * (out["labels"][:, None] == target["labels"])
        for i in out["scores"].argsort(descending=True).tolist():
            best, which = overlaps[i].max(0)
            found.append((float(out["scores"][i]), bool(best >= 0.5)))
            if best >= 0.5:
                overlaps[:, which] = 0  # an object is found once
    hits = torch.tensor([hit for _, hit in sorted(found, reverse=True)]).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return 100 * float((precision.flip(0).cummax(0).values.flip(0) * hits).sum() / objects)
