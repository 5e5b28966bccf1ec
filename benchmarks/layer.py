"""The layer alone, not folded, forward and backward, beside nn.BatchNorm2d, torch's kernels and the memory's bandwidth.

    python benchmarks/layer.py [--device cuda]

Shapes are those of ResNet-50 and MobileNetV2 at 224 px. Layers are bound to nothing: a carried window, which looks at
one batch of eight, and the ring of two of new layers. Bytes that must move with statistics of the batch: the forward
pass reads x once for these and once to normalise, and writes y; the backward pass reads x and g twice and writes the
gradient of x. The bandwidth is that of a copy of 128 MB. "share of copy" is the time that those bytes would take over
the time taken. Writes benchmarks/results/layer_cpu.json or layer_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from report import RESULTS, provenance
from torch import Tensor, nn

from cbn_convert import CrossIterationBatchNorm2d, Window
from cbn_convert.norm.functional import Affine
from cbn_convert.norm.kernels import named, select

SHAPES = {
    "resnet50 stem": (64, 112),
    "resnet50 layer1": (256, 56),
    "resnet50 layer2": (512, 28),
    "resnet50 layer3": (1024, 14),
    "resnet50 layer4": (2048, 7),
    "mobilenetv2 block 1": (96, 112),
    "mobilenetv2 block 3": (144, 56),
    "mobilenetv2 block 8": (384, 14),
    "mobilenetv2 block 16": (960, 7),
}


def milliseconds(functions: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 3):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(own) for name, own in times.items()}


def step(norm: nn.Module, x: Tensor, g: Tensor) -> None:
    x.grad = None
    norm(x).backward(g)


def measure(batch: int, channels: int, size: int, device: torch.device, dtype: torch.dtype, last: bool) -> Any:
    fmt = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=fmt)
    g = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    plain = nn.BatchNorm2d(channels).to(device)
    carried = CrossIterationBatchNorm2d(channels, window=Window()).to(device)
    carried.running_mean.fill_(0.1)  # something to carry
    ring = CrossIterationBatchNorm2d(channels, window=Window().for_new_layer()).to(device)
    for _ in range(3):
        step(carried, leaf, g)
        step(ring, leaf, g)
    functions: dict[str, Callable[[], object]] = {
        "nn.BatchNorm2d": lambda: step(plain, leaf, g),
        "carried window": lambda: step(carried, leaf, g),
        "ring of two": lambda: step(ring, leaf, g),
    }
    ones = torch.ones(channels, device=device)
    affine = Affine(ones, ones, ones)
    chosen = select(x)
    others = ["cpu", "plain"] if device.type == "cpu" else ["plain"]
    for name, kernels in (("chosen", chosen), *((n, named(n)) for n in others)):
        functions[f"{name}: forward"] = lambda k=kernels: (k.statistics(x), k.normalize(x, affine))
        functions[f"{name}: backward"] = lambda k=kernels: k.backward(g, x, affine, ones, 0.1, None)
    return milliseconds(functions, device, 30 if x.numel() < 2**22 else 12), x.numel() * x.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = torch.device(parser.parse_args().device)
    source, target = (torch.ones(2**25, device=device) for _ in range(2))
    copy = milliseconds({"copy": lambda: target.copy_(source)}, device, 30)["copy"]
    bandwidth = 2 * source.numel() * 4 / copy / 1e6  # GB/s, read and written
    cells = []
    kinds = [(torch.float32, False)]
    if device.type == "cuda":
        kinds += [(torch.bfloat16, False), (torch.bfloat16, True)]
    for dtype, last in kinds:
        for batch in (2, 8) if device.type == "cpu" else (2, 8, 64):
            for name, (channels, size) in SHAPES.items():
                times, count = measure(batch, channels, size, device, dtype, last)
                limits = {"forward": 3 * count / bandwidth / 1e6, "backward": 5 * count / bandwidth / 1e6}
                cells.append(
                    {
                        "shape": name, "size": [batch, channels, size, size], "dtype": str(dtype).split(".")[1],
                        "channels_last": last, "megabytes": count / 1e6, "ms": times,
                        "share of copy": {k: v / times[f"chosen: {k}"] for k, v in limits.items()},
                    }
                )  # fmt: skip
                print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    report = {**provenance(f"python benchmarks/layer.py --device {device}"), "copy_gb_per_s": bandwidth, "cells": cells}
    (RESULTS / f"layer_{device}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
