"""Lightning: Trainer(callbacks=[CbnCallback("model")]).

The network is converted in setup, behind the weights that the module itself loads and before optimizers, precision and
strategy take it. Checkpoints hold the windows under "cbn_convert"; their state_dict is that of the plain network, so
load_from_checkpoint needs nothing of this package. For deployment: cbn_convert.fold(module.model) afterwards.
"""

from __future__ import annotations

import warnings
from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CbnError, CbnWarning
from ..norm import CrossIterationMixin
from .plain import load_training_state, training_state
from .shared import KEY, convert_part, converted_layers, require, synchronize

require("lightning", "2.6")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.utilities.model_helpers import is_overridden


class CbnCallback(Callback):
    """Converts a part of a LightningModule when fit begins, and resumes its windows to the bit.

    part: the name of the network in the module, such as "model"; the module itself by default, which then has a forward
    method. The rest are the arguments of `cbn_convert.convert`; `example_input` is the module's `example_input_array`
    where that is there and the module itself is converted. What the module has converted itself stays as it is.
    """

    def __init__(self, part: str = "", **keywords: Any) -> None:
        self.part = part
        self.keywords = keywords
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Converts; with Trainer(sync_batchnorm=True) as convert(sync=True) does."""
        if stage != "fit":
            return
        self._saved = None
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # Lightning asks that a second call change nothing
        if not self.part and not is_overridden("forward", pl_module):
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise CbnError(
                f"{type(pl_module).__name__} has no forward method to follow; say which part of it is the network, as "
                f'in CbnCallback("model"); it has {names}'
            )
        keywords = dict(self.keywords)
        if not self.part and pl_module.example_input_array is not None:
            keywords.setdefault("example_input", pl_module.example_input_array)
        convert_part(pl_module, self.part, keywords)
        if getattr(trainer.strategy, "_layer_sync", None) is not None:
            synchronize(pl_module)
            # Lightning's own would turn every converted layer into a plain SyncBatchNorm
            trainer.strategy._layer_sync = _SyncOfOthers()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the windows of all processes into the checkpoint."""
        if converted_layers(pl_module):  # not so in the process that has started others, behind their training
            checkpoint[KEY] = training_state(pl_module, gather=True)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the windows until all weights are there, since other callbacks may still load some."""
        self._saved = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the windows of the checkpoint that is resumed."""
        if self._saved:
            load_training_state(pl_module, self._saved)
        elif self._saved is not None:
            warnings.warn(
                f"{trainer.ckpt_path} was saved without CbnCallback, so the windows begin anew from its running "
                "statistics, which is a valid run and not the same one to the bit",
                CbnWarning,
                stacklevel=2,
            )
        self._saved = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins anew where StochasticWeightAveraging has reset running statistics, to measure them in this epoch."""
        if batch_idx == 0:
            for layer in converted_layers(pl_module).values():
                if layer.momentum is None and layer.is_new:
                    layer.reset_history()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves averaged weights with averaged statistics, which the windows would overwrite with their own."""
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            for layer in converted_layers(pl_module).values():
                layer.reset_history()


class _SyncOfOthers(LayerSync):
    """SyncBatchNorm for the norms that are not converted."""

    def apply(self, model: nn.Module) -> nn.Module:
        """In place."""
        for name, child in model.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, CrossIterationMixin):
                setattr(model, name, convert_sync_batchnorm(child))
            elif not isinstance(child, CrossIterationMixin):
                self.apply(child)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Nothing: they compute BatchNorm in evaluation as they are."""
        return model
