"""Trains small networks with several norms over learning rates, optimizers, batch sizes and lengths of a ring.

    python -m benchmarks.study.stability --data ../shared/data [--only digits]

Every cell sees the same number of images whatever its batch size: SGD with momentum 0.9 (Nesterov) or AdamW, warm-up
over 5 % of the steps, cosine decay. A cell ends at the first loss that is not finite. Writes
benchmarks/results/stability.json after every cell; cells that are there already are not run again. What it gave for the
algorithm before the carried window is in results/former.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

import cbn_convert as cbn
from benchmarks.provenance import RESULTS, provenance
from cbn_convert.models import reset_head
from cbn_convert.norm import CrossIterationMixin, Window
from cbn_convert.training.alternatives import apply_norm

OUTPUT = RESULTS / "stability.json"
IMAGES = {"digits": 1437, "digits-residual": 1437, "sign_digits": 1000, "clothing": 1000}
SIZES = {"sign_digits": 64, "clothing": 96}

# Options of `convert`, or the name of another norm. The default is an average of batches in networks from scratch, and
# the carried window in the others.
COLUMNS: dict[str, Any] = {
    "cbn": {},
    "images": {"compensation": "none"},
    "taylor": {"window": 8, "compensation": "taylor"},
    "published": {"window": Window.PAPER},
    "averaging": {"window": 8, "compensation": "none"},
    "bn": "bn",
    "frozen": "frozen",
    **{f"ring-{k}": {"window": k} for k in (1, 2, 4, 8, 16, 32)},
    # layers without a weight of their own; the others are as in "cbn"
    "unbound-current-16": {"unbound": Window(history="ring", size=16, gradient="current")},
    **{f"unbound-{k}": {"unbound": Window(history="ring", size=k, gradient="straight_through")} for k in (1, 2, 4, 16)},
}
SCRATCH = ("cbn", "ring-8", "taylor", "published", "averaging", "bn")
TUNED = ("images", "ring-8", "taylor", "published", "averaging")


def grid() -> Iterator[dict[str, Any]]:
    """All cells, the cheapest questions first."""

    def cells(
        task: str, columns: Any, lrs: Any, batches: Any = (2,), opt: str = "sgd", clip: Any = (None,), seeds: int = 1
    ):
        for seed, batch, lr, c, column in product(range(seeds), batches, lrs, clip, columns):
            yield {"task": task, "column": column, "lr": lr, "batch": batch, "opt": opt, "clip": c, "seed": seed}

    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    unbound = [c for c in COLUMNS if c.startswith("unbound")]
    yield from cells("digits", SCRATCH, rates, (2, 32))
    yield from cells("digits", [c for c in COLUMNS if c.startswith("ring")], (3e-3, 3e-2))
    yield from cells("digits", SCRATCH, (1e-4, 1e-3, 1e-2), opt="adamw")
    yield from cells("digits", SCRATCH, rates, (8, 1))
    yield from cells("digits-residual", [*unbound, "bn"], (3e-3, 3e-2), (2, 1, 32), seeds=3)
    tuned = (3e-4, 1e-3, 3e-3, 1e-2)
    for task in ("sign_digits", "clothing"):
        yield from cells(task, ["cbn", "bn", "frozen"], tuned, clip=(5.0, None))
        yield from cells(task, ["bn"], tuned, (32,), clip=(5.0, None))
        yield from cells(task, TUNED, tuned[1:], clip=(5.0,))
        yield from cells(task, ["cbn", "bn", "frozen"], (1e-4, 1e-3), opt="adamw", clip=(5.0,))
    for task in ("sign_digits", "clothing"):
        yield from cells(task, ["cbn", "bn", "frozen"], (1e-3, 3e-3), clip=(5.0,), seeds=3)


class Residual(nn.Module):
    """A pre-activation block: its first norm has a sum as input, and so no weight of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return x + y


