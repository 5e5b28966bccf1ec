"""What CBN must cost beside BN, in multiplications and in bytes, and where the time of a step goes on the CPU.

    python benchmarks/bounds.py

Operations: a training step of a conv with m positions, C channels and F weights per channel is 3·m·F·C multiply-adds
(forward, gradient of the input, of the weight); the covariance C of one iteration is m'·F·C over the m' positions
that are looked at, every r-th step. Bytes: BN reads and writes 8 times the activations (benchmarks/layer.py); CBN
adds passes over tensors of the weights' size, 6 in every step (θ and C read, ∂L/∂θ made from C and added to the
conv's) and 6 more in a step with new moments. Times are wall clock around the functions named, in a step of the
default conversion at batch size 2. Writes benchmarks/results/bounds.json.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from contextlib import contextmanager
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cbn_convert.norm.history import History
from report import RESULTS, provenance
from torch import nn

import cbn_convert as cbn
from cbn_convert.conversion.converting import MOMENTS_EVERY, MOMENTS_POSITIONS
from cbn_convert.norm import CrossIterationMixin
from cbn_convert.norm.kernels import compiled
from cbn_convert.norm.moments import _grid

ARCHS = ("resnet50", "mobilenetv2_100")
TIMED = ("statistics", "window", "normalize", "backward", "gradient_through_the_past")


def bounds(arch: str, batch: int) -> dict[str, Any]:
    model = timm.create_model(arch, num_classes=10)
    cbn.convert(model)
    sizes: dict[nn.Module, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, CrossIterationMixin) and module.producers:
            module.producers[0].register_forward_hook(lambda m, _, out: sizes.update({m: tuple(out.shape[2:])}))
    model.eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    step = every = default = activations = weights = 0
    for conv, size in sizes.items():
        per_position, positions = conv.weight.numel(), batch * math.prod(size)
        grid = _grid(size, batch, MOMENTS_POSITIONS, 0)
        some = batch * math.prod(len(range(*g.indices(n))) for g, n in zip(grid, size, strict=True))
        step += 3 * positions * per_position
        every += positions * per_position
        default += some * per_position / MOMENTS_EVERY
        activations += positions * conv.out_channels
        weights += per_position
    return {
        "arch": arch, "batch_size": batch, "step_gmacs": step / 1e9, "moments_of_all": every / step,
        "moments_default": default / step, "bn_mb": 8 * 4 * activations / 1e6,
        "weight_passes_mb": 4 * weights * (6 + 6 / MOMENTS_EVERY) / 1e6,
    }  # fmt: skip


@contextmanager
def clocks(times: dict[str, float]) -> Any:
    """Adds up the seconds spent in the layer's parts."""
    targets: list[tuple[Any, str]] = [(compiled, name) for name in TIMED]
    targets += [(CrossIterationMixin, "_with_patches"), (History, "past"), (CrossIterationMixin, "_window_over")]
    originals = [getattr(owner, name) for owner, name in targets]
    for (owner, name), original in zip(targets, originals, strict=True):

        def timed(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return _original(*args, **kwargs)
            finally:
                times[_name] += time.perf_counter() - start

        setattr(owner, name, timed)
    try:
        yield
    finally:
        for (owner, name), original in zip(targets, originals, strict=True):
            setattr(owner, name, original)


def profile(arch: str, steps: int = 12) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10).train()
    cbn.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x, y = torch.randn(2, 3, 224, 224), torch.arange(2)
    rows = []
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
    mean = {name: 1000 * sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    mean["step"] = 1000 * median(r["step"] for r in rows)
    # what the forward pass of the layers spends outside of the parts that are timed
    inner = sum(mean[n] for n in ("statistics", "window", "normalize", "_with_patches", "past"))
    mean["python"] = mean.pop("_window_over") - inner
    return {"arch": arch, "ms": {k.lstrip("_"): round(v, 2) for k, v in mean.items()}}


def main() -> None:
    report = {
        **provenance("python benchmarks/bounds.py"),
        "bounds": [bounds(arch, batch) for arch in ARCHS for batch in (2, 8)],
        "profile": [profile(arch) for arch in ARCHS],
    }
    (RESULTS / "bounds.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
