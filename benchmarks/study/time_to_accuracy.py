"""Images and seconds of training until a validation top-1 is reached, for each norm at its best rate.

    python -m benchmarks.study.time_to_accuracy --data ../shared/data

MobileNetV2-0.35 (ImageNet) on clothing photos at 96 px, 4,000 images, evaluated every 320; the rates of CBN, frozen
BN and BN at 32 are the best of the comparison clothing-v2-long, BN's at 2 is that of clothing-v2-short. One
thread for a run, two runs side by side. Seconds are those of training, without evaluation. Writes
benchmarks/results/time_to_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, provenance
from benchmarks.study.comparisons import as_flags, cbn

OUTPUT = RESULTS / "time_to_accuracy.json"
IMAGES, EVERY = 4000, 320
# norm, batch size, peak rate
RUNS = [("cbn", 2, 3e-3), ("frozen", 2, 9.5e-4), ("bn", 2, 3e-3), ("bn", 32, 3.8e-2)]
LEVELS = (50, 60, 65, 70, 75)


def run(data: Path, norm: str, batch_size: int, lr: float, seed: int) -> dict[str, Any]:
    """One run; its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model": "mobilenetv2_035", "checkpoint": data / "weights" / "mobilenetv2_035_keras.timm.safetensors",
            "model-kwargs": "pad_type=same", "mean": 0.5, "std": 0.5, "img-size": 96, "min-scale": 0.5, "norm": norm,
            "batch-size": batch_size, "lr": lr, "seed": seed, "epochs": 2, "max-steps": IMAGES // batch_size,
            "eval-every": EVERY // batch_size, "output": f"{folder}/run", "quiet": True,
        }  # fmt: skip
        cbn("finetune", [str(data / "clothing"), *as_flags(flags)])
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [
        {"images": r["step"] * batch_size, "seconds": round(r["train_seconds"], 2), "top1": round(r["top1"], 2)}
        for r in records
        if r["event"] == "eval"
    ]
    return {"norm": norm, "batch_size": batch_size, "lr": lr, "seed": seed, "evaluations": evaluations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    cells = [(given.data.resolve(), *settings, seed) for seed in range(given.seeds) for settings in RUNS]
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = list(pool.map(lambda cell: run(*cell), cells))
    report = provenance(f"python -m benchmarks.study.time_to_accuracy --data ../shared/data --seeds {given.seeds}")
    OUTPUT.write_text(json.dumps({**report, "images": IMAGES, "levels": LEVELS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
