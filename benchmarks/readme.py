"""python benchmarks/readme.py: writes tables of README.md, docs/experiments.md and docs/performance.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


NAMES = {
    "cbn": "CBN, moments every step, exact where small",
    "cbn-turns-8-512": "CBN, window 16, moments in turns",
    "cbn-ring8": "CBN, ring of 8",
    "cbn-no-exact": "CBN, moments every step, all positions",
    "cbn-turns-1-512": "every step, about 512 positions",
    "cbn-turns-4-all": "every 4th step, all positions",
    "cbn-turns-4-512": "every 4th step, about 512 positions",
    "cbn-turns-16-128": "every 16th step, about 128 positions",
    "taylor-full": "Taylor, full gradient",
    "published": "as published: Taylor, current gradient, ring of 8",
    "none": "averaging only",
    "none-w2": "averaging only, window 2",
    "bn": "BN",
    "frozen": "frozen BN",
    **{f"cbn-w{k}": f"CBN, window {k}" for k in (1, 2, 4, 8, 32, 64)},
    "unbound-bn": "BN there, CBN elsewhere",
    "unbound-straight-2": "window 2, whole gradient (default for new layers)",
    "unbound-straight-4": "window 4, whole gradient",
    "unbound-straight-16": "window 16, whole gradient",
    "unbound-current": "window 16, gradient's share 1/16",
}


def stability(task: str, columns: list[str], keys: list[tuple[int, str, float | None]], lrs: list[float]) -> str:
    """One row per column of the study and (batch, optimizer, clip); cells are means over seeds."""
    report = json.loads((RESULTS / "stability.json").read_text())
    several = len({k[0] for k in keys}) > 1
    lines = ["| top-1 [%] at lr | " + ("batch | " if several else "") + " | ".join(f"{lr:g}" for lr in lrs) + " |"]
    lines.append("|---|" + ("---|" if several else "") + "---|" * len(lrs))
    seeds = set()
    for key in keys:
        for column in columns:
            own = [
                c
                for c in report["cells"]
                if (c["task"], c["column"], c["batch"], c["opt"], c["clip"]) == (task, column, *key) and c["lr"] in lrs
            ]
            if not own:
                continue
            row = []
            for lr in lrs:
                values = [c["top1"] for c in own if c["lr"] == lr]
                seeds.add(len(values))
                row.append("" if not values else "NaN" if None in values else f"{sum(values) / len(values):.1f}")
            lines.append(f"| {NAMES[column]} | " + (f"{key[0]} | " if several else "") + " | ".join(row) + " |")
    count = "one seed" if seeds <= {0, 1} else f"mean of up to {max(seeds)} seeds"
    source = f"{count}; `{report['command']}`, [JSON](BASE/benchmarks/results/stability.json)"
    return "\n".join([*lines, "", f"*{source}*"])


def studies() -> dict[str, str]:
    main = ["cbn-turns-8-512", "cbn", "cbn-ring8", "taylor-full", "published", "none", "bn"]
    tuned = [3e-4, 1e-3, 3e-3, 1e-2]
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    tables = {
        "scratch": stability("digits", main, [(b, "sgd", None) for b in (1, 2, 8, 32)], rates),
        "scratch-adamw": stability("digits", main, [(2, "adamw", None)], [1e-4, 1e-3, 1e-2]),
        "scratch-windows": stability(
            "digits",
            [*(f"cbn-w{k}" for k in (1, 2, 4, 8)), "cbn", "cbn-w32", "cbn-w64"],
            [(2, "sgd", None)],
            [3e-3, 3e-2],
        ),
        "unbound": stability(
            "digits-residual",
            ["unbound-straight-2", "unbound-straight-4", "unbound-straight-16", "unbound-current", "unbound-bn", "bn"],
            [(b, "sgd", None) for b in (1, 2, 32)],
            [3e-3, 3e-2],
        ),
    }
    for task in ("sign_digits", "clothing"):
        columns = [*main[:-1], "cbn-no-exact", "none-w2", "bn", "frozen"]
        tables[f"{task}-clip"] = stability(task, columns, [(2, "sgd", 5.0), (32, "sgd", 5.0)], tuned)
        tables[f"{task}-free"] = stability(task, columns, [(2, "sgd", None), (32, "sgd", None)], tuned)
    return tables


def from_scratch() -> str:
    """Windows from random weights, beside statistics that are never out of date."""
    report = json.loads((RESULTS / "from_scratch.json").read_text())
    labels = {
        "bn": "BN", "window-2": "CBN, window 2 (default for new layers)",
        **{f"window-{k}": f"CBN, window {k}" for k in (8, 32)},
        "fresh-all": "BN's statistics of these and 14 more images, never out of date",
        "fresh-own": "the same, the gradient of the 14 for the layer's own weights only",
    }  # fmt: skip
    lines = ["| | top-1 [%] of each seed | mean |", "|---|---|---|"]
    for row, label in labels.items():
        values = [c["top1"] for c in sorted(report["cells"], key=lambda c: c["seed"]) if c["row"] == row]
        mean = "" if None in values else f"{sum(values) / len(values):.1f}"
        lines.append(f"| {label} | {', '.join('failed' if v is None else f'{v:.1f}' for v in values)} | {mean} |")
    source = f"*validation; `{report['command']}`, [JSON](BASE/benchmarks/results/from_scratch.json)*"
    return "\n".join([*lines, "", source])


def turns() -> str:
    """Top-1 with moments of patches in turn and of some positions."""
    report = json.loads((RESULTS / "stability.json").read_text())
    columns = [
        "cbn-no-exact",
        "cbn-turns-8-512",
        "cbn-turns-4-512",
        "cbn-turns-1-512",
        "cbn-turns-4-all",
        "cbn-turns-16-128",
    ]
    places = [("digits", 1e-2, None), ("digits", 3e-2, None)]
    places += [(task, lr, 5.0) for task in ("sign_digits", "clothing") for lr in (3e-3, 1e-2)]
    lines = ["| top-1 [%] | " + " | ".join(f"{task}, {lr:g}" for task, lr, _ in places) + " |"]
    lines.append("|---|" + "---|" * len(places))
    for column in columns:
        row = []
        for task, lr, clip in places:
            values = [
                c["top1"]
                for c in report["cells"]
                if (c["task"], c["column"], c["lr"], c["clip"], c["batch"], c["opt"])
                == (task, column, lr, clip, 2, "sgd")
            ]
            spread = f" ({min(values)} to {max(values)})" if len(values) > 1 else ""
            row.append(f"{sum(values) / len(values):.1f}{spread}" if values else "")
        lines.append(f"| {NAMES[column]} | " + " | ".join(row) + " |")
    source = f"mean (lowest to highest seed); `{report['command']}`, [JSON](BASE/benchmarks/results/stability.json)"
    return "\n".join([*lines, "", f"*{source}*"])


def _cells(report: dict[str, Any]) -> tuple[dict[Any, dict[str, Any]], dict[Any, float]]:
    """Rows of each (arch, batch, size) by column, and the ratio of folded inference."""
    steps, folded = {}, {}
    for cell in report["cells"]:
        key = (cell["arch"], cell["batch_size"], cell["img_size"])
        if cell["columns"] == "inference":
            folded[key] = cell["results"][0]["folded_over_plain"]
        else:
            steps[key] = {r["column"]: r for r in cell["results"]}
    return dict(sorted(steps.items())), folded


def speed() -> dict[str, str]:
    report = json.loads((RESULTS / "step_time_cpu.json").read_text())
    steps, folded = _cells(report)
    link = "[JSON](BASE/benchmarks/results/step_time_cpu.json)"
    source = f"*`make bench-cpu`, {link}; {report['machine']}, torch {report['versions']['torch']}, float32*"

    main = [
        "| | BN step [ms] | CBN over BN | frozen BN over BN | averaging only over BN | published over BN "
        "| published over CBN | folded inference over timm's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (arch, batch, size), row in steps.items():
        if size == 224 and batch in (2, 8) and "gn" in row:
            ratios = [f"{row[c]['over_bn']:.2f}" for c in ("frozen", "average", "published")]
            gain = row["published"]["step"] / row["cbn"]["step"]
            main.append(
                f"| {arch}, batch {batch} | {row['bn']['step']:.0f} | **{row['cbn']['over_bn']:.2f}** | "
                + " | ".join(ratios)
                + f" | {gain:.1f} | {folded[arch, batch, size]:.2f} |"
            )
    every = [
        "| | norm | step [ms] | over BN | forward | backward | optimizer | memory [MB] | history [MB] |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (arch, batch, size), row in steps.items():
        for i, (name, r) in enumerate(row.items()):
            where = f"{arch}, batch {batch}, {size} px" if i == 0 else ""
            times = " | ".join(f"{r[k]:.1f}" for k in ("forward", "backward", "optimizer"))
            every.append(
                f"| {where} | {BENCH[name]} | {r['step']:.1f} | {r['over_bn']:.2f} | {times} | {r['memory']:.0f} | "
                f"{r['history']:.1f} |"
            )
    return {"speed": "\n".join([*main, "", source]), "speed-all": "\n".join([*every, "", source])}


BENCH = {
    "bn": "BN", "frozen": "frozen BN", "cbn": "CBN (default)", "cbn-every": "CBN, moments every step, all positions",
    "cbn-paper": "CBN, the paper's settings", "average": "averaging only", "gn": "GroupNorm",
    "published": "as published, literally",
}  # fmt: skip


def layers() -> str:
    report = json.loads((RESULTS / "layer_cpu.json").read_text())
    names = ["nn.BatchNorm2d", "CBN, unbound", "chosen: forward", "chosen: backward", "cpu: forward", "cpu: backward"]
    lines = [
        "| shape | batch | MB | nn.BatchNorm2d | CBN, unbound | compiled: forward | backward | ATen: forward "
        "| backward | share of copy: forward | backward |",
        "|---|" + "---|" * 10,
    ]
    for cell in report["cells"]:
        times = " | ".join(f"{cell['ms'][n]:.2f}" for n in names)
        shares = " | ".join(f"{cell['share of copy'][k]:.2f}" for k in ("forward", "backward"))
        lines.append(f"| {cell['shape']} | {cell['size'][0]} | {cell['megabytes']:.1f} | {times} | {shares} |")
    link = "[JSON](BASE/benchmarks/results/layer_cpu.json)"
    source = f"*ms; copy {report['copy_gb_per_s']:.0f} GB/s; `{report['command']}`, {link}, {report['machine']}*"
    return "\n".join([*lines, "", source])


def limits() -> dict[str, str]:
    report = json.loads((RESULTS / "bounds.json").read_text())
    lines = [
        "| | step of all convs [GMAC] | C every step, all positions | C by default | BN's passes [MB] "
        "| passes over weights [MB] |",
        "|---|---|---|---|---|---|",
    ]
    for b in report["bounds"]:
        lines.append(
            f"| {b['arch']}, batch {b['batch_size']} | {b['step_gmacs']:.1f} | +{100 * b['moments_of_all']:.0f} % | "
            f"+{100 * b['moments_default']:.1f} % | {b['bn_mb']:.0f} | {b['weight_passes_mb']:.0f} |"
        )
    parts = {
        "step": "whole step",
        "statistics": "statistics",
        "window": "window: compensation, running statistics",
        "normalize": "normalise, with ReLU6 in MobileNetV2",
        "with_patches": "moments of patches (mean over steps)",
        "past": "history",
        "python": "the rest of the layers' forward pass",
        "backward": "backward",
        "gradient_through_the_past": "gradient for the weights through the past",
    }
    where = ["| ms per step, batch 2 | " + " | ".join(p["arch"] for p in report["profile"]) + " |"]
    where.append("|---|" + "---|" * len(report["profile"]))
    for key, label in parts.items():
        where.append(f"| {label} | " + " | ".join(f"{p['ms'][key]:.1f}" for p in report["profile"]) + " |")
    source = f"*`{report['command']}`, [JSON](BASE/benchmarks/results/bounds.json), {report['machine']}*"
    return {"bounds": "\n".join([*lines, "", source]), "profile": "\n".join([*where, "", source])}


def demo() -> str:
    result = json.loads((RESULTS / "demo.json").read_text())
    lines = ["| | top-1 [%] | median time per step [ms] | over BN |", "|---|---|---|---|"]
    base = result["bn"]["median_step_seconds"]
    for norm in ("bn", "cbn"):
        run = result[norm]
        step = run["median_step_seconds"]
        lines.append(f"| {norm.upper()} | {run['best_top1']:.1f} | {1000 * step:.1f} | {step / base:.2f} |")
    difference = f"largest difference between exported and fine-tuned model: {result['largest_difference']:.1g}"
    source = "`cbn demo --json`, [JSON](BASE/benchmarks/results/demo.json)"
    return "\n".join([*lines, "", f"*{source}; {difference}*"])


def fill(path: Path, tables: dict[str, str]) -> None:
    text = path.read_text()
    base = "." if path.parent == ROOT else ".."
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table.replace('BASE', base)}\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{path} has {count} places for the table {name!r}, not one")
    path.write_text(text)


if __name__ == "__main__":
    study = studies()
    performance = {**speed(), **limits(), "layers": layers(), "turns": turns()}
    fill(
        ROOT / "README.md",
        {
            "demo": demo(),
            "speed": performance["speed"],
        },
    )
    fill(ROOT / "docs" / "experiments.md", {**study, "from-scratch": from_scratch()})
    fill(ROOT / "docs" / "performance.md", {k: v for k, v in performance.items() if k != "speed"})
