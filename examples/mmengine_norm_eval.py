"""mmengine: a backbone with norm_eval=True, as mmdetection's configs have it, two images per step.

python examples/mmengine_norm_eval.py                      # --norm frozen: norm_eval as it is; bn: switched off

The one line is the hook, in a config: custom_hooks = [dict(type="CbnHook", part="backbone")]. It converts before a
run, behind weights, optimizer and DDP, and switches norm_eval off in what it converts: in evaluation layers follow
nothing. Checkpoints hold the windows, and resume=True resumes to the bit.
"""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # mmengine 0.10 cannot read its own files otherwise

import torch.nn.functional as F
from common import arguments, network, photos, say, top1
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from cbn_convert.integrations.mmengine import CbnHook


class Backbone(nn.Module):
    """As those of mmdetection: with norm_eval, BatchNorm stays in evaluation."""

    def __init__(self, net: nn.Module, norm_eval: bool) -> None:
        super().__init__()
        self.net, self.norm_eval = net, norm_eval

    def forward(self, x: Any) -> Any:
        """The logits."""
        return self.net(x)

    def train(self, mode: bool = True) -> Any:
        """Keeps the norms as they are."""
        super().train(mode)
        for module in self.modules():
            if mode and self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self


class Classifier(BaseModel):
    """Any model of mmengine."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.backbone = Backbone(network(args), norm_eval=args.norm != "bn")

    def forward(self, x: Any, y: Any, mode: str = "loss") -> Any:
        """The loss."""
        return {"loss": F.cross_entropy(self.backbone(x), y)}


if __name__ == "__main__":
    args = arguments(__doc__, steps=600, lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            Classifier(args), folder, train_dataloader=DataLoader(photos(args, "train"), 2),
            train_cfg={"type": "IterBasedTrainLoop", "max_iters": args.steps}, log_level=logging.ERROR,
            optim_wrapper={"optimizer": {"type": "SGD", "lr": args.lr, "momentum": 0.9}, "clip_grad": {"max_norm": 5}},
            param_scheduler={"type": "CosineAnnealingLR", "T_max": args.steps, "by_epoch": False},
            custom_hooks=[CbnHook(part="backbone")] if args.norm == "cbn" else [],  # the one line
        )  # fmt: skip
        runner.train()
        say(args, "top-1 [%]", top1(runner.model.backbone, args), "308 photos of hands")
