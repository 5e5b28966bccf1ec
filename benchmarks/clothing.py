"""Fine-tunes MobileNetV2-0.35 (ImageNet) on clothing photos at batch size 2 with several norms and learning rates.

    python benchmarks/clothing.py --data ../shared/data

One epoch of 3,068 images at 96 px, SGD without gradient clipping, one cell per norm and learning rate, one thread per
cell. Writes benchmarks/results/clothing_batch2.json after every cell; cells that are there already are not run again.
Timings are not recorded: cells run side by side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from report import provenance

OUTPUT = Path(__file__).parent / "results" / "clothing_batch2.json"
GRID = {
    "bn": (1e-4, 3e-4, 1e-3, 3e-3),
    "frozen": (3e-5, 1e-4, 3e-4, 1e-3),
    "cbn": (1e-4, 3e-4, 5e-4, 1e-3),
    "cbn-ring8": (3e-4,),
    "cbn-published": (3e-4,),
}
VARIANTS = {
    "cbn-ring8": {"window": 8, "history": "ring"},
    "cbn-published": {"window": 8, "history": "ring", "compensation": "taylor", "gradient": "current"},
}

CELL = """
import json, sys, torch, cbn_convert as cbn
torch.set_num_threads(1)
try:
    print(json.dumps(cbn.finetune(cbn.FinetuneConfig(**json.loads(sys.argv[1])), quiet=True).to_dict()))
except cbn.CbnError as error:
    print(json.dumps({"error": str(error)}))
"""


def run_cell(data: Path, norm: str, lr: float, seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "data": str(data / "clothing"),
            "model": "mobilenetv2_035",
            "checkpoint": str(data / "weights" / "mobilenetv2_035_keras.timm.safetensors"),
            "model_kwargs": {"pad_type": "same"},
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "img_size": 96,
            "batch_size": 2,
            "epochs": 1,
            "norm": norm.partition("-")[0],
            **VARIANTS.get(norm, {}),
            "lr": lr,
            "clip_grad": 0.0,
            "seed": seed,
            "workers": 0,
            "output": f"{folder}/run",
        }
        done = subprocess.run(
            [sys.executable, "-c", CELL, json.dumps(config)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    kept = {k: result[k] for k in ("steps", "last_top1", "error") if k in result}
    return {"norm": norm, "lr": lr, "seed": seed, **kept}


def main() -> None:

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    report = {**provenance("python " + " ".join(["benchmarks/clothing.py", *sys.argv[1:]])), "cells": []}
    if OUTPUT.is_file():
        report["cells"] = json.loads(OUTPUT.read_text())["cells"]
    OUTPUT.parent.mkdir(exist_ok=True)
    have = {(c["norm"], c["lr"], c["seed"]) for c in report["cells"]}
    todo = [(n, lr, s) for s in range(arguments.seeds) for n, lrs in GRID.items() for lr in lrs]
    lock = Lock()

    def work(cell: tuple[str, float, int]) -> None:
        result = run_cell(arguments.data, *cell)
        with lock:
            report["cells"].append(result)
            report["cells"].sort(key=lambda c: (c["norm"], c["lr"], c["seed"]))
            OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
            print(result, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, [cell for cell in todo if cell not in have]))


if __name__ == "__main__":
    main()