def build(task: str) -> nn.Module:
    if task == "digits":
        layers: list[nn.Module] = []
        widths = (1, 16, 16, 32, 32, 64, 64)
        for i, stride in enumerate((1, 1, 2, 1, 2, 1)):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    if task == "digits-residual":
        stem, head = nn.Conv2d(1, 32, 3, 1, 1), [nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(stem, *(Residual(32) for _ in range(3)), *head, nn.Linear(32, 10))
    model = timm.create_model("mobilenetv2_035", num_classes=10, pad_type="same")
    weights = load_file(ARGUMENTS.data / "weights" / "mobilenetv2_035_keras.timm.safetensors")
    model.load_state_dict(weights, strict=False)
    reset_head(model)
    return model


def put_norm(model: nn.Module, column: str, example: Tensor) -> None:
    options = COLUMNS[column]
    if isinstance(options, str):
        apply_norm(model, options)
        return
    unbound = options.get("unbound")
    cbn.convert(model, example_input=example, **{k: v for k, v in options.items() if k != "unbound"})
    for layer in model.modules():
        if unbound is not None and isinstance(layer, CrossIterationMixin) and not layer.producers:
            layer.set_window(unbound)


def images(task: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, uint8 [N, C, H, W], with a margin for random crops, and labels."""
    if task.startswith("digits"):
        data = load_digits()
        x, y = torch.tensor(data.images / 16 * 255).to(torch.uint8)[:, None], torch.tensor(data.target)
        return (x[:1437], y[:1437]) if split == "train" else (x[1437:], y[1437:])
    size = SIZES[task] * 9 // 8
    load = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    folder = ImageFolder(ARGUMENTS.data / task / split, load)
    pairs = list(folder)
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def crops(x: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Crops, random with a generator and central without, scaled to -1 .. 1."""
    margin = x.shape[-1] - size
    corners = torch.full((len(x), 2), margin // 2)
    if generator is not None:
        corners = torch.randint(margin + 1, (len(x), 2), generator=generator)
    cut = [im[:, i : i + size, j : j + size] for im, (i, j) in zip(x, corners.tolist(), strict=True)]
    return torch.stack(cut).float() / 127.5 - 1


def run(cell: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(cell["seed"])
    task, batch = cell["task"], cell["batch"]
    if task not in DATA:
        DATA[task] = (*images(task, "train"), *images(task, "test" if task.startswith("digits") else "val"))
    x, y, x_val, y_val = DATA[task]
    size = SIZES.get(task, 8)
    model = build(task)
    put_norm(model, cell["column"], crops(x[:1], size, None))
    generator = torch.Generator().manual_seed(cell["seed"])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for chosen in torch.randperm(len(x), generator=generator).split(batch):
                if len(chosen) == batch:
                    yield crops(x[chosen], size, generator), y[chosen]

    stream = batches()
    steps = IMAGES[task] // batch
    if not isinstance(COLUMNS[cell["column"]], str):
        cbn.warm_up(model, (next(stream)[0] for _ in range(16)))
    if cell["opt"] == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), cell["lr"], momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), cell["lr"])
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (steps - warm))),
    )
    model.train()
    losses: list[float] = []
    norms: list[float] = []
    started = time.perf_counter()
    for _, (inputs, labels) in zip(range(steps), stream, strict=False):
        loss = F.cross_entropy(model(inputs), labels)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), cell["clip"] or math.inf)))
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(crops(part, size, None)) for part in x_val.split(64)])
    finite = math.isfinite(losses[-1]) and bool(torch.isfinite(logits).all())
    tail = losses[-max(1, steps // 10) :]
    return {
        **cell,
        "steps": len(losses),
        "finite": finite,
        "top1": round(100 * float((logits.argmax(1) == y_val).float().mean()), 1) if finite else None,
        "last_loss": round(sum(tail) / len(tail), 3) if finite else None,
        "median_gradient_norm": round(float(torch.tensor(norms).median()), 2) if norms else None,
        "ms_per_step": round(1000 * seconds / len(losses), 1),
    }


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[k] for k in ("task", "column", "lr", "batch", "opt", "clip", "seed"))


def save(cell: dict[str, Any]) -> None:
    """Adds a cell to the report; several processes may share it."""
    with OUTPUT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {"cells": []}
        head = provenance("python -m benchmarks.study.stability --data ../shared/data")
        report = {**head, "cells": [*report["cells"], cell]}
        OUTPUT.write_text(json.dumps(report, indent=None).replace('}, {"task"', '},\n{"task"') + "\n")


def main() -> None:
    torch.set_num_threads(1)
    OUTPUT.parent.mkdir(exist_ok=True)
    done = {key(c) for c in json.loads(OUTPUT.read_text())["cells"]} if OUTPUT.is_file() else set()
    for cell in grid():
        if key(cell) in done or (ARGUMENTS.only and cell["task"] not in ARGUMENTS.only.split(",")):
            continue
        done.add(key(cell))
        result = run(cell)
        save(result)
        print(json.dumps(result), file=sys.stderr, flush=True)


DATA: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default="", help="tasks, separated by commas")
    ARGUMENTS = parser.parse_args()
    main()
