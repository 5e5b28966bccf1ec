"""How far two data sets are from ImageNet, as `cbn finetune` measures it, on three networks.

python -m benchmarks.study.statistics_shift --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from pathlib import Path

import torch

from benchmarks.provenance import RESULTS, provenance
from benchmarks.study.comparisons import DATA, FOLDERS, HERE, NETWORKS
from cbn_convert.training.advice import measure
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.setup import build


def shift(images: str, network: str, data: Path, seed: int) -> float | None:
    """Nats on 64 training images that the seed chooses."""
    flags = NETWORKS[network]
    statistics = {key: (float(flags[key]),) * 3 for key in ("mean", "std") if key in flags}
    config = FinetuneConfig(
        data=str(data / FOLDERS[images]), model=flags["model"], output=tempfile.gettempdir(), norm="bn", seed=seed,
        checkpoint=str(data / "weights" / flags["checkpoint"]), img_size=DATA[images]["img-size"], workers=0,
        model_kwargs=dict([flags["model-kwargs"].split("=")] if "model-kwargs" in flags else []), **statistics,
    )  # fmt: skip
    setup = build(config)
    return measure(setup.model, setup, config, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    data = parser.parse_args().data
    runpy.run_path(str(HERE / "more_models" / "sitecustomize.py"))
    networks = [n for n, flags in NETWORKS.items() if (data / "weights" / flags.get("checkpoint", "-")).is_file()]
    cells = [
        {"data": images, "model": NETWORKS[network]["model"], "seed": seed, "nats": shift(images, network, data, seed)}
        for images in DATA
        for network in networks
        for seed in range(3)
    ]
    report = {**provenance("python -m benchmarks.study.statistics_shift --data ../shared/data"), "cells": cells}
    (RESULTS / "statistics_shift.json").write_text(json.dumps(report).replace("}, {", "},\n{") + "\n")


if __name__ == "__main__":
    main()
