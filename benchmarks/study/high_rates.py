"""Over which learning rates do networks train with CBN and with other norms, two images per step?

    python -m benchmarks.study.high_rates --data ../shared/data [--only resnet56] [--jobs 2]

ResNet-56 with CIFAR-10's weights on the hands, where two images per step are enough for BN; and MobileNetV2-0.35 with
ImageNet's on the hands and the clothing, at rates a factor of two apart, with the gradient's norm clipped at 5, as
`cbn finetune` does, and without. Every rate with every seed. Writes benchmarks/results/high_rates.json after every run;
runs that are there already are not made again. benchmarks/documents/readme.py makes the table of docs/experiments.md of
it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS
from benchmarks.study.patched import accuracies, measure
from cbn_convert import FinetuneConfig

OUTPUT = RESULTS / "high_rates.json"
COMMAND = "python -m benchmarks.study.high_rates --data ../shared/data"
BATCH_SIZE, SEEDS = 2, 3
_V2 = {
    "model": "mobilenetv2_035", "checkpoint": "mobilenetv2_035_keras.timm.safetensors",
    "model_kwargs": {"pad_type": "same"}, "mean": (0.5,) * 3, "std": (0.5,) * 3, "max_steps": 500, "img_size": 96,
}  # fmt: skip
_RESNET = {
    "model": "resnet56_cifar", "checkpoint": "resnet56_cifar10.safetensors", "max_steps": 700, "img_size": 48
}  # fmt: skip


class Subject(NamedTuple):
    """A network on one set of photos, and the norms and rates that it is trained with."""

    title: str
    data: str
    settings: dict[str, Any]  # of FinetuneConfig
    norms: tuple[str, ...] = ("cbn", "frozen", "tune")
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


_RATES = {"norms": ("cbn", "bn", "brn", "frozen"), "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
_FREE, _LOWER = {**_V2, "clip_grad": 0.0}, (3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SUBJECTS = {
    "resnet56": Subject("ResNet-56 with CIFAR-10's weights, hands", "hands", _RESNET, **_RATES),
    "hands": Subject("MobileNetV2-0.35 with ImageNet's, hands", "hands", _V2),
    "clothing": Subject("MobileNetV2-0.35, clothing", "clothing", _V2),
    "hands-unclipped": Subject("MobileNetV2-0.35, hands, without clipping", "hands", _FREE, rates=_LOWER),
    "clothing-unclipped": Subject("MobileNetV2-0.35, clothing, without clipping", "clothing", _FREE, rates=_LOWER),
}


def configured(subject: Subject, data: Path, norm: str, lr: float, seed: int) -> FinetuneConfig:
    """The settings of a run but for where it writes."""
    shown, weights = DATA[subject.data], data / "weights" / subject.settings["checkpoint"]
    return FinetuneConfig(
        **{**subject.settings, "checkpoint": str(weights)}, data=str(data / FOLDERS[subject.data]), output="-",
        hflip=shown.get("hflip", 0.5), min_scale=shown["min-scale"], norm=norm, lr=lr, batch_size=BATCH_SIZE, seed=seed,
        epochs=1,
    )  # fmt: skip


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    return accuracies(configured(SUBJECTS[cell["subject"]], data, cell["norm"], cell["lr"], cell["seed"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects, separated by commas")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    todo = [
        {"subject": subject, "norm": norm, "lr": lr, "seed": seed}
        for seed in range(given.seeds)
        for subject in given.only.split(",")
        for lr in SUBJECTS[subject].rates
        for norm in SUBJECTS[subject].norms
    ]
    measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, given.data.resolve()), given.jobs)


if __name__ == "__main__":
    main()
