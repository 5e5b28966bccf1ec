"""How well a layer knows its own statistics while MobileNetV2-0.35 is fine-tuned on clothing photos at batch size 2.

    python benchmarks/estimation.py --data ../shared/data

The network trains with CBN as `convert` makes it. At some steps every layer's estimates of μ and σ² are compared with
the truth: those of the same layer over 96 training images, with all layers before it normalising as they did in this
step. Estimates: the batch of 2 alone; the window without compensation, with Taylor's step, and with the projection.
They differ in the layer that is looked at and not in the layers before it, and each has the exponential window of 16.
Writes benchmarks/results/estimation.json and docs/estimation.png.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import stability
import torch
import torch.nn.functional as F
from report import provenance
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin
from cbn_convert.norm.functional import Moments, window_statistics
from cbn_convert.norm.kernels import batch_statistics
from cbn_convert.norm.producers import theta_and_bias

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "estimation.json"
STEPS, MEASURED = 400, (*range(10, 100, 15), *range(100, 400, 30))
RATES = (1e-3, 1e-2)  # with the gradient's norm clipped at 5
ESTIMATES = {
    "batch": "this batch of 2",
    "none": "window, no compensation",
    "taylor": "Taylor",
    "projection": "projection",
}


class Probe:
    """Takes a layer's estimates in its forward pass, from the state that this pass itself uses."""

    def __init__(self, layer: CrossIterationMixin) -> None:
        self.layer, self.active = layer, False
        self.estimates: dict[str, tuple[Tensor, Tensor]] = {}
        layer.register_forward_pre_hook(self)

    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not (self.active and layer.training):
            return
        mean, var = batch_statistics(args[0])
        history, (producer,) = self.layer._sources[0].history, self.layer.producers
        past = history.past(mean, True)
        assert producer is not None
        assert isinstance(past, Moments)
        theta, bias = theta_and_bias(producer, mean.dtype)
        self.estimates = {"batch": (mean, var)}
        for name in ("none", "taylor", "projection"):
            seen = past._replace(patch_mean=None) if name == "none" else past
            window = window_statistics(mean, var, seen, history.newest_weight, theta, bias, name, "current")
            self.estimates[name] = (window.mean, window.var)


def measure(model: nn.Module, probes: dict[str, Probe], images: Tensor) -> dict[str, dict[str, float]]:
    """Error of each estimate in one step, over all layers: of σ² as the mean |log ratio|, of μ in units of σ."""
    twin = cbn.revert(copy.deepcopy(model)).eval()
    truth: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in twin.named_modules():
        if name in probes:
            for buffer, used in zip(
                (layer.running_mean, layer.running_var), probes[name].estimates["projection"], strict=True
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


def train(rate: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x, y = stability.images("clothing", "train")
    size = stability.SIZES["clothing"]
    model = stability.build("clothing")
    # the projection everywhere: where `convert` would take the exact form there is nothing to compare
    stability.put_norm(model, "cbn-no-exact", stability.crops(x[:1], size, None))
    probes = {n: Probe(m) for n, m in model.named_modules() if isinstance(m, CrossIterationMixin)}
    generator = torch.Generator().manual_seed(0)
    fixed = stability.crops(x[torch.randperm(len(x), generator=generator)[:96]], size, generator)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True)
    order = torch.randperm(len(x), generator=generator)
    rows = []
    for step in range(-16, STEPS):
        chosen = order[2 * (step + 16) :][:2]
        inputs = stability.crops(x[chosen], size, generator)
        for probe in probes.values():
            probe.active = step in MEASURED
        if step < 0:  # fills the window
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
            for (estimate, name), style in zip(ESTIMATES.items(), (":", "-", "--", "-."), strict=True):
                axis.plot([r["step"] for r in own], [r["errors"][estimate][quantity] for r in own], style, label=name)
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
    stability.ARGUMENTS = arguments = parser.parse_args()
    if not arguments.draw_only:
        torch.set_num_threads(1)
        rows = [row for rate in RATES for row in train(rate)]
        report = {**provenance("python benchmarks/estimation.py --data ../shared/data"), "rows": rows}
        OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    draw(json.loads(OUTPUT.read_text())["rows"])


if __name__ == "__main__":
    main()
