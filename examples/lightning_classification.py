"""Lightning: fine-tunes a MobileNet two images at a time; the one line is the callback.

python examples/lightning_classification.py                # --norm bn or frozen to compare

The callback converts when fit begins, behind the weights that the module loads itself and before Lightning makes
optimizers and strategy. ModelCheckpoint then stores the windows too, and ckpt_path= resumes to the bit.
"""

from __future__ import annotations

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import arguments, network, photos, say
from torch import Tensor
from torch.utils.data import DataLoader

import cbn_convert as cbn
from cbn_convert.integrations.lightning import CbnCallback


class Classifier(pl.LightningModule):
    """Any LightningModule; the network is its `model`."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.model, self.lr, self.steps = network(args), args.lr, args.steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Logs the accuracy."""
        self.log("top1", 100 * (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """SGD, whose rate falls to zero."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    """Trains, validates, folds."""
    args = arguments(__doc__, steps=600, lr=0.01)
    module = Classifier(args)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=args.steps, accelerator="cpu", gradient_clip_val=5.0, limit_val_batches=0, logger=False,
            default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[CbnCallback("model")] if args.norm == "cbn" else [],  # the one line
        )  # fmt: skip
        trainer.fit(module, DataLoader(photos(args, "train"), 2), DataLoader(photos(args, "val"), 32))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (result,) = trainer.validate(module, DataLoader(photos(args, "val"), 32), verbose=False)
    if args.norm == "cbn":
        cbn.fold(module.model)  # a copy without norm layers, for deployment
    say(args, "top-1 [%]", result["top1"], "308 photos of hands")


if __name__ == "__main__":
    main()
