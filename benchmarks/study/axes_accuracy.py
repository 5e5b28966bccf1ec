"""What principal axes of the patches are worth to a network with dense 3x3 convs, beside a diagonal alone.

    python -m benchmarks.study.axes_accuracy --data ../shared/data --work FOLDER [--only diagonal] [--jobs 2]

The ResNet-10-T that comparisons.py trains on clothing (FOLDER has or gets it), moved to the hands at batch size 2, as
in the comparison hands-resnet, at its best rate and at a lower one, with nine seeds. Writes
benchmarks/results/axes_accuracy.json after every run; runs that are there already are not made again.
benchmarks/documents/readme.py makes the table of docs/experiments.md of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS, NETWORKS, weights
from benchmarks.study.patched import accuracies, measure
from cbn_convert import FinetuneConfig
from cbn_convert.norm import carried, functional
from cbn_convert.training.splits import read_splits

OUTPUT = RESULTS / "axes_accuracy.json"
COMMAND = "python -m benchmarks.study.axes_accuracy --data ../shared/data --work FOLDER"
IMAGES, BATCH_SIZE, LRS, SEEDS = 1000, 2, (0.00949, 0.00671), 9
# what is called in the process of a run, before it begins
FORMS: dict[str, list[Any] | None] = {
    "default": None,
    "diagonal": ["axes_accuracy", "use", 0],
    "turns-1": ["axes_accuracy", "turns", 1],
    "last-128": ["axes_accuracy", "last", 128],
    "axes-2": ["axes_accuracy", "use", 2],
    "mean": ["mechanism", "follow", "mean"],
    "variance": ["mechanism", "follow", "variance"],
}


def use(count: int) -> None:
    """Makes all windows of this process look for so many axes."""
    mock.patch.object(functional, "AXES", count).start()


def last(count: int) -> None:
    """Makes all windows of this process remember patches of so many looks."""
    mock.patch.object(carried, "PATCH_LOOKS", count).start()


def turns(count: int) -> None:
    """Makes all windows of this process look at patches in one look of so many."""
    mock.patch.object(carried, "PATCH_TURNS", count).start()


def run(cell: dict[str, Any], data: Path, work: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    shown, folder = DATA["hands"], str(data / FOLDERS["hands"])
    steps = IMAGES // BATCH_SIZE
    per_epoch = len(read_splits(folder, None, 0)[0].samples) // BATCH_SIZE
    config = FinetuneConfig(
        data=folder, model=NETWORKS["resnet"]["model"], output="-", checkpoint=str(weights("resnet", data, work, 1)),
        img_size=shown["img-size"], hflip=shown["hflip"], min_scale=shown["min-scale"], norm="cbn", lr=cell["lr"],
        batch_size=BATCH_SIZE, seed=cell["seed"], max_steps=steps, epochs=1 + -(-steps // per_epoch),
    )  # fmt: skip
    return accuracies(config, FORMS[cell["form"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and sign_digits/")
    parser.add_argument("--work", type=Path, required=True, help="as of comparisons.py")
    parser.add_argument("--only", default=",".join(FORMS), help="forms, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data, work, forms = given.data.resolve(), given.work.resolve(), given.only.split(",")
    todo = [{"form": form, "lr": lr, "seed": seed} for lr in LRS for seed in range(SEEDS) for form in forms]
    measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, data, work), given.jobs)


if __name__ == "__main__":
    main()
