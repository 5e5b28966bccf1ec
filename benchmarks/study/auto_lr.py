"""What --lr auto chooses, beside a third and three times of it, for 1 to 8 images per update.

    python -m benchmarks.study.auto_lr --data ../shared/data

MobileNetV2-0.35 (ImageNet) on clothing photos: one epoch of 3,068 images at 96 px, CBN with its
defaults, SGD and AdamW, one thread for a cell. Writes benchmarks/results/auto_lr.json after every cell; cells that are
there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from benchmarks.provenance import RESULTS, provenance
from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "auto_lr.json"
CELL = """
import json, sys, cbn_convert as cbn
try:
    print(json.dumps(cbn.finetune(cbn.FinetuneConfig(**json.loads(sys.argv[1])), quiet=True).to_dict()))
except cbn.CbnError as error:
    print(json.dumps({"error": str(error)}))
"""
BATCHES, FACTORS = (8, 4, 2, 1), (1 / 3, 1.0, 3.0)


def run_cell(data: Path, opt: str, batch_size: int, factor: float, seed: int) -> dict[str, object]:
    """One run; its validation top-1."""
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            data=str(data / "clothing"), model="mobilenetv2_035", output=f"{folder}/run",
            checkpoint=str(data / "weights" / "mobilenetv2_035_keras.timm.safetensors"),
            model_kwargs={"pad_type": "same"}, mean=(0.5,) * 3, std=(0.5,) * 3, img_size=96, batch_size=batch_size,
            epochs=1, opt=opt, seed=seed, workers=0, device="cpu",
        )  # fmt: skip
        config.lr = factor * config.peak_lr()
        done = subprocess.run(
            [sys.executable, "-c", CELL, json.dumps(config.to_dict())], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    kept = {k: result[k] for k in ("steps", "last_top1", "error") if k in result}
    return {"opt": opt, "batch_size": batch_size, "factor": round(factor, 3), "lr": config.lr, "seed": seed, **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--opts", default="sgd,adamw")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    cells = json.loads(OUTPUT.read_text())["cells"] if OUTPUT.is_file() else []
    have = {(c["opt"], c["batch_size"], c["factor"], c["seed"]) for c in cells}
    todo = [
        (opt, batch, factor, seed) for seed in range(arguments.seeds) for opt in arguments.opts.split(",")
        for batch in BATCHES for factor in FACTORS if (opt, batch, round(factor, 3), seed) not in have
    ]  # fmt: skip
    lock = Lock()

    def work(cell: tuple[str, int, float, int]) -> None:
        result = run_cell(arguments.data, *cell)
        with lock:
            cells.append(result)
            cells.sort(key=lambda c: (c["opt"], c["batch_size"], c["factor"], c["seed"]))
            report = {**provenance("python -m benchmarks.study.auto_lr --data ../shared/data"), "cells": cells}
            OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
            print(result, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, todo))


if __name__ == "__main__":
    main()
