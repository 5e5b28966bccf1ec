"""Why is CBN ahead of frozen BN in fine-tuning? Its parts one by one, and what happens to statistics and filters.

    python -m benchmarks.study.mechanism --data ../shared/data [--only length,mean] [--jobs 2]
    python -m benchmarks.study.mechanism --data ../shared/data --traces

MobileNetV2-0.35 on both sets of photos, two images per step, as in high_rates.py: frozen BN, CBN, and what is between.
--traces records single runs on the clothing, and how much steeper the mean patch makes each conv. Writes
benchmarks/results/mechanism.json after every run, and mechanism_traces.json; --traces and --draw draw
docs/mechanism-parts.png and mechanism-filters.png of them.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.provenance import RESULTS, ROOT, provenance
from benchmarks.study.high_rates import SUBJECTS, configured
from benchmarks.study.patched import accuracies, lasting, measure
from benchmarks.study.photos import crops, images, mobilenet
from cbn_convert import fold
from cbn_convert.conversion import norm_layers
from cbn_convert.files import write_json
from cbn_convert.norm.carried import Carried
from cbn_convert.norm.functional import Affine
from cbn_convert.norm.kernels import KERNELS, Kernels, forced
from cbn_convert.training import learner
from cbn_convert.training.alternatives import apply_norm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUTPUT, TRACED = RESULTS / "mechanism.json", RESULTS / "mechanism_traces.json"
PARTS, FILTERS = ROOT / "docs" / "mechanism-parts.png", ROOT / "docs" / "mechanism-filters.png"
COMMAND = "python -m benchmarks.study.mechanism --data ../shared/data"
RATES, SEEDS = (1e-3, 3e-3, 9.49e-3), 3
_RING: dict[str, Any] = {"size": 8, "every": 1, "positions": None}
_PAPER = {"history": "ring", "compensation": "taylor", "gradient": "current", **_RING}
# label, norm, what is called in the process of a run before it begins
FORMS: dict[str, tuple[str, str, list[Any] | None]] = {
    "frozen": ("frozen BN", "frozen", None),
    "images": ("CBN, following the images only", "cbn", ["carried_forms", "set_window", {"compensation": "none"}]),
    "mean": ("only M follows the weights", "cbn", ["mechanism", "follow", "mean"]),
    "variance": ("only S follows the weights", "cbn", ["mechanism", "follow", "variance"]),
    "length": ("M and S follow the filter's length only", "cbn", ["mechanism", "follow", "length"]),
    "current": ("CBN, no gradient through M and S", "cbn", ["carried_forms", "set_window", {"gradient": "current"}]),
    "cbn": ("CBN", "cbn", None),
    "still": ("CBN, β does not learn", "cbn", ["mechanism", "shift_rate", 0.0]),
    "shifting-10": ("CBN, β at 10 times the rate", "cbn", ["mechanism", "shift_rate", 10.0]),
    "shifting-100": ("CBN, β at 100 times the rate", "cbn", ["mechanism", "shift_rate", 100.0]),
    "new": ("every layer as a new one", "cbn", ["carried_forms", "set_window", {"start": "empty"}]),
    "ring": ("ring of 8", "cbn", ["carried_forms", "set_window", {"history": "ring", **_RING}]),
    "paper": ("as published: ring of 8, Taylor, no gradient", "cbn", ["carried_forms", "set_window", _PAPER]),
}  # fmt: skip
TRACES = (("frozen", 1e-3), ("frozen", 3e-3), ("variance", 3e-3), ("mean", 3e-3), ("cbn", 3e-3))
DRAWN = ("frozen", "images", "mean", "variance", "length", "current", "cbn", "shifting-100")
STEPS, SIZE = 400, 96


class Partly(Kernels):
    """The plain formulas, of which M or S follows the weights in part; gradients are autograd's."""

    def __init__(self, part: str) -> None:
        self.part = part

    def move(self, state: Carried, theta: Tensor, bias: Tensor | None) -> Tensor:
        """As `Kernels`, with M and S of another kind; the rest of the table stays that of the weights."""
        assert bias is None, "of convs without a bias"
        table = super().move(state, theta, bias)
        then = state.table
        growth = (table[4] / then[4]).sqrt()
        first = {
            "mean": (table[0], then[1]),
            "variance": (then[0], table[1]),
            "length": (then[0] * growth, then[1] * growth.square()),
        }[self.part]
        return torch.cat([torch.stack(first), table[2:]])

    def folded_gradient(
        self, state: Carried, theta: Tensor, bias: Tensor | None, affine: Affine, g: Tensor, g_shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Kernels`."""
        assert affine.gamma is not None
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (theta, affine.gamma)]
            folded = self.fold(state, leaves[0], bias, affine._replace(gamma=leaves[1]))
            assert folded.weight is not None
            product = (folded.weight * g).sum() + (folded.shift * g_shift).sum()
            found = torch.autograd.grad(product, leaves)
        return found[0], found[1]


def follow(part: str) -> None:
    """Makes all layers of this process follow their weights in part."""
    KERNELS["plain"] = Partly(part)
    lasting(forced("plain"))


def shift_rate(factor: float) -> None:
    """Lets β of all norm layers learn at so many times the rate in this process."""
    make = learner.make_optimizer

    def made(model: nn.Module, settings: Any, lr: float) -> torch.optim.Optimizer:
        optimizer = make(model, settings, lr)
        shifts = {id(norm.bias) for norm in norm_layers(model).values()}
        (group,) = (g for g in optimizer.param_groups if any(id(p) in shifts for p in g["params"]))
        own = [p for p in group["params"] if id(p) in shifts]
        group["params"] = [p for p in group["params"] if id(p) not in shifts]
        optimizer.add_param_group({**group, "params": own, "lr_scale": factor})  # which timm's schedules multiply by
        return optimizer

    learner.make_optimizer = made


def run(cell: dict[str, Any], data: Path) -> dict[str, Any]:
    """One run; its accuracies."""
    _, norm, change = FORMS[cell["form"]]
    return accuracies(configured(SUBJECTS[cell["data"]], data, norm, cell["lr"], cell["seed"]), change)


class Trace:
    """One run on the clothing, step by step.

    Recorded: median and 95 % quantile over filters of the length of a filter over that at first; the loss; and, of 64
    training images in evaluation, means over layers and channels of |mean of x - running mean| / σ and of
    |log(variance of x / running variance)|, σ² being the running variance.
    """

    def __init__(self, form: str, lr: float, data: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.x, self.y = images(data / "clothing" / "train", SIZE)
        self.model, self.lr = mobilenet(data), lr
        _, norm, change = FORMS[form]
        if change is not None:
            follow(*change[2:])
        example = crops(self.x[:1], SIZE, None)
        apply_norm(self.model, norm, example_input=example) if norm == "cbn" else apply_norm(self.model, norm)
        self.convs = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        self.first = self._filters()
        self.fixed = crops(self.x[torch.randperm(len(self.x))[:64]], SIZE, None)

    def _filters(self) -> list[Tensor]:
        return [conv.weight.detach().flatten(1).clone() for conv in self.convs]

    @torch.no_grad()
    def _apart(self) -> list[tuple[float, float]]:
        """How far means and variances of x are from the running ones, for each layer, with the model as evaluated."""
        plain, found = fold(self.model, into="bn").eval(), []

        def see(norm: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
            var, mean = torch.var_mean(args[0], [0, 2, 3], correction=0)
            known = norm.get_buffer("running_var") + norm.eps
            shift = (mean - norm.get_buffer("running_mean")).abs() / known.sqrt()
            found.append((float(shift.mean()), float(torch.log((var + norm.eps) / known).abs().mean())))

        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(see)
        plain(self.fixed)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What was recorded, every ten steps."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(self.model.parameters(), self.lr, momentum=0.9, nesterov=True)
        order, found, losses = torch.randperm(len(self.x), generator=generator), [], []
        for step in range(STEPS + 1):
            chosen = order[2 * step :][:2]
            loss = F.cross_entropy(self.model.train()(crops(self.x[chosen], SIZE, generator)), self.y[chosen])
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            optimizer.step()
            if step % 10 == 0:
                pairs = zip(self._filters(), self.first, strict=True)
                lengths = torch.cat([a.norm(dim=1) / b.norm(dim=1) for a, b in pairs])
                shifts, spreads = zip(*self._apart(), strict=True)
                found.append({
                    "step": step, "loss": mean(losses[-40:]), "shift": mean(shifts), "spread": mean(spreads),
                    "length": lengths.quantile(torch.tensor([0.5, 0.95])).tolist(),
                })  # fmt: skip
        return found


def traced(form: str, lr: float, data: Path) -> dict[str, Any]:
    """A trace, as it is written."""
    return {"form": form, "lr": lr, "rows": Trace(form, lr, data).rows()}


@torch.no_grad()
def steepness(data: Path) -> list[dict[str, Any]]:
    """Largest eigenvalue of E[p pᵀ] over that of the covariance of p, for every conv with one group.

    Of the pretrained network in evaluation, on 64 training images of the clothing, whose patches p [m, F] are centred
    by their mean p̄ for the covariance: E[p pᵀ] is that and p̄ p̄ᵀ. And γ² |p̄|² / (S + eps), the median of the channels:
    by how much more a step of gradient descent shifts a channel through θ, with M fixed, than through β.
    """
    torch.manual_seed(0)
    model, found = mobilenet(data).eval(), []
    x, _ = images(data / "clothing" / "train", SIZE)

    def see(name: str, norm: Any, conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        padded = F.pad(args[0], [(conv.kernel_size[0] - 1) // 2] * 4)
        p = F.unfold(padded, conv.kernel_size, stride=conv.stride).transpose(1, 2).flatten(0, 1).double()
        second, centred = p.T @ p / len(p), torch.cov(p.T, correction=0)
        most = [float(torch.linalg.eigvalsh(m)[-1]) for m in (second, centred)]
        shift = norm.weight.square() / (norm.running_var + norm.eps) * p.mean(0).square().sum()
        found.append({
            "layer": name, "width": p.shape[1], "rectified": bool(args[0].min() >= 0), "ratio": most[0] / most[1],
            "shift": float(shift.median()),
        })  # fmt: skip

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for (name, module), (_, norm) in pairwise(modules):  # which follows it in this network
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.register_forward_pre_hook(partial(see, name, norm))
    model(crops(x[torch.randperm(len(x))[:64]], SIZE, None))
    return found


def of(form: str, images: str, lr: float, split: str = "test_top1") -> list[float]:
    """Top-1 of every seed that is there."""
    cells = json.loads(OUTPUT.read_text())["cells"]
    return [c[split] for c in cells if (c["form"], c["data"], c["lr"]) == (form, images, lr) and split in c]


def draw_parts() -> None:
    """Top-1 over the rate of every form."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for axis, name in zip(axes, ("clothing", "hands"), strict=True):
        for number, form in enumerate(DRAWN):
            label = FORMS[form][0]
            tops = [of(form, name, lr) for lr in RATES]
            shown = [(lr * 1.03 ** (number - 3), values) for lr, values in zip(RATES, tops, strict=True) if values]
            errors = [stdev(v) if v[1:] else 0.0 for _, v in shown]
            axis.errorbar([lr for lr, _ in shown], [mean(v) for _, v in shown], errors, label=label, capsize=2,
                          marker="o", markersize=4, linewidth=2.2 if form in ("frozen", "cbn") else 1)  # fmt: skip
        axis.set(xscale="log", xlabel="learning rate", title=name)
        axis.set_xticks(RATES, [f"{lr:.2g}" for lr in RATES])
        axis.minorticks_off()
    axes[0].set_ylabel("test top-1 [%]")
    axes[0].legend(fontsize=7)
    figure.savefig(PARTS, dpi=110)


def draw_filters() -> None:
    """How far statistics are from the truth, lengths of filters, and loss, over the steps."""
    traces = json.loads(TRACED.read_text())["traces"]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharex=True, layout="constrained")
    titles = ("|mean of x - M| / σ", "|log(variance of x / S)|", "filters' length, over that at first", "loss")
    for axis, title, key in zip(axes, titles, ("shift", "spread", "length", "loss"), strict=True):
        for trace in traces:
            values = [r[key][1] if key == "length" else r[key] for r in trace["rows"]]
            label = f"{FORMS[trace['form']][0]}, {trace['lr']:g}"
            axis.plot([r["step"] for r in trace["rows"]], values, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        if key in ("shift", "spread"):
            axis.set_yscale("log")
    axes[2].legend(fontsize=6)
    figure.savefig(FILTERS, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--only", default=",".join(FORMS), help="forms, separated by commas")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--traces", action="store_true", help="record single runs instead")
    parser.add_argument("--draw", action="store_true", help="draw the figures from the JSON")
    given = parser.parse_args()
    data = given.data.resolve()
    if given.traces:
        # a form is put into a whole process
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            traces = list(pool.map(traced, *zip(*TRACES, strict=True), [data] * len(TRACES)))
        write_json(TRACED, {**provenance(f"{COMMAND} --traces"), "traces": traces, "steepness": steepness(data)})
    if given.traces or given.draw:
        draw_parts()
        draw_filters()
        return
    todo = [
        {"form": form, "data": name, "lr": lr, "seed": seed}
        for seed in range(given.seeds)
        for lr in RATES
        for form in given.only.split(",")
        for name in ("clothing", "hands")
    ]
    measure(OUTPUT, COMMAND, todo, lambda cell: run(cell, data), given.jobs)


if __name__ == "__main__":
    main()
