"""How long a comparison will take, before it begins."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import CbnError
from ..training.evaluation import resolve_device
from ..training.loading import evaluation_batch
from ..training.setup import build
from .config import ComparisonConfig
from .plan import Cell, Results, needed

TIMED = 2  # steps, after one that is not
LONGEST = 120.0  # seconds that the estimate itself may take
# the same package as here, whatever lies in the current folder
_ROOT = str(Path(__file__).parents[2])
_PROGRAM = f"import sys; sys.path[0] = {_ROOT!r}; from {__package__}.estimate import main; main()"


def estimated(config: ComparisonConfig, done: Results, images: int) -> str:
    """A sentence about the runs that are known to be needed; empty where there are none.

    Times are measured in a process of its own, so that a GPU's memory is free again afterwards. images: those that
    each run sees.
    """
    cells = [cell for cell in needed(config, done) if cell not in done]
    if not cells:
        return ""
    asked = json.dumps([config.to_dict(), cells, images, torch.get_num_threads()])
    known = f"{len(cells)} runs at least, of {images} images each"
    try:
        told = subprocess.run(
            [sys.executable, "-c", _PROGRAM, asked], capture_output=True, text=True, check=True, timeout=LONGEST
        )
        return f"{known}: about {spoken(float(told.stdout.splitlines()[-1]))} at the pace of BN, or more"
    except subprocess.CalledProcessError as error:
        return f"{known}; how long they take is not known: {(error.stderr.strip() or 'no reason').splitlines()[-1]}"
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError):
        return f"{known}; how long they take is not known: it cannot be measured in {LONGEST:.0f} s"


def main() -> None:
    """Prints `seconds`."""
    stored, cells, images, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    try:
        print(seconds(ComparisonConfig.from_dict(stored), [Cell(*cell) for cell in cells], images))
    except CbnError as error:
        raise SystemExit(str(error)) from None


def seconds(config: ComparisonConfig, cells: Sequence[Cell], images: int) -> float:
    """What these cells take if every step takes as long as one of BN with random weights and images."""
    device = resolve_device(config.run.device)
    sizes = sorted({cell.batch_size for cell in cells})
    began = time.perf_counter()
    setup = build(replace(config.cell("bn", sizes[0], None, config.run.seed), pretrained=False, checkpoint=None))
    start = time.perf_counter() - began
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
    return sum(images / cell.batch_size * step[cell.batch_size] + evaluation + start for cell in cells) / config.jobs


def spoken(length: float) -> str:
    """Seconds in words."""
    if length < 90:
        return f"{length:.0f} s"
    return f"{length / 60:.0f} min" if length < 5400 else f"{length / 3600:.1f} h"
