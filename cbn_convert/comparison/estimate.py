"""How long a comparison will take, before it begins."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import CbnError
from ..training.evaluation import resolve_device
from ..training.loading import evaluation_batch
from ..training.setup import build
from .config import ComparisonConfig
from .plan import Cell

TIMED = 2  # steps, after one that is not
LONGEST = 300.0  # seconds that the estimate itself may take
# the same package as here, whatever lies in the current folder
_ROOT = str(Path(__file__).parents[2])
_PROGRAM = f"import sys; sys.path[0] = {_ROOT!r}; from {__package__}.estimate import main; main()"


def estimated(config: ComparisonConfig, cells: Sequence[Cell], images: int) -> str:
    """`seconds` in words, measured in a process of its own, so that a GPU's memory is free again afterwards.

    images: those that each run sees. What cannot be measured is said of so; the runs will tell why.
    """
    asked = json.dumps([config.to_dict(), cells, images, torch.get_num_threads()])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, asked], capture_output=True, text=True, check=True, timeout=LONGEST,
            start_new_session=True,  # Ctrl-C is for the comparison
        )  # fmt: skip
        return f"about {spoken(float(done.stdout.splitlines()[-1]))} at the pace of BN"
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return "how long they take will be known after the first"


def main() -> None:
    """Prints `seconds`."""
    stored, cells, images, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        print(seconds(ComparisonConfig.from_dict(stored), [Cell(*cell) for cell in cells], images))
    except CbnError as error:
        raise SystemExit(str(error)) from None


def seconds(config: ComparisonConfig, cells: Sequence[Cell], images: int) -> float:
    """What these cells take if every step takes as long as one of BN with random images; loading is left out."""
    device = resolve_device(config.run.device)
    sizes = sorted({cell.batch_size for cell in cells})
    setup = build(config.cell("bn", sizes[0], None, config.run.seed))
    model, shape = setup.model.to(device), setup.data_config["input_size"]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def took(batch_size: int, training: bool) -> float:
        x, began = torch.randn(batch_size, *shape, device=device), 0.0
        with torch.set_grad_enabled(training):
            for step in range(1 + TIMED):
                if step == 1:
                    began = time.perf_counter()
                # one image may leave one value per channel, at which BN does not train
                logits = model.train(training and batch_size > 1)(x)
                loss = F.cross_entropy(logits, torch.zeros(batch_size, dtype=torch.long, device=device))
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                float(loss)  # waits for the device
        return (time.perf_counter() - began) / TIMED

    step = {size: took(size, True) for size in sizes}
    batch = evaluation_batch(sizes[0], setup.data_config)
    epochs = math.ceil(images / max(1, len(setup.training.samples)))
    evaluation = epochs * math.ceil(len(setup.validation.samples) / batch) * took(batch, False)
    return sum(images / cell.batch_size * step[cell.batch_size] + evaluation for cell in cells) / config.jobs


def spoken(length: float) -> str:
    """Seconds in words."""
    if length < 90:
        return f"{length:.0f} s"
    return f"{length / 60:.0f} min" if length < 5400 else f"{length / 3600:.1f} h"
