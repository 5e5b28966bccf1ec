"""Fine-tuning runs of which something is changed that has no setting: a function of a benchmark runs first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from report import provenance
from study import HERE

from cbn_convert import FinetuneConfig
from cbn_convert.files import write_json

RUN = """
import importlib, json, sys, torch, cbn_convert as cbn
torch.set_num_threads(1)
config, change = json.loads(sys.argv[1])
if change:
    module, function, *arguments = change
    getattr(importlib.import_module(module), function)(*arguments)
print(json.dumps(cbn.finetune(cbn.FinetuneConfig(**config), quiet=True).to_dict()))
"""


def last_top1(config: dict[str, Any], change: Sequence[Any] | None = None) -> float | None:
    """Validation top-1 at the end of a run on one CPU thread, None if it diverged.

    config: arguments of FinetuneConfig but for the output. change: a module of this folder, a function of it and its
    arguments, called before the run in the run's process.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = FinetuneConfig(**config, output=f"{folder}/run", workers=0, device="cpu")
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps([given.to_dict(), change])], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )  # fmt: skip
    if done.returncode:
        if "DivergedError" not in done.stderr:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        return None
    return round(float(json.loads(done.stdout.splitlines()[-1])["last_top1"]), 2)


def measure(
    output: Path, command: str, todo: list[dict[str, Any]], run: Callable[[dict[str, Any]], float | None], jobs: int
) -> None:
    """Writes each cell of `todo` with its top-1 to `output` as soon as it is run, unless it is there already."""
    cells = json.loads(output.read_text())["cells"] if output.is_file() else []
    have = [{k: v for k, v in cell.items() if k != "top1"} for cell in cells]
    lock = Lock()
    torch.set_num_threads(1)  # as the runs have, which the report says

    def work(cell: dict[str, Any]) -> None:
        top1 = run(cell)
        with lock:
            cells.append({**cell, "top1": top1})
            write_json(output, {**provenance(command), "cells": cells})
            print(cells[-1], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [cell for cell in todo if cell not in have]))
