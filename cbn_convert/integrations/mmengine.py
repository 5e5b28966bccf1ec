"""mmengine (mmdetection, mmsegmentation, mmpretrain): custom_hooks = [dict(type="CbnHook", part="backbone")].

With custom_imports = dict(imports=["cbn_convert.integrations.mmengine"]). The model is converted before a run, behind
its optimizer and DDP, which an unfrozen BatchNorm does not notice. Checkpoints hold the windows under "cbn_convert";
their state_dict is that of the plain model. For deployment: cbn_convert.revert or fold behind the run.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import CbnWarning
from .plain import load_training_state, training_state
from .shared import KEY, bare, convert_late, converted_layers, require

require("mmengine", "0.10")

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class CbnHook(Hook):
    """Converts a part of the runner's model, and resumes its windows to the bit.

    part: the name of the module, the whole model by default. The rest are the arguments of `cbn_convert.convert`. What
    is converted already stays as it is. norm_eval, which keeps BatchNorm frozen in some backbones, is switched off
    there. mmengine saves in its first process only: with several, sync=True gives all of them the same window.
    """

    priority = "VERY_LOW"  # behind those that load weights

    def __init__(self, part: str = "", **keywords: Any) -> None:
        self.part = part
        self.keywords = keywords
        self._saved: dict[str, Any] | None = None

    def before_run(self, runner: Any) -> None:
        """Converts."""
        self._saved = None
        report = None
        if not converted_layers(runner.model):
            report = convert_late(runner.model, self.part, self.keywords)
        for name, module in bare(runner.model).get_submodule(self.part).named_modules(prefix=self.part):
            if getattr(module, "norm_eval", False):
                module.norm_eval = False
                runner.logger.info(f"{name}: norm_eval is off, since converted layers follow the weights in training")
        if report is not None:
            runner.logger.info(f"cbn_convert: {report}")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Puts the windows into the checkpoint."""
        checkpoint[KEY] = training_state(runner.model)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the windows until the weights are loaded; those of weights that a new run begins with are left."""
        if runner._resume:
            self._saved = checkpoint.get(KEY, {})

    def before_train(self, runner: Any) -> None:
        """Restores the windows of the checkpoint that is resumed."""
        if self._saved:
            load_training_state(runner.model, self._saved)
        elif self._saved is not None:
            warnings.warn(
                "the checkpoint was saved without CbnHook, so the windows begin anew from its running statistics, "
                "which is a valid run and not the same one to the bit",
                CbnWarning,
                stacklevel=2,
            )
        self._saved = None
