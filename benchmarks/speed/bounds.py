"""What CBN must move beside BN, in bytes, and where the time of a step goes on the CPU.

    python -m benchmarks.speed.bounds [--bounds-only]

Operations: a training step of a conv with m positions, C channels and F weights per channel is 3·m·F·C multiply-adds
(forward, gradient of the input, of the weight). Bytes: BN reads and writes 8 times the activations (forward x twice
and y, backward x and g twice and the gradient of x). The carried window, where the conv trains folded, makes passes
over tensors of the weights' size in every step: θ is read and sθ written, once more in the backward pass, and ∂L/∂θ is
made of θ in the place of the conv's gradient. Where the output is at most half as large, sθ is not made: the output
is scaled where it stands, and its gradient is read and written scaled. In a look, one step of `every`, x is read for
its statistics, read and written to be normalised; in one look of PATCH_TURNS the patches of some positions are read for
their moments, arranged, and read twice for the axes. Times are wall clock
around the functions named, in a step of the default conversion at batch size 2. Writes
benchmarks/results/bounds.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import cbn_convert as cbn
from benchmarks.provenance import RESULTS, provenance
from cbn_convert.bench.steps import _model
from cbn_convert.norm import CrossIterationMixin, Window
from cbn_convert.norm.carried import FIRST_LOOKS, PATCH_TURNS, CarriedWindow
from cbn_convert.norm.folded import FEW_WEIGHTS, FoldedMap, FoldedStep
from cbn_convert.norm.kernels.compiled import Compiled
from cbn_convert.norm.moments import _grid
from cbn_convert.norm.producers import Convolution, fan_in, groups_of

ARCHS = ("resnet50", "mobilenetv2_100")
WEIGHT_PASSES, LOOK_PASSES, PATCH_PASSES = 7, 3, 4
UNSCALED_PASSES, OUTPUT_PASSES = 4, 4  # over weights and outputs where outputs are scaled; of these two in forward
# what is timed, by the name in the report; all but the first and the last are parts of the first
TIMED: dict[str, list[tuple[Any, str]]] = {
    "folded": [(FoldedMap, "forward"), (FoldedMap, "backward")],
    "convs": [(Convolution, "__call__"), (Convolution, "gradients"), (Convolution, "input_gradient")],
    "begin": [(FoldedStep, "begin")],
    "look": [(CarriedWindow, "look")],
    "scale": [(Compiled, "scale")],
    "write": [(CarriedWindow, "write")],
    "gradient": [(Compiled, "folded_gradient")],
    "norms": [(CrossIterationMixin, "normalize")],
}


def bounds(arch: str, batch: int) -> dict[str, Any]:
    model, window = _model(arch), Window()
    report = cbn.convert(model)
    sizes: dict[nn.Module, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, CrossIterationMixin) and module.producers:
            module.producers[0].register_forward_hook(lambda m, _, out: sizes.update({m: tuple(out.shape[2:])}))
    model.eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    macs = activations = passes = looks = 0.0
    for conv, size in sizes.items():
        positions = batch * math.prod(size)
        grid = _grid(size, batch, window.positions, 0)
        some = batch * math.prod(len(range(*g.indices(n))) for g, n in zip(grid, size, strict=True))
        macs += 3 * positions * conv.weight.numel()
        activations += positions * conv.out_channels
        size_of, output = conv.weight.numel(), positions * conv.out_channels
        scales = size_of > FEW_WEIGHTS and 2 * positions <= fan_in(conv)
        passes += UNSCALED_PASSES * size_of + OUTPUT_PASSES * output if scales else WEIGHT_PASSES * size_of
        looks += (LOOK_PASSES - 2 * scales) * output + PATCH_PASSES * some * groups_of(conv) * fan_in(
            conv
        ) / PATCH_TURNS
    looks /= window.every
    return {
        "arch": arch, "batch_size": batch, "step_gmacs": macs / 1e9, "bn_mb": 8 * 4 * activations / 1e6,
        "weight_passes_mb": 4 * passes / 1e6, "looks_mb": 4 * looks / 1e6,
        "state_mb": report.history_bytes / 1e6,
    }  # fmt: skip


@contextmanager
def clocks(times: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds spent in the layer's parts."""
    targets = [(name, owner, attribute) for name, parts in TIMED.items() for owner, attribute in parts]
    originals = [getattr(owner, attribute) for _, owner, attribute in targets]

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                times[name] += time.perf_counter() - start

        return call

    def put(owner: Any, attribute: str, function: Callable[..., Any]) -> None:
        setattr(owner, attribute, staticmethod(function) if owner is FoldedMap else function)

    for (name, owner, attribute), original in zip(targets, originals, strict=True):
        put(owner, attribute, timed(name, original))
    try:
        yield
    finally:
        for (_, owner, attribute), original in zip(targets, originals, strict=True):
            put(owner, attribute, original)


def profile(arch: str, steps: int = 16) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _model(arch).train()
    cbn.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x, y = torch.randn(2, 3, 224, 224), torch.arange(2)
    rows = []
    cbn.warm_up(model, (torch.randn(2, 3, 64, 64) for _ in range(FIRST_LOOKS)))
    for i in range(steps + 4):
        times: dict[str, float] = defaultdict(float)
        with clocks(times):
            start = time.perf_counter()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times["step"] = time.perf_counter() - start
        if i >= 4:
            rows.append(times)
    mean = {name: 1000 * sum(r[name] for r in rows) / len(rows) for name in ("step", *TIMED)}
    mean["step"] = 1000 * median(r["step"] for r in rows)
    parts = ("convs", "begin", "look", "scale", "write", "gradient")
    mean["rest"] = mean.pop("folded") - sum(mean[name] for name in parts)
    return {"arch": arch, "ms": {name: round(value, 2) for name, value in mean.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds-only", action="store_true", help="no times, on a machine that does other things, too")
    without = parser.parse_args().bounds_only
    report = {
        **provenance("python -m benchmarks.speed.bounds"),
        "bounds": [bounds(arch, batch) for arch in ARCHS for batch in (2, 8)],
        "profile": [] if without else [profile(arch) for arch in ARCHS],
    }
    (RESULTS / "bounds.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
