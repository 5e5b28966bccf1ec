"""MONAI: a 3d UNet with batch norm, one volume per step, on volumes that are made here.

python examples/monai_unet3d.py                            # --norm bn to compare

The one line stands before the optimizer; with pretrained weights, behind them. Here are none, so every layer is a new
one and averages its batches: this shows where the line goes. CBN is made for pretrained weights.
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, freeze, say
from monai.data import create_test_image_3d
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from torch import Tensor, nn

import cbn_convert as cbn


def volume(seed: int) -> tuple[Tensor, Tensor]:
    """Balls in noise [1, 1, 32, 32, 32], and where they are."""
    random = np.random.RandomState(seed)
    image, label = create_test_image_3d(
        32, 32, 32, num_objs=6, rad_max=8, rad_min=3, noise_max=0.7, num_seg_classes=1, random_state=random
    )
    return torch.tensor(image, dtype=torch.float32)[None, None], torch.tensor(label, dtype=torch.long)[None, None]


@torch.inference_mode()
def dice(model: nn.Module, count: int) -> float:
    """The mean over new volumes, in percent."""
    metric = DiceMetric(include_background=False)
    for seed in range(10**6, 10**6 + count):
        image, label = volume(seed)
        metric(one_hot(model.eval()(image).argmax(1, keepdim=True), 2), one_hot(label, 2))
    return 100 * float(metric.aggregate())


def main() -> None:
    """Trains, measures, folds."""
    args = arguments(__doc__, steps=200, lr=0.05)
    model = UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2,
        norm="batch",
    )  # fmt: skip
    freeze(args, model)
    if args.norm == "cbn":
        print(cbn.convert(model).summary())  # the one line
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(args.steps):
        image, label = volume(args.seed * args.steps + step)
        loss = loss_of(model.train()(image), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    value = dice(cbn.fold(model) if args.norm == "cbn" else model, 20)
    say(args, "Dice [%]", value, "20 volumes")


if __name__ == "__main__":
    main()
