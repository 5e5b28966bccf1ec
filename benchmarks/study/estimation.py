"""How well a layer knows its own statistics while MobileNetV2-0.35 is fine-tuned on clothing photos at batch size 2.

    python -m benchmarks.study.estimation --data ../shared/data

The network trains with CBN as `convert` makes it. At some steps every layer's estimates of μ and σ² are compared with
the truth: those of the same layer over 96 training images, with all layers before it normalising as they did in this
step. Estimates: the batch of 2 alone; the carried window; the same without axes, with d = 1, and following the images
only; the
paper's ring of 8, with Taylor's step and with the projection. They differ in the layer that is looked at and not in the
layers before it. Writes benchmarks/results/estimation.json and docs/estimation.png.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbn_convert as cbn
from benchmarks.provenance import RESULTS, ROOT, provenance
from benchmarks.study.photos import crops, images, mobilenet
from cbn_convert.norm import CrossIterationMixin, Window, carried, functional
from cbn_convert.norm.batch import Batch, RunningStatistics
from cbn_convert.norm.carried import Carried, CarriedWindow
from cbn_convert.norm.kernels import batch_statistics, forced
from cbn_convert.norm.ring import Ring

OUTPUT = RESULTS / "estimation.json"
SIZE = 96
STEPS, MEASURED = 400, (*range(10, 100, 15), *range(100, 400, 30))
RATES = (1e-3, 1e-2)  # with the gradient's norm clipped at 5
ESTIMATES = {
    "batch": "this batch of 2",
    "carried": "carried window",
    "diagonal": "carried window, diagonal alone",
    "even": "carried window, d = 1",
    "images": "following images only",
    "taylor": "ring of 8, Taylor",
    "projection": "ring of 8, projection",
}
STYLES = (":", "-", (0, (3, 1)), (0, (1, 1)), (0, (5, 3)), "--", "-.")


class DiagonalWindow(CarriedWindow):
    """A carried window without axes."""

    def look(self, batch: Batch) -> Carried:
        with mock.patch.object(functional, "AXES", 0):
            return super().look(batch)


class EvenWindow(DiagonalWindow):
    """A carried window for which every entry of a patch varies alike: S grows with θ·θ."""

    def look(self, batch: Batch) -> Carried:
        # compiled kernels have the formula of their own
        with mock.patch.object(carried, "_at_least", torch.ones_like), forced("plain"):
            return super().look(batch)


class Probe:
    """Takes a layer's estimates in its forward pass, from windows that see what the layer itself sees."""

    def __init__(self, layer: CrossIterationMixin) -> None:
        self.layer = layer
        self.estimates: dict[str, tuple[Tensor, Tensor]] = {}
        window, phase = layer.window, layer.phase
        self.windows: dict[str, CarriedWindow | Ring] = {
            "carried": CarriedWindow(window, phase),
            "diagonal": DiagonalWindow(window, phase),
            "even": EvenWindow(window, phase),
            "images": CarriedWindow(replace(window, compensation="none"), phase),
            "taylor": Ring(Window.PAPER),
            "projection": Ring(replace(Window.PAPER, compensation="projection")),
        }
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.running = {
            name: RunningStatistics(layer.running_mean.clone(), layer.running_var.clone(), torch.float32, False, False)
            for name in self.windows
        }
        layer.register_forward_pre_hook(self)

    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not layer.training:
            return
        (x,), (source,), iteration = args, self.layer._sources, self.layer.iteration
        assert source.tap is not None
        theta, bias = source.theta_and_bias(torch.float32)
        followed = (source.tap.module, source.tap.input, theta, bias)
        self.estimates = {"batch": batch_statistics(x)}
        for name, window in self.windows.items():
            seen = (None, None, None, None) if name == "images" else followed
            self.estimates[name] = window.statistics(Batch(x, *seen, iteration, False, 1, self.running[name]))


def measure(model: nn.Module, probes: dict[str, Probe], images: Tensor) -> dict[str, dict[str, float]]:
    """Error of each estimate in one step, over all layers: of σ² as the mean |log ratio|, of μ in units of σ."""
    twin = cbn.revert(copy.deepcopy(model)).eval()
    truth: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in twin.named_modules():
        if name in probes:
            for buffer, used in zip(
                (layer.running_mean, layer.running_var), probes[name].estimates["carried"], strict=True
            ):
                buffer.copy_(used)
            layer.register_forward_pre_hook(lambda _, args, name=name: truth.update({name: batch_statistics(args[0])}))
    with torch.no_grad():
        twin(images)
    errors: dict[str, dict[str, float]] = {}
    for estimate in ESTIMATES:
        of_var, of_mean = [], []
        for name, probe in probes.items():
            (mean, var), (true_mean, true_var) = probe.estimates[estimate], truth[name]
            eps = probe.layer.eps
            of_var.append(float(torch.log((var + eps) / (true_var + eps)).abs().mean()))
            of_mean.append(float(((mean - true_mean) / torch.sqrt(true_var + eps)).abs().mean()))
        errors[estimate] = {"var": sum(of_var) / len(of_var), "mean": sum(of_mean) / len(of_mean)}
    return errors


def train(rate: float, data: Path) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x, y = images(data / "clothing" / "train", SIZE)
    model = mobilenet(data)
    cbn.convert(model, example_input=crops(x[:1], SIZE, None))
    probes = {n: Probe(m) for n, m in model.named_modules() if isinstance(m, CrossIterationMixin)}
    generator = torch.Generator().manual_seed(0)
    fixed = crops(x[torch.randperm(len(x), generator=generator)[:96]], SIZE, generator)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True)
    order = torch.randperm(len(x), generator=generator)
    rows = []
    for step in range(-16, STEPS):
        chosen = order[2 * (step + 16) :][:2]
        inputs = crops(x[chosen], SIZE, generator)
        if step < 0:  # fills the rings
            with torch.no_grad():
                model.train()(inputs)
            continue
        loss = F.cross_entropy(model.train()(inputs), y[chosen])
        if step in MEASURED:
            rows.append(
                {
                    "rate": rate,
                    "step": step,
                    "loss": round(float(loss.detach()), 3),
                    "errors": measure(model, probes, fixed),
                }
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(RATES), figsize=(9, 5.5), sharex=True, sharey="row", layout="constrained")
    for column, rate in zip(axes.T, RATES, strict=True):
        own = [r for r in rows if r["rate"] == rate]
        for axis, quantity, label in zip(column, ("mean", "var"), ("error of μ [σ]", "error of log σ²"), strict=True):
            for (estimate, name), style in zip(ESTIMATES.items(), STYLES, strict=True):
                values = [r["errors"][estimate][quantity] for r in own]
                axis.plot([r["step"] for r in own], values, linestyle=style, label=name)
            axis.set_ylabel(label if rate == RATES[0] else "")
        column[0].set_title(f"learning rate {rate:g}")
        column[1].set_xlabel("step")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    axes[0, 0].legend()
    figure.savefig(ROOT / "docs" / "estimation.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--draw-only", action="store_true", help="draw the figure from the JSON")
    arguments = parser.parse_args()
    if not arguments.draw_only:
        torch.set_num_threads(1)
        rows = [row for rate in RATES for row in train(rate, arguments.data)]
        report = {**provenance("python -m benchmarks.study.estimation --data ../shared/data"), "rows": rows}
        OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    draw(json.loads(OUTPUT.read_text())["rows"])


if __name__ == "__main__":
    main()
