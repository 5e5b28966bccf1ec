"""How well classes of pixels and boxes are found, in percent."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor


class Confusion:
    """Counts of pixels, by true and found class."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, found: Tensor, target: Tensor) -> None:
        """Classes of pixels; those whose true class is none of ours count nowhere."""
        classes = len(self.counts)
        known = target < classes
        pairs = classes * target[known].long() + found[known]
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def mean_iou(self) -> float:
        """Of the classes that occur, or are found."""
        hits = self.counts.diag()
        iou = hits.double() / (self.counts.sum(0) + self.counts.sum(1) - hits)
        return 100 * float(iou.nanmean())

    def accuracy(self) -> float:
        """Of the pixels."""
        return 100 * float(self.counts.diag().sum() / self.counts.sum())


def coco(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """COCO's mAP and AP50 of boxes, labels and scores, one dict per image, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({int(label) for target in targets for label in target["labels"]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth, seen = COCO(), COCO()
        for api, every in ((truth, targets), (seen, found)):
            api.dataset = {
                "images": [{"id": i} for i in range(len(targets))],
                "categories": [{"id": label} for label in labels],
                "annotations": _annotations(every),
            }
            api.createIndex()
        evaluation = COCOeval(truth, seen, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": 100 * float(evaluation.stats[0]), "ap50": 100 * float(evaluation.stats[1])}


def _annotations(every: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for i, one in enumerate(every):
        sizes = one["boxes"][:, 2:] - one["boxes"][:, :2]
        boxes = torch.cat([one["boxes"][:, :2], sizes], 1).tolist()
        scores = one.get("scores", torch.ones(len(boxes))).tolist()
        for box, label, score in zip(boxes, one["labels"].tolist(), scores, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": label, "bbox": box, "score": score,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
    return annotations
