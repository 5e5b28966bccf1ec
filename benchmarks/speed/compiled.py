"""Training under torch.compile(fullgraph=True): how often it compiles, how near it is to eager training, its time.

    python -m benchmarks.speed.compiled [--only resnet18]

Networks with random weights and statistics, converted and trained by SGD for 20 steps at batch size 2 and 64 px, eager
and compiled, with the same images in float64. Then steps of several norms in float32 at 224 px, all of them compiled by
inductor, taking turns. Writes benchmarks/results/compiled.json after every run; what is in the JSON is not repeated
without --only. Then the tables in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import cbn_convert as cbn
from benchmarks.documents.readme import BENCH, fill, over_bn
from benchmarks.provenance import RESULTS, ROOT, provenance
from cbn_convert.bench import StepSettings, bench_step
from cbn_convert.conversion import norm_layers
from cbn_convert.norm import CrossIterationMixin, carried

OUTPUT = RESULTS / "compiled.json"
NETWORKS, BACKENDS, STEPS, LR = ("resnet18", "mobilenetv2_100", "efficientnet_b0"), ("aot_eager", "inductor"), 20, 1e-3
TIMED = StepSettings(batch_size=2, img_size=224, compile=True)


def network(name: str) -> nn.Module:
    """With norms that are no identities, all of whose layers carry statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_rate=0.0).double()
    with torch.no_grad():
        for norm in norm_layers(model).values():
            norm.weight.uniform_(0.5, 1.5)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    cbn.convert(model, example_input=images(0))
    return model.train()


def images(step: int) -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


@mock.patch.object(carried, "FIRST_LOOKS", 4)  # so that there are steps without a look, too
def run(name: str, backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    graphs: list[Any] = []
    compiler: Any = lookup_backend(backend)

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compiler(graph, inputs)

    eager, model, other = network(name), network(name), network(name)
    with torch.no_grad():
        for t in other.parameters():
            t.copy_(torch.nextafter(t, 2 * t))
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    sides = [(eager, eager), (compiled, model), (other, other)]
    optimizers = [torch.optim.SGD(m.parameters(), LR, momentum=0.9) for _, m in sides]
    worst, began = [0.0, 0.0], time.monotonic()
    for step in range(STEPS):
        outputs = []
        for (call, _), optimizer in zip(sides, optimizers, strict=True):
            out = call(images(step))
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            outputs.append(out.detach())
        away = [float((out - outputs[0]).norm() / outputs[0].norm()) for out in outputs[1:]]
        worst = [max(pair) for pair in zip(worst, away, strict=True)]
    folded = [m.trains_folded for m in model.modules() if isinstance(m, CrossIterationMixin)]
    pairs = zip(model.state_dict().values(), eager.state_dict().values(), strict=True)
    others = [float((a - b).norm() / b.norm()) for a, b in pairs if a.is_floating_point()]
    states: list[Any] = [m._sources[0].state for m in model.modules() if isinstance(m, CrossIterationMixin)]
    looks = sum(state.looks for state in states) / len(states)
    return {
        "network": name, "backend": backend, "norms": len(folded), "folded": sum(folded), "graphs": len(graphs),
        "outputs": worst[0], "outputs_last_bit": worst[1], "state": max(others), "looks": looks,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    lines = [
        "| network | norms, folded | backend | graphs | looks of a layer | largest difference in a step's outputs | "
        "with weights changed in the last bit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['network']} | {r['norms']}, {r['folded']} | {r['backend']} | {r['graphs']} | {r['looks']:.1f} | "
            f"{r['outputs']:.0e} | {r['outputs_last_bit']:.0e} |"
        )
    source = f"{STEPS} steps; `{report['command']}`, [JSON](../benchmarks/results/compiled.json)"
    return "\n".join([*lines, "", f"*{source}*"])


def timed(name: str) -> dict[str, Any]:
    """Steps of some norms, compiled alike."""
    results = bench_step(name, ["bn", "frozen", "tune", "cbn"], TIMED, steps=16)
    return {"network": name, "results": [r._asdict() for r in results]}


def times(report: dict[str, Any]) -> str:
    columns = ("frozen", "tune", "cbn")
    lines = [
        "| compiled by inductor | BN step [ms] | " + " | ".join(f"{BENCH[c]} over BN" for c in columns) + " |",
        "|---|---|---|---|---|",
    ]
    for one in report["times"]:
        of = {r["column"]: r for r in one["results"]}
        ratios = " | ".join(over_bn(of[c]) for c in columns)
        lines.append(f"| {one['network']} | {of['bn']['step']:.0f} | {ratios} |")
    source = f"2 images of 224 px, float32; `{report['command']}`, [JSON](../benchmarks/results/compiled.json)"
    return "\n".join([*lines, "", f"*{source}, version {report['commit'][:7]}, {report['machine']}*"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS)
    only = parser.parse_args().only
    report: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    todo: list[tuple[str, Callable[..., dict[str, Any]], dict[str, str]]] = [
        ("rows", run, {"network": name, "backend": backend}) for name in NETWORKS for backend in BACKENDS
    ]
    todo += [("times", timed, {"network": name}) for name in NETWORKS]
    for part, function, cell in todo:
        found = report.setdefault(part, [])
        old = [one for one in found if cell.items() <= one.items()]
        if (old and only is None) or only not in (None, cell["network"]):
            continue
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # which gives all memory back
            made = process.submit(function, *cell.values()).result()
        report |= provenance("python -m benchmarks.speed.compiled")
        report[part] = [one for one in found if one not in old] + [made]
        print(made, file=sys.stderr, flush=True)
        OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    fill(ROOT / "docs" / "performance.md", {"compiled": table(report), "compiled-times": times(report)})


if __name__ == "__main__":
    main()
