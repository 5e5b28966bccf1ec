"""fastai: Learner(dls, model, cbs=CbnCallback()), also vision_learner and unet_learner.

The model is converted when the learner is made, before its optimizer is. learn.save writes the windows beside the file
of weights, as NAME.cbn, and learn.load restores them: so do SaveModelCallback and lr_find, which leaves no trace.
learn.export writes the plain model, which load_learner loads without this package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..deploy import fold
from ..files import replaced_file
from .plain import load_training_state, training_state
from .shared import convert_part, require

require("fastai", "2.8")

from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import rank_distrib
from fastcore.xtras import join_path_file

_WRAPPED = ("save", "load", "export")


class CbnCallback(Callback):
    """Converts the learner's model, and keeps its windows with its weights.

    part: the name of a module of the model, such as "0" for the body of a vision_learner; all of it by default. The
    rest are the arguments of `cbn_convert.convert`. A model that is converted already stays as it is.
    """

    def __init__(self, part: str = "", **keywords: Any) -> None:
        super().__init__()
        self.part = part
        self.keywords = keywords

    def after_create(self) -> None:
        """Converts, and takes part in the learner's save, load and export."""
        convert_part(self.learn.model, self.part, self.keywords)
        for name in _WRAPPED:
            setattr(self.learn, name, getattr(self, f"_{name}"))

    def before_fit(self) -> None:
        """As after_create, for a callback that was added later."""
        self.after_create()

    def _save(self, file: Any, **kwargs: Any) -> Any:
        path = Learner.save(self.learn, file, **kwargs)
        windows = training_state(self.learn.model, gather=True)
        if isinstance(path, Path) and not rank_distrib():
            with replaced_file(path.with_suffix(".cbn"), binary=True) as beside:
                torch.save({"weights": _digest(path), "state": windows}, beside)
        return path

    def _load(self, file: Any, *args: Any, **kwargs: Any) -> Any:
        learn = Learner.load(self.learn, file, *args, **kwargs)
        path = join_path_file(file, learn.path / learn.model_dir, ext=".pth")
        beside = path.with_suffix(".cbn") if isinstance(path, Path) else None
        if beside is not None and beside.is_file():
            saved = torch.load(beside, map_location="cpu", weights_only=True)
            if saved["weights"] == _digest(path):  # else the weights were replaced since, by a loop without windows
                load_training_state(learn.model, saved["state"])
        return learn

    def _export(self, *args: Any, **kwargs: Any) -> Any:
        learn, model, opt = self.learn, self.learn.model, self.learn.opt
        for name in _WRAPPED:
            delattr(learn, name)
        learn.remove_cb(self)
        learn.model = fold(model, into="bn")
        try:
            return learn.export(*args, **kwargs)
        finally:
            learn.model, learn.opt = model, opt
            learn.add_cb(self)
            self.after_create()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
