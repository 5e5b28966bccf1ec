"""Images per second of `cbn finetune`, loading and all, with each norm.

    python -m benchmarks.speed.throughput --data ../shared/data

MobileNetV2-0.35 on clothing photos at 96 px, where a step is mostly Python, at 2 and 8 images per step; everything else
is the default. All norms take turns, ROUNDS times; a run is STEPS updates in a process of its own, and its speed that
of what it did between evaluations. Writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.provenance import RESULTS, provenance
from benchmarks.study.auto_lr import CELL
from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "throughput.json"
NORMS, BATCH_SIZES, STEPS, ROUNDS = ("bn", "frozen", "tune", "cbn"), (2, 8), 320, 3


def measure(data: Path, norm: str, batch_size: int) -> dict[str, float]:
    """One run; images per second, and the share of the time in which it waited for images."""
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            data=str(data / "clothing"), model="mobilenetv2_035", output=f"{folder}/run", norm=norm,
            checkpoint=str(data / "weights" / "mobilenetv2_035_keras.timm.safetensors"), lr=1e-3,
            model_kwargs={"pad_type": "same"}, mean=(0.5,) * 3, std=(0.5,) * 3, img_size=96, batch_size=batch_size,
            max_steps=STEPS, eval_every=STEPS, seed=0, device="cpu",
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CELL, json.dumps(config.to_dict())], capture_output=True, text=True, check=True
        )
    result = json.loads(done.stdout.splitlines()[-1])
    return {name: result[name] for name in ("images_per_second", "median_step_seconds", "loader_wait")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    data = parser.parse_args().data.resolve()
    runs = []
    for turn in range(ROUNDS):
        for batch_size in BATCH_SIZES:
            for norm in NORMS:
                runs.append({"norm": norm, "batch_size": batch_size, "round": turn, **measure(data, norm, batch_size)})
                print(json.dumps(runs[-1]), flush=True)
    report = {**provenance("python -m benchmarks.speed.throughput --data ../shared/data"), "steps": STEPS, "runs": runs}
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
