"""A detector whose backbone comes with frozen BatchNorm, as in detectron2 and torchvision, one image per step.

python examples/frozen_backbone.py                         # --norm frozen: as it comes; bn: unfrozen

FrozenBatchNorm2d of detectron2 and torchvision and timm's FrozenBatchNormAct2d convert as they are. Their γ and β,
which were buffers, become parameters: so the optimizer has to come behind the one line.
"""

from __future__ import annotations

from cells import average_precision, cells
from common import arguments, network, say
from detection import detector, train
from timm.layers import freeze_batch_norm_2d

import cbn_convert as cbn

if __name__ == "__main__":
    args = arguments(__doc__, steps=250, lr=0.01, images=87)
    body = network(args, features_only=True, out_indices=(2, 3, 4))
    if args.norm != "bn":
        freeze_batch_norm_2d(body)  # stands for a backbone that detectron2 or torchvision has made
    if args.norm == "cbn":
        print(cbn.convert(body).summary())  # the one line
    model = train(detector("fcos", body), args)
    say(args, "AP50 [%]", average_precision(model, cells(args, "val")[: args.images]), f"{args.images} photos of cells")
