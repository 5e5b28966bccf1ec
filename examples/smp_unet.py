"""segmentation-models-pytorch: a Unet with an ImageNet encoder, one image per step.

python examples/smp_unet.py                                # --norm bn or frozen (the encoder) to compare

The one line stands behind encoder_weights and before the optimizer. It takes encoder and decoder: the encoder's layers
carry their ImageNet statistics, the new ones of the decoder average their batches. --data holds CamVid's street scenes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from common import arguments, freeze, network, say
from PIL import Image
from torch import Tensor, nn

import cbn_convert as cbn

CLASSES, IGNORED, SIZE, CHANNELS = 11, 11, (224, 160), (96, 64, 48, 32, 16)


def unet(args: Any) -> nn.Module:
    """Stands for smp.Unet("mobilenet_v2", encoder_weights="imagenet"), without a download."""
    model = smp.Unet(
        "tu-mobilenetv2_035", encoder_weights=None, classes=CLASSES, decoder_channels=CHANNELS, pad_type="same"
    )
    weights = network(args, classes=0).state_dict()
    model.encoder.model.load_state_dict({k: v for k, v in weights.items() if k in model.encoder.model.state_dict()})
    freeze(args, model.encoder)
    return model


def scenes(args: Any, split: str) -> list[tuple[Tensor, Tensor]]:
    """Images [1, 3, H, W] with the class of every pixel."""
    pairs = []
    for path in sorted((args.data / "camvid" / split).glob("*.*")):
        image = np.asarray(Image.open(path).convert("RGB").resize(SIZE)) / 127.5 - 1
        (label,) = (args.data / "camvid" / f"{split}_labels").glob(f"{path.stem}.*")
        classes = np.asarray(Image.open(label).resize(SIZE, Image.Resampling.NEAREST)).astype(np.int64)
        pairs.append((torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None], torch.tensor(classes)[None]))
    return pairs


@torch.inference_mode()
def mean_iou(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Of the classes that occur, in percent."""
    counts = torch.zeros(CLASSES, CLASSES)
    for image, target in pairs:
        found, known = model.eval()(image).argmax(1), target != IGNORED
        pair = CLASSES * target[known] + found[known]
        counts += torch.bincount(pair, minlength=CLASSES**2).view(CLASSES, CLASSES)
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return 100 * float(iou.nanmean())


if __name__ == "__main__":
    args = arguments(__doc__, steps=500, lr=0.03, images=101)
    model = unet(args)
    if args.norm == "cbn":
        print(cbn.convert(model).summary())  # the one line
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    pairs = scenes(args, "train")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for step in range(args.steps):
        image, target = pairs[order[step % len(order)]]
        F.cross_entropy(model.train()(image), target, ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    value = mean_iou(cbn.fold(model) if args.norm == "cbn" else model, scenes(args, "val")[: args.images])
    say(args, "mIoU [%]", value, f"{args.images} street scenes")
