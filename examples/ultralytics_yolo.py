"""ultralytics: YOLO11 with a trainer that converts, two images per step, on images that are made here.

python examples/ultralytics_yolo.py                        # --norm bn to compare

The one line is the mixin: it converts once the trainer has its weights, before compile, DDP, optimizer and EMA. last.pt
and best.pt are of the plain network; last.cbn beside them resumes to the bit. With pretrained weights, such as
YOLO("yolo11n.pt"), layers carry their statistics; here the network is new, and they average their batches.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from common import arguments, say
from PIL import Image

with tempfile.TemporaryDirectory() as settings:  # not the user's own; and nothing is fetched
    os.environ |= {"YOLO_CONFIG_DIR": settings, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

from cbn_convert.integrations.ultralytics import CbnTrainerMixin


class Trainer(CbnTrainerMixin, DetectionTrainer):
    """The one line; the arguments of convert would go into the attribute cbn_keywords."""


def squares(folder: Path, count: int) -> Path:
    """Images with one or two bright squares in noise; the yaml file of the data set."""
    random = np.random.default_rng(0)
    for split, n in (("train", count), ("val", 32)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(n):
            pixels, lines = random.integers(0, 90, (96, 96, 3), dtype=np.uint8), []
            for _ in range(random.integers(1, 3)):
                size = int(random.integers(16, 40))
                x, y = (int(v) for v in random.integers(0, 96 - size, 2))
                pixels[y : y + size, x : x + size] = random.integers(140, 256, 3, dtype=np.uint8)
                lines.append(f"0 {(x + size / 2) / 96} {(y + size / 2) / 96} {size / 96} {size / 96}")
            Image.fromarray(pixels).save(folder / "images" / split / f"{i}.png")
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square]\n")
    return folder / "data.yaml"


def main() -> None:
    """Trains, validates what ultralytics has saved."""
    args = arguments(__doc__, steps=300, lr=0.005)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = squares(folder, 2 * args.steps // 6)
        model = YOLO("yolo11n.yaml", verbose=False)
        model.train(
            trainer=Trainer if args.norm == "cbn" else DetectionTrainer, data=str(data), epochs=6, batch=2, nbs=2,
            imgsz=96, optimizer="SGD", lr0=args.lr, workers=0, project=str(folder), device="cpu", seed=args.seed,
            plots=False, val=False, verbose=False, mosaic=0.0, warmup_epochs=1,
        )  # fmt: skip
        best = YOLO(folder / "train/weights/last.pt")
        value = 100 * best.val(data=str(data), imgsz=96, device="cpu", workers=0, plots=False, verbose=False).box.map50
    say(args, "mAP50 [%]", value, "32 images of squares")


if __name__ == "__main__":
    main()
