"""Training steps with BN, frozen BN, tune, GroupNorm, CBN and the published algorithm, side by side.

    python -m benchmarks.speed.step_time [--device cuda] [--only mobilenetv2_100]

Writes benchmarks/results/step_time_cpu.json or step_time_cuda.json after every cell; a cell that is there already is
measured again only with --again. "over_bn" is the median over rounds of the ratio to BN's step of the same round;
"kept_over_bn" that of what the graph holds for the backward pass, with what the window remembers between steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.provenance import RESULTS, provenance
from benchmarks.speed.published import use_published
from cbn_convert.bench import COLUMNS, StepSettings, bench_inference, bench_step

COLUMNS["published"] = use_published
SMALL = ["bn", "frozen", "tune", "cbn"]


def cpu_cells() -> Iterator[dict[str, Any]]:
    """Steps that count are multiples of 8, in which each layer looks at its batch equally often."""
    nets = ("mobilenetv2_100", "resnet50")
    for arch in nets:
        yield {"arch": arch, "batch_size": 2, "img_size": 224, "columns": list(COLUMNS), "steps": 16}
        yield {"arch": arch, "batch_size": 8, "img_size": 224, "columns": [*SMALL, "gn"], "steps": 8}
    for arch in ("efficientnet_b0", "regnety_016", "densenet121"):
        yield {"arch": arch, "batch_size": 2, "img_size": 224, "columns": SMALL, "steps": 16}
    # small maps, where all is overhead; and large ones
    yield {"arch": "mobilenetv2_035", "batch_size": 2, "img_size": 96, "columns": SMALL, "steps": 80}
    for arch in nets:
        yield {"arch": arch, "batch_size": 1, "img_size": 224, "columns": SMALL, "steps": 16}
        yield {"arch": arch, "batch_size": 2, "img_size": 512, "columns": SMALL, "steps": 8}
        yield {"arch": arch, "batch_size": 1, "img_size": 1024, "columns": SMALL, "steps": 8}
        for batch in (2, 8):
            yield {"arch": arch, "batch_size": batch, "img_size": 224, "columns": "inference", "steps": 20}


def cuda_cells() -> Iterator[dict[str, Any]]:
    fast = {"dtype": "bfloat16", "channels_last": True}
    for arch in ("resnet50", "mobilenetv2_100", "efficientnet_b0", "regnety_016", "densenet121"):
        for batch in (1, 2, 4, 8):
            for size in (224, 512):
                base = {"arch": arch, "batch_size": batch, "img_size": size, "steps": 20}
                yield {**base, **fast, "columns": list(COLUMNS)}
                if batch in (2, 8):
                    yield {**base, "columns": SMALL}
                    if size == 224:
                        yield {**base, **fast, "compile": True, "columns": SMALL}
                        yield {**base, "columns": "inference"}


def run(cell: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """What a cell measures: training steps side by side, or inference."""
    options = {"device": device, **cell}
    options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    arch, columns, steps = (options.pop(name) for name in ("arch", "columns", "steps"))
    settings = StepSettings(**options)
    if columns == "inference":
        milliseconds, ratio = bench_inference(arch, settings, steps=steps)
        return [{"plain_ms": milliseconds, "folded_over_plain": ratio}]
    return [r._asdict() for r in bench_step(arch, columns, settings, steps=steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--again", action="store_true", help="measure cells that the report has already")
    arguments = parser.parse_args()
    output = RESULTS / f"step_time_{arguments.device}.json"
    cells = json.loads(output.read_text())["cells"] if output.is_file() and not arguments.again else []
    for cell in cpu_cells() if arguments.device == "cpu" else cuda_cells():
        known = [{k: v for k, v in c.items() if k != "results"} for c in cells]
        if cell in known or (arguments.only and cell["arch"] not in arguments.only.split(",")):
            continue
        # in a process of its own, which gives all memory back
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            cells.append({**cell, "results": process.submit(run, cell, arguments.device).result()})
        command = f"python -m benchmarks.speed.step_time --device {arguments.device}"
        output.write_text(json.dumps({**provenance(command), "cells": cells}, indent=1) + "\n")
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
