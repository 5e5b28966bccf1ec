"""Fine-tuning runs of which something is changed that has no setting: a function of a benchmark runs first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks.provenance import ROOT, provenance
from benchmarks.study.comparisons import HERE
from cbn_convert import FinetuneConfig
from cbn_convert.files import write_json

RUN = """
import importlib, json, sys, torch
from cbn_convert.comparison.worker import run
torch.set_num_threads(1)
config, change, tested = json.loads(sys.argv[1])
if change:
    module, function, *arguments = change
    getattr(importlib.import_module(f"benchmarks.study.{module}"), function)(*arguments)
print(json.dumps(run(config, tested)))
"""


_LASTING = ExitStack()


def lasting(context: AbstractContextManager[Any]) -> None:
    """Enters a context for the rest of the process; one that nobody keeps ends as soon as it is forgotten."""
    _LASTING.enter_context(context)


def outcome(config: dict[str, Any], change: Sequence[Any] | None = None, tested: bool = False) -> dict[str, Any]:
    """What a run of a comparison on one CPU thread ends with, "error" if it diverged.

    config: arguments of FinetuneConfig but for the output. change: a module of this folder, a function of it and its
    arguments, called before the run in the run's process. tested: whether test/ is scored as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = FinetuneConfig(**config, output=f"{folder}/run", workers=0, device="cpu")
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps([given.to_dict(), change, tested])], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "more_models"), str(ROOT)])},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def accuracies(config: FinetuneConfig, change: Sequence[Any] | None = None) -> dict[str, Any]:
    """Those of a run with a test split, by `outcome`; where the config says it runs and writes counts for nothing."""
    settings = {k: v for k, v in config.to_dict().items() if k not in ("output", "workers", "device")}
    found = outcome(settings, change, tested=True)
    return {k: v for k, v in found.items() if k in ("error", "top1", "test_top1", "steps")}


def measure(
    output: Path, command: str, todo: list[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]], jobs: int
) -> None:
    """Writes each cell of `todo` with what comes of it to `output` as soon as it is run, unless it is there already."""
    cells = json.loads(output.read_text())["cells"] if output.is_file() else []
    lock = Lock()
    torch.set_num_threads(1)  # as the runs have, which the report says

    def work(cell: dict[str, Any]) -> None:
        found = run(cell)
        with lock:
            cells.append({**cell, **found})
            write_json(output, {**provenance(command), "cells": cells})
            print(cells[-1], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [cell for cell in todo if not any(cell.items() <= c.items() for c in cells)]))
