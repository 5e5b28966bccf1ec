"""What remains of CBN's lead where the new head learns faster, or slower, than the pretrained network before it?

    python -m benchmarks.study.head_rate --data ../shared/data [--only hands-lite0] [--jobs 2]

EfficientNet-Lite0 and MobileNetV1-0.25, two images per step, on the hands and the clothing: the head at 1/10, 1 and 10
times the rate of the rest, the last as the Transfer-Learning-Library has it. Rates √10 apart with seed 0, until the
best on validation has none that is better on either side, and that one with two more seeds. Writes
benchmarks/results/head_rate.json after every run; runs that are there already are not made again.
benchmarks/documents/experiments.py makes the table of docs/experiments.md of it.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS, NETWORKS
from benchmarks.study.patched import accuracies, measure
from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "head_rate.json"
COMMAND = "python -m benchmarks.study.head_rate --data ../shared/data"
SUBJECTS = {  # name: photos, network, size of images
    "hands-lite0": ("hands", "lite0", 128),
    "clothing-lite0": ("clothing", "lite0", 128),
    "hands-v1": ("hands", "v1", 96),
    "clothing-v1": ("clothing", "v1", 96),
}
NORMS, FACTORS, SEEDS = ("frozen", "cbn"), (0.1, 1.0, 10.0), 3
RATES = [float(f"{3e-3 * 10 ** (place / 2):.3g}") for place in range(-6, 7)]  # of all but the head
FIRST = [lr for lr in RATES if 3e-4 <= lr <= 3e-2]  # are tried in any case
STEPS, BATCH_SIZE = 500, 2


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    photos, name, size = SUBJECTS[cell["subject"]]
    shown, network = DATA[photos], NETWORKS[name]
    channels = {k: (float(network[k]),) * 3 for k in ("mean", "std") if k in network}
    config = {
        "data": str(data / FOLDERS[photos]), "model": network["model"], **channels,
        "checkpoint": str(data / "weights" / network["checkpoint"]), "img_size": size, "hflip": shown.get("hflip", 0.5),
        "min_scale": shown["min-scale"], "norm": cell["norm"], "lr": cell["lr"], "batch_size": BATCH_SIZE,
        "seed": cell["seed"], "max_steps": STEPS, "eval_every": STEPS, "epochs": 20, "head_lr_scale": cell["factor"],
    }  # fmt: skip
    return accuracies(FinetuneConfig(**config, output=""))


def best_rate(cells: list[dict[str, Any]], subject: str, norm: str, factor: float) -> float | None:
    """The one at which seed 0 is best on the validation photos; None where none of these runs is there."""
    at = {"subject": subject, "norm": norm, "factor": factor, "seed": 0}
    own = [c for c in cells if at.items() <= c.items() and "top1" in c]
    return max(own, key=lambda c: (c["top1"], -c["lr"]))["lr"] if own else None


def at_best_rate(cells: list[dict[str, Any]], subject: str, norm: str, factor: float) -> list[dict[str, Any]]:
    """The runs at the rate of `best_rate` that ended well, of all seeds."""
    at = {"subject": subject, "norm": norm, "factor": factor, "lr": best_rate(cells, subject, norm, factor)}
    return [cell for cell in cells if at.items() <= cell.items() and "top1" in cell]


def best_factor(cells: list[dict[str, Any]], subject: str, norm: str) -> float:
    """The one whose runs are best on the validation photos; of equals the one nearest to 1, and then the lowest."""

    def rank(factor: float) -> tuple[float, float, float]:
        top1 = mean(cell["top1"] for cell in at_best_rate(cells, subject, norm, factor))
        return round(top1, 6), -abs(math.log(factor)), -factor

    return max(FACTORS, key=rank)


def searched(cells: list[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    """The runs of seed 0 that are known to be needed: the first rates, and one beyond a best that is at the edge."""
    todo = []
    for factor, norm in product(FACTORS, NORMS):
        tried = {c["lr"] for c in cells if (c["subject"], c["norm"], c["factor"]) == (subject, norm, factor)}
        best, rates = best_rate(cells, subject, norm, factor), set(FIRST)
        if best is not None:
            place = RATES.index(best)
            rates.update(RATES[max(place - 1, 0) : place + 2])
        todo += [
            {"subject": subject, "norm": norm, "factor": factor, "lr": lr, "seed": 0} for lr in sorted(rates - tried)
        ]
    return sorted(todo, key=lambda cell: cell["lr"])


def read() -> list[dict[str, Any]]:
    """The runs that there are."""
    return json.loads(OUTPUT.read_text())["cells"] if OUTPUT.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="photos and networks, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data = given.data.resolve()
    for subject in given.only.split(","):
        while todo := searched(read(), subject):
            measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, data), given.jobs)
        repeated = [
            {"subject": subject, "norm": norm, "factor": factor, "lr": lr, "seed": seed}
            for seed, factor, norm in product(range(1, SEEDS), FACTORS, NORMS)
            if (lr := best_rate(read(), subject, norm, factor)) is not None
        ]
        measure(OUTPUT, COMMAND, repeated, lambda cell: run(cell, data), given.jobs)


if __name__ == "__main__":
    main()
