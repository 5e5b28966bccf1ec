"""A process that runs cells: one line of JSON in is the settings of a run, one line out its outcome.

Its only argument is a number of threads. When standard input ends, the run at hand is saved as after a signal.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ..errors import CbnError, DivergedError, OneValueError, OutOfMemoryError
from ..training.config import FinetuneConfig
from ..training.metrics import read_metrics
from ..training.runs import run as run_training
from ..training.trained import evaluate
from .config import with_tuples

POINTS = 60  # of a curve


def run(settings: dict[str, Any], tested: bool) -> dict[str, Any]:
    """The outcome of one run, which goes on if it was interrupted. Raises CbnError for what ends the comparison."""
    config = FinetuneConfig(**with_tuples(settings))
    folder = Path(config.output)
    try:
        resumed = (folder / "config.json").is_file()
        result = run_training(config, resumed=resumed, overwrite=True, quiet=True)
    except (DivergedError, OneValueError, OutOfMemoryError) as error:
        return {"error": str(error)}
    outcome: dict[str, Any] = {
        "top1": result.best_top1, "last_top1": result.last_top1, "steps": result.steps,
        "step_seconds": result.median_step_seconds or result.train_seconds / result.steps,
        "train_seconds": result.train_seconds, "peak_memory": result.peak_memory, "skipped": result.skipped,
        **curves(folder),
    }  # fmt: skip
    if tested:
        scored = evaluate(
            folder, config.data, split="test", workers=config.workers, device=config.device,
            skip_bad_images=config.skip_bad_images,
        )  # fmt: skip
        outcome["test_top1"] = scored.top1
    return outcome


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Steps with the training loss, and with the validation top-1, thinned to what a plot can show."""
    records = read_metrics(folder)
    series = {"loss_curve": ("train", "loss"), "top1_curve": ("eval", "top1")}
    result = {}
    for name, (event, value) in series.items():
        points = [[r["step"], round(r[value], 4)] for r in records if r["event"] == event]
        every = -(-len(points) // POINTS) or 1
        result[name] = points[::-1][::every][::-1]
    return result


def main() -> None:
    """Runs cells until standard input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.register_at_fork(after_in_child=answers.close)  # or a pipe would stay open after this process has died
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer
    # a process that is forked closes sys.stdin, for which it would wait for ever while a thread here reads from it
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in questions:
            lines.put(line)
        lines.put("")
        os.kill(os.getpid(), signal.SIGTERM)  # the run at hand saves a checkpoint

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what started this process decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while line := lines.get():
        try:
            answer = run(**json.loads(line))
        except KeyboardInterrupt:
            answer = {"interrupted": True}
        except CbnError as error:
            answer = {"failed": str(error)}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:  # what started this process is gone
            os._exit(1)
