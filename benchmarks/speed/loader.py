"""Images per second of the loader alone, of training alone, and of both together, in turns.

    python -m benchmarks.speed.loader --data ../shared/data/clothing [--device cuda]

The photos of the folder are enlarged to `--pixels` on the shorter side first, as JPEG, for the loader to have work.
Training alone repeats one update on images that are in memory. If both together are as fast as training alone, the
loader is not the bottleneck. Medians of the rounds. Writes benchmarks/results/loader_cpu.json or loader_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from benchmarks.provenance import RESULTS, provenance
from cbn_convert import FinetuneConfig
from cbn_convert.training.learner import Learner
from cbn_convert.training.loading import batches, training_loader
from cbn_convert.training.parallel import Ranks
from cbn_convert.training.setup import build

CASES = (("mobilenetv2_035", 96, 2), ("mobilenetv2_100", 224, 2), ("resnet50", 224, 2))


def enlarged(data: Path, folder: Path, pixels: int, images: int) -> Path:
    """A copy of some photos of each class with this shorter side."""
    for split, count in (("train", images), ("val", 10)):
        for kind in sorted((data / split).iterdir()):
            (folder / split / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[: count // 10]:
                with Image.open(path) as image:
                    factor = pixels / min(image.size)
                    size = (round(image.width * factor), round(image.height * factor))
                    image.convert("RGB").resize(size).save(folder / split / kind.name / path.name, quality=90)
    return folder


def measure(data: Path, case: tuple[str, int, int], workers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of the three."""
    model, size, batch = case
    config = FinetuneConfig(
        data=str(data), model=model, output="none", pretrained=False, img_size=size, batch_size=batch, workers=workers,
        device=arguments.device,
    )  # fmt: skip
    setup = build(config)
    loader, sampler = training_loader(setup.training, setup.data_config, config)
    learner = Learner(config, setup, Accelerator(cpu=arguments.device == "cpu"), Ranks(), 10_000)
    learner.wrapped.train()
    fixed = [next(iter(batches(loader)))]
    rates: dict[str, list[float]] = {"loader": [], "training": [], "both": []}
    for number in range(arguments.rounds + 1):
        for what in rates:
            sampler.start(epoch=number)
            source = batches(loader)
            next(source)  # the processes are there, and have begun
            started = time.perf_counter()
            for parts in (
                ([b] for b in islice(source, arguments.steps)) if what != "training" else [fixed] * arguments.steps
            ):
                if what != "loader":
                    learner.update(parts)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            rates[what].append(batch * arguments.steps / (time.perf_counter() - started))
    return {
        "model": model, "size": size, "batch_size": batch, "workers": workers,
        **{what: median(own[1:]) for what, own in rates.items()},
        "both_over_training": median(b / t for b, t in zip(rates["both"][1:], rates["training"][1:], strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pixels", type=int, default=480)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="0,2")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = enlarged(arguments.data, Path(folder) / "photos", arguments.pixels, 200)
        for case in CASES:
            for workers in map(int, arguments.workers.split(",")):
                rows.append(measure(data, case, workers, arguments))
                print(rows[-1], file=sys.stderr, flush=True)
    report = {
        **provenance(f"python -m benchmarks.speed.loader --data ../shared/data/clothing --device {arguments.device}"),
        "pixels": arguments.pixels, "steps": arguments.steps, "rounds": arguments.rounds, "rows": rows,
    }  # fmt: skip
    (RESULTS / f"loader_{arguments.device}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
