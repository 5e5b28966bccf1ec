"""ultralytics: class Trainer(CbnTrainerMixin, DetectionTrainer): ..; YOLO("yolo11n.pt").train(trainer=Trainer, ..).

The model is converted once it has its weights, before compile, DDP, optimizer and EMA take it. The EMA, which is what
ultralytics validates and saves, is the plain network: last.pt and best.pt load, validate and export without this
package. Beside each file for resuming stands NAME.cbn: ultralytics' own has nothing but the averages, rounded to
float16, so that a resumed run is another one; with it, it is the same to the bit, as far as order and augmentation
of images are.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..conversion import revert
from ..errors import CbnWarning
from ..files import replaced_file
from .plain import load_training_state, training_state
from .shared import bare, convert_part, require

require("ultralytics", "8.4")

from ultralytics.engine.trainer import BaseTrainer


class CbnTrainerMixin(BaseTrainer):
    """Stands before a trainer of ultralytics, of any task.

    cbn_keywords: the arguments of `cbn_convert.convert`, as an attribute of the class.
    """

    cbn_keywords: ClassVar[dict[str, Any]] = {}

    def setup_model(self) -> Any:
        """Converts."""
        ckpt = super().setup_model()
        convert_part(self.model, "", self.cbn_keywords)
        return ckpt

    def _setup_train(self) -> None:
        super()._setup_train()
        self._plain_ema()

    def _load_checkpoint_state(self, ckpt: Any) -> None:
        super()._load_checkpoint_state(ckpt)
        self._plain_ema()

    def _plain_ema(self) -> None:
        if self.ema:
            revert(self.ema.ema)

    def resume_training(self, ckpt: Any) -> None:
        """Goes on with what stands beside the checkpoint."""
        super().resume_training(ckpt)
        if ckpt is None or not self.resume:
            return
        path = _beside(Path(self.args.resume))
        if not path.is_file():
            warnings.warn(
                f"there is no {path}, so the run goes on from the averages in {self.args.resume} and its windows "
                "begin anew, which is a valid run and not the same one to the bit",
                CbnWarning,
                stacklevel=2,
            )
            return
        saved = torch.load(path, map_location=self.device, weights_only=True)
        bare(self.model).load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema.ema.load_state_dict(saved["ema"])
        load_training_state(self.model, saved["state"])

    def save_model(self) -> Any:
        """Writes what a resume to the bit needs beside ultralytics' files."""
        written = super().save_model()
        saved = {
            "model": bare(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "state": training_state(self.model),  # of this process, which alone saves
        }
        for file in (self.last, self.wdir / f"epoch{self.epoch}.pt"):
            if file.is_file():
                with replaced_file(_beside(file), binary=True) as beside:
                    torch.save(saved, beside)
        return written

    def final_eval(self) -> None:
        """Deletes what belongs to files that are stripped of their optimizer now, and cannot be resumed."""
        super().final_eval()
        for file in (self.last, self.best):
            _beside(file).unlink(missing_ok=True)


def _beside(file: Path) -> Path:
    return file.with_suffix(".cbn")  # ultralytics looks for last*.pt
