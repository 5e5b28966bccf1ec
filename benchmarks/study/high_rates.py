"""Over which learning rates do networks train with CBN, BN, Batch Renorm and frozen BN, two images per step?

    python -m benchmarks.study.high_rates --data ../shared/data [--only resnet56] [--jobs 2]

ResNet-56 with CIFAR-10's weights on the hands, where two images per step are enough for BN, and MobileNetV2-0.35 with
ImageNet's on the hands and the clothing, 1,400 and 1,000 images, gradients clipped at 5 as `cbn finetune` does; every
rate with every seed. Writes benchmarks/results/high_rates.json after every run; runs that are there already are not
made again. benchmarks/documents/readme.py makes the table of docs/experiments.md of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS
from benchmarks.study.patched import accuracies, measure
from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "high_rates.json"
COMMAND = "python -m benchmarks.study.high_rates --data ../shared/data"
NORMS, BATCH_SIZE, SEEDS = ("cbn", "bn", "brn", "frozen"), 2, 3
_V2 = {
    "model": "mobilenetv2_035", "checkpoint": "mobilenetv2_035_keras.timm.safetensors",
    "model_kwargs": {"pad_type": "same"}, "mean": (0.5,) * 3, "std": (0.5,) * 3, "max_steps": 500, "img_size": 96,
}  # fmt: skip
_RESNET = {
    "model": "resnet56_cifar", "checkpoint": "resnet56_cifar10.safetensors", "max_steps": 700, "img_size": 48
}  # fmt: skip
# name: data, what the network is, rates
SUBJECTS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "resnet56": ("hands", _RESNET, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "hands": ("hands", _V2, (1e-3, 3e-3, 1e-2, 3e-2)),
    "clothing": ("clothing", _V2, (1e-3, 3e-3, 1e-2, 3e-2)),
}


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    images, network, _ = SUBJECTS[cell["subject"]]
    shown = DATA[images]
    config = FinetuneConfig(
        **{**network, "checkpoint": str(data / "weights" / network["checkpoint"])}, data=str(data / FOLDERS[images]),
        output="-", hflip=shown.get("hflip", 0.5), min_scale=shown["min-scale"], norm=cell["norm"], lr=cell["lr"],
        batch_size=BATCH_SIZE, seed=cell["seed"], epochs=1,
    )  # fmt: skip
    return accuracies(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    todo = [
        {"subject": subject, "norm": norm, "lr": lr, "seed": seed}
        for subject in given.only.split(",")
        for seed in range(SEEDS)
        for lr in SUBJECTS[subject][2]
        for norm in NORMS
    ]
    measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, given.data.resolve()), given.jobs)


if __name__ == "__main__":
    main()
