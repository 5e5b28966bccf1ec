"""Hugging Face: Trainer(model, callbacks=[CbnCallback()]).

The model is converted at the end of Trainer.__init__, before optimizer, accelerator and torch.compile take it.
Beside the files of each checkpoint stands cbn_training_state.pt, and train(resume_from_checkpoint=..) restores it. All
other files are those of the plain model, so from_pretrained needs nothing of this package. For deployment:
cbn_convert.fold(trainer.model), or cbn_convert.revert(trainer.model).save_pretrained(..).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CbnWarning
from ..files import replaced_file
from .plain import load_training_state, training_state
from .shared import convert_late, convert_part, converted_layers, require

require("transformers", "5.0")

from transformers import TrainerCallback

FILE = "cbn_training_state.pt"


class CbnCallback(TrainerCallback):
    """Converts the Trainer's model, and resumes its windows to the bit.

    part: the name of a module of the model, all of it by default. The rest are the arguments of `cbn_convert.convert`.
    A model that is converted already stays as it is.
    """

    def __init__(self, part: str = "", **keywords: Any) -> None:
        self.part = part
        self.keywords = keywords

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Converts."""
        convert_part(model, self.part, self.keywords)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Restores the windows of the checkpoint that is resumed; converts what model_init has made anew."""
        if not converted_layers(model):
            convert_late(model, self.part, self.keywords)
        if not state.global_step:
            return
        # a callback is not told the path: it is known if it stands in the arguments, or is where this run saves
        named = getattr(args, "resume_from_checkpoint", None)
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(named, str):
            folders.insert(0, Path(named))
        for folder in folders:
            if (folder / FILE).is_file():
                saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
                if saved["run"] == _run(state):
                    load_training_state(model, saved["state"])
                    return
        warnings.warn(
            f"there is no {FILE} of this run in {' or '.join(map(str, folders))}, so the windows begin anew from the "
            "running statistics; to resume to the bit, give the checkpoint's folder as "
            "TrainingArguments(resume_from_checkpoint=..) too",
            CbnWarning,
            stacklevel=2,
        )

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Puts the windows of all processes into the checkpoint's folder."""
        windows = training_state(model, gather=True)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            with replaced_file(folder / FILE, binary=True) as file:
                torch.save({"run": _run(state), "state": windows}, file)


def _run(state: Any) -> str:
    """What tells a run's checkpoint from that of another one at the same step: the numbers that were logged."""
    logged = json.dumps([state.global_step, state.log_history], sort_keys=True, default=str)
    return hashlib.sha256(logged.encode()).hexdigest()
