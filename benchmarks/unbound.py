"""Layers without a weight of their own, from pretrained statistics: windows and gradients of them alone.

    python benchmarks/unbound.py --data ../shared/data --work FOLDER

A pre-activation ResNet-18 of half the width from clothing to hands, 1,000 images, SGD: the comparison hands-preact of
study.py, whose first network it shares in FOLDER. The other layers have CBN's defaults. One thread for a run. Writes
benchmarks/results/unbound.json after every cell; cells that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from report import RESULTS, provenance
from study import DATA, FOLDERS, HERE, NETWORKS, source

from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "unbound.json"
CELL = """
import json, sys, torch, cbn_convert as cbn
from unbound import set_unbound
torch.set_num_threads(1)
set_unbound(*json.loads(sys.argv[2]))
print(json.dumps(cbn.finetune(cbn.FinetuneConfig(**json.loads(sys.argv[1])), quiet=True).to_dict()))
"""
# images in the window of these layers, None for two iterations; gradient
ROWS: list[tuple[int | None, str]] = [
    (None, "straight_through"), (16, "straight_through"), (64, "straight_through"),
    (64, "full"), (512, "full"), (8192, "full"),
]  # fmt: skip
IMAGES = 1000
RATES = {2: (9.5e-4, 3e-3, 9.5e-3, 3e-2), 1: (6.7e-4, 2.1e-3, 6.7e-3, 2.1e-2)}


def set_unbound(images: int | None, gradient: str, batch_size: int) -> None:
    """Makes fine-tuning in this process give the layers without a weight this window and gradient."""
    from cbn_convert.norm import CrossIterationMixin
    from cbn_convert.training import setup

    convert = setup.apply_norm

    def apply_norm(model: Any, norm: str, *args: Any, **kwargs: Any) -> None:
        convert(model, norm, *args, **kwargs)
        for layer in model.modules():
            if isinstance(layer, CrossIterationMixin) and not layer.producers:
                window = 2 if images is None else images // batch_size
                layer.set_window(window, layer.compensation, gradient, "ema", 0, False, start=layer.start)  # type: ignore[arg-type]

    setup.apply_norm = apply_norm


def run_cell(data: Path, weights: Path, row: tuple[int | None, str] | None, batch_size: int, lr: float) -> float | None:
    """Validation top-1 after one run, None if it failed. row: None for frozen BN in all layers."""
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            data=str(data / FOLDERS["hands"]), model=NETWORKS["preact"]["model"], checkpoint=str(weights),
            model_kwargs={"width_factor": 0.5}, output=f"{folder}/run", norm="frozen" if row is None else "cbn",
            img_size=DATA["hands"]["img-size"], hflip=DATA["hands"]["hflip"], min_scale=DATA["hands"]["min-scale"],
            batch_size=batch_size, epochs=2, max_steps=IMAGES // batch_size, lr=lr, workers=0, device="cpu",
        )  # fmt: skip
        words = json.dumps([*(row or (None, "full")), batch_size])
        done = subprocess.run(
            [sys.executable, "-c", CELL, json.dumps(config.to_dict()), words], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )  # fmt: skip
    if done.returncode:
        if "not finite" not in done.stderr:
            raise SystemExit(done.stderr)
        return None
    return round(float(json.loads(done.stdout.splitlines()[-1])["last_top1"]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and sign_digits/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the network that is trained first")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data = given.data.resolve()
    weights = source("preact", data, given.work.resolve(), given.jobs)
    cells = json.loads(OUTPUT.read_text())["cells"] if OUTPUT.is_file() else []
    have = {(c["images"], c["gradient"], c["batch_size"], c["lr"]) for c in cells}
    todo = [
        (row, batch_size, lr)
        for batch_size, rates in RATES.items()
        for row, lr in product([*ROWS, None], rates)
        if (*(row or (None, "frozen")), batch_size, lr) not in have
    ]
    lock = Lock()

    def work(cell: tuple[tuple[int | None, str] | None, int, float]) -> None:
        row, batch_size, lr = cell
        top1 = run_cell(data, weights, row, batch_size, lr)
        images, gradient = row or (None, "frozen")
        with lock:
            cells.append({"images": images, "gradient": gradient, "batch_size": batch_size, "lr": lr, "top1": top1})
            report = provenance("python benchmarks/unbound.py --data ../shared/data --work study")
            OUTPUT.write_text(json.dumps({**report, "cells": cells}).replace("}, {", "},\n{") + "\n")
            print(cells[-1], flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(work, todo))


if __name__ == "__main__":
    main()
