"""What the carried window owes to its parts: length, gradient, how often a layer looks, at how many positions, and d.

    python -m benchmarks.study.carried_forms --data ../shared/data [--only every-2,even] [--jobs 2]

The cells of `cbn compare` for CBN at batch size 2, as in the comparisons hands-v2-short and clothing-v2-short of
study.py, at the rate that was best there on both, with the same images and seeds. Only the window of a run is another
one. Writes benchmarks/results/carried_forms.json after every cell; cells that are there already are not run again.
benchmarks/documents/readme.py makes the table of docs/experiments.md of it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS, NETWORKS
from benchmarks.study.patched import lasting, measure, outcome
from cbn_convert import FinetuneConfig
from cbn_convert.comparison.config import ComparisonConfig
from cbn_convert.files import read_json
from cbn_convert.norm import Window, carried, functional
from cbn_convert.norm.kernels import forced
from cbn_convert.training.splits import read_splits

OUTPUT = RESULTS / "carried_forms.json"
COMMAND = "python -m benchmarks.study.carried_forms --data ../shared/data"
IMAGES, BATCH_SIZE, LR, SEEDS = 1000, 2, 3e-3, 3
# what is called in the process of a run, before it begins; first what a default is most in doubt for
FORMS: dict[str, list[Any] | None] = {
    "default": None,
    "late": ["carried_forms", "late"],
    "every-2": ["carried_forms", "set_window", {"every": 2}],
    "every-32": ["carried_forms", "set_window", {"every": 32}],
    "current": ["carried_forms", "set_window", {"gradient": "current"}],
    "diagonal": ["carried_forms", "diagonal"],
    "even": ["carried_forms", "even"],
    **{f"window-{size}": ["carried_forms", "set_window", {"size": size}] for size in (1024, 65536, 4096, 16384)},
    "positions-128": ["carried_forms", "set_window", {"positions": 128}],
    "positions-all": ["carried_forms", "set_window", {"positions": None}],
}


def set_window(changes: dict[str, Any]) -> None:
    """Makes the fine-tuning of this process use a window with these fields."""
    window = FinetuneConfig.normalization_window

    def changed(self: FinetuneConfig) -> Window:
        return replace(window(self), **changes)

    FinetuneConfig.normalization_window = changed  # type: ignore[method-assign]


def late() -> None:
    """Makes all windows of this process look in turns from their second step on."""
    mock.patch.object(carried, "FIRST_LOOKS", 1).start()


def diagonal() -> None:
    """Makes all windows of this process do without axes."""
    mock.patch.object(functional, "AXES", 0).start()


def even() -> None:
    """Makes all windows of this process take every entry of a patch to vary alike: d = 1, and S grows with θ·θ."""
    diagonal()
    mock.patch.object(carried, "_at_least", torch.ones_like).start()
    lasting(forced("plain"))  # compiled kernels have the formula of their own


def comparison(images: str, data: Path) -> ComparisonConfig:
    """The settings that the cells of all forms share; `data` is read by runs only."""
    network, shown = NETWORKS["v2"], DATA[images]
    run = FinetuneConfig(
        data=str(data / FOLDERS[images]), model=network["model"], output="-",
        checkpoint=str(data / "weights" / network["checkpoint"]),
        model_kwargs=dict([network["model-kwargs"].split("=")]),
        mean=(float(network["mean"]),) * 3, std=(float(network["std"]),) * 3,
        img_size=shown["img-size"], hflip=shown.get("hflip", 0.5), min_scale=shown["min-scale"],
    )  # fmt: skip
    return ComparisonConfig(run, norms=("cbn",), batch_sizes=(BATCH_SIZE,), images=IMAGES, seeds=SEEDS, reference=0)


def results(form: str, images: str) -> list[dict[str, Any]]:
    """The cells of a form that are there."""
    cells = read_json(OUTPUT, "cells")["cells"] if OUTPUT.is_file() else []
    return [cell for cell in cells if (cell["form"], cell["data"]) == (form, images)]


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    config = comparison(cell["data"], data)
    settings = config.cell("cbn", BATCH_SIZE, LR, cell["seed"]).to_dict()
    steps = IMAGES // BATCH_SIZE
    per_epoch = len(read_splits(settings["data"], None, 0)[0].samples) // BATCH_SIZE
    settings |= {"max_steps": steps, "epochs": 1 + -(-steps // per_epoch)}
    for name in ("output", "workers", "device"):
        del settings[name]
    found = outcome(settings, FORMS[cell["form"]], tested=True)
    kept = ("error", "top1", "test_top1", "steps", "step_seconds", "peak_memory")
    return {k: v for k, v in found.items() if k in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(FORMS), help="forms, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data, forms = given.data.resolve(), given.only.split(",")
    todo = [{"data": images, "form": form, "seed": seed} for form in forms for images in DATA for seed in range(SEEDS)]
    measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, data), given.jobs)


if __name__ == "__main__":
    main()
