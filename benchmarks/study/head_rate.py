"""What remains of CBN's lead where the new head learns faster, or slower, than the pretrained network before it?

    python -m benchmarks.study.head_rate --data ../shared/data [--only hands] [--jobs 2]

EfficientNet-Lite0, two images per step, on the hands and the clothing: the head at 1/10, 1 and 10 times the rate of the
rest, the last as the Transfer-Learning-Library has it. Rates √10 apart with seed 0, and the rate best on validation
with two more seeds. Writes benchmarks/results/head_rate.json after every run; runs that are there already are not made
again. benchmarks/documents/experiments.py makes the table of docs/experiments.md of it.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

import cbn_convert.training.optimization
from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS, NETWORKS
from benchmarks.study.patched import measure, outcome

OUTPUT = RESULTS / "head_rate.json"
COMMAND = "python -m benchmarks.study.head_rate --data ../shared/data"
SUBJECTS = ("hands", "clothing")
NORMS, FACTORS, SEEDS = ("frozen", "cbn"), (0.1, 1.0, 10.0), 3
RATES = (3e-4, 9.49e-4, 3e-3, 9.49e-3, 3e-2)  # of all but the head
STEPS, BATCH_SIZE, IMG_SIZE = 500, 2, 128


def scale_head(factor: float) -> None:
    """Makes the optimizers of this process train a model's classifier at so many times the rate of the rest."""
    plain = cbn_convert.training.optimization.create_optimizer_v2

    def create(model: Any, **settings: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = plain(model, **settings)
        head = {id(p) for p in model.get_classifier().parameters()}
        groups = []
        for group, of_head in product(optimizer.param_groups, (False, True)):
            own = [p for p in group["params"] if (id(p) in head) == of_head]
            if own:  # timm's schedules read the scale
                groups.append({**group, "params": own, "lr_scale": factor if of_head else 1.0})
        optimizer.param_groups[:] = groups
        return optimizer

    cbn_convert.training.optimization.create_optimizer_v2 = create


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    shown, network = DATA[cell["subject"]], NETWORKS["lite0"]
    config = {
        "data": str(data / FOLDERS[cell["subject"]]), "model": network["model"],
        "checkpoint": str(data / "weights" / network["checkpoint"]), "mean": (float(network["mean"]),) * 3,
        "std": (float(network["std"]),) * 3, "img_size": IMG_SIZE, "hflip": shown.get("hflip", 0.5),
        "min_scale": shown["min-scale"], "norm": cell["norm"], "lr": cell["lr"], "batch_size": BATCH_SIZE,
        "seed": cell["seed"], "max_steps": STEPS, "eval_every": STEPS, "epochs": 20,
    }  # fmt: skip
    found = outcome(config, ["head_rate", "scale_head", cell["factor"]], tested=True)
    return {k: v for k, v in found.items() if k in ("error", "top1", "test_top1", "steps")}


def best_rate(cells: list[dict[str, Any]], subject: str, norm: str, factor: float) -> float | None:
    """The one at which seed 0 is best on the validation photos; None where none of these runs is there."""
    at = {"subject": subject, "norm": norm, "factor": factor, "seed": 0}
    own = [c for c in cells if at.items() <= c.items() and "top1" in c]
    return max(own, key=lambda c: c["top1"])["lr"] if own else None


def read() -> list[dict[str, Any]]:
    """The runs that there are."""
    return json.loads(OUTPUT.read_text())["cells"] if OUTPUT.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="photos, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data = given.data.resolve()
    for subject in given.only.split(","):
        searched = [
            {"subject": subject, "norm": norm, "factor": factor, "lr": lr, "seed": 0}
            for lr, factor, norm in product(RATES, FACTORS, NORMS)
        ]
        measure(OUTPUT, COMMAND, searched, lambda cell: run(cell, data), given.jobs)
        repeated = [
            {"subject": subject, "norm": norm, "factor": factor, "lr": lr, "seed": seed}
            for seed, factor, norm in product(range(1, SEEDS), FACTORS, NORMS)
            if (lr := best_rate(read(), subject, norm, factor)) is not None
        ]
        measure(OUTPUT, COMMAND, repeated, lambda cell: run(cell, data), given.jobs)


if __name__ == "__main__":
    main()
