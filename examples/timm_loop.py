"""timm's own pieces: create_optimizer_v2, create_scheduler_v2, ModelEmaV3 and CheckpointSaver around a converted model.

python examples/timm_loop.py                               # --norm bn or frozen to compare
python examples/timm_loop.py --output run --stop 200       # ... is interrupted
python examples/timm_loop.py --output run --resume yes     # ... and ends in the same bits

The one line stands behind the weights, and before optimizer, EMA and (not here) compile and DDP. CheckpointSaver writes
what plain timm loads; the windows stand in a file beside it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, network, photos, say, top1
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import cbn_convert as cbn
from cbn_convert.integrations import load_training_state, training_state


def train(args: Any, folder: Path) -> Any:
    """The average of the weights."""
    model = network(args)
    if args.norm == "cbn":
        print(cbn.convert(model).summary())  # the one line
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, momentum=0.9, weight_decay=1e-5)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.steps, step_on_epochs=False,
                                      updates_per_epoch=1)  # fmt: skip
    ema = ModelEmaV3(model, decay=0.99)
    saver = CheckpointSaver(model, optimizer, args=None, model_ema=ema, checkpoint_dir=str(folder))
    first = 0
    if args.resume:
        first = resume_checkpoint(model, str(folder / "last.pth.tar"), optimizer, log_info=False) or 0
        load_checkpoint(ema.module, str(folder / "last.pth.tar"), use_ema=True)
        load_training_state(model, torch.load(folder / "last.cbn"))  # behind the weights
    images = photos(args, "train")
    for step in range(first, min(args.stop or args.steps, args.steps)):
        schedule.step_update(step)
        x, y = next(iter(DataLoader(images, 2, sampler=[(2 * step + i) % len(images) for i in (0, 1)])))
        F.cross_entropy(model.train()(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
        if (step + 1) % 100 == 0:
            saver.save_checkpoint(step)
            torch.save(training_state(model), folder / "last.cbn")
    return ema.module


def main() -> None:
    """Trains, evaluates the average."""
    args = arguments(__doc__, steps=600, lr=0.01, output="", resume="", stop=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.output or name)
        folder.mkdir(exist_ok=True)
        say(args, "top-1 [%]", top1(train(args, folder), args), "308 photos of hands")


if __name__ == "__main__":
    main()
