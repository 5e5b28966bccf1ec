"""python -m benchmarks.documents.readme: writes tables of README.md, start.md, experiments.md and performance.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.documents.experiments import NOT_YET, parts, steepness, tables, traces
from benchmarks.provenance import RESULTS, ROOT


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


def over_bn(row: dict[str, Any]) -> str:
    """Median and quartiles of the ratios to BN's step, in bold where BN's is outside of them and above."""
    low, high = row["over_bn_quartiles"]
    if row["column"] == "bn":
        return "1"
    text = f"{row['over_bn']:.2f} ({low:.2f} to {high:.2f})"
    return f"**{text}**" if high < 1 else text


def speed() -> dict[str, str]:
    report = json.loads((RESULTS / "step_time_cpu.json").read_text())
    steps, folded = _cells(report)
    link = "[JSON](BASE/benchmarks/results/step_time_cpu.json)"
    version = f"version {report['commit'][:7]}"
    source = f"*`make bench-cpu`, {link}, {version}; {report['machine']}, torch {report['versions']['torch']}, float32*"

    main = [
        "| | BN step [ms] | CBN over BN | kept, CBN over BN | frozen BN over BN | kept | frozen, folded (tune) over BN "
        "| kept | folded inference over timm's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (arch, batch, size), row in steps.items():
        ratios = [
            text for c in ("cbn", "frozen", "tune") for text in (over_bn(row[c]), f"{row[c]['kept_over_bn']:.2f}")
        ]
        inference = f"{folded[arch, batch, size]:.2f}" if (arch, batch, size) in folded else ""
        main.append(
            f"| {arch}, batch {batch}, {size} px | {row['bn']['step']:.0f} | {' | '.join(ratios)} | {inference} |"
        )
    short = ["| | CBN: time | memory | frozen BN: time |", "|---|---|---|---|"]
    for arch, batch, size in SHOWN:
        row = steps[arch, batch, size]
        cells = [over_bn(row["cbn"]), f"{row['cbn']['kept_over_bn']:.2f}", over_bn(row["frozen"])]
        short.append(f"| {arch}, {batch} of {size} px | {' | '.join(cells)} |")
    every = [
        "| | norm | step [ms] | over BN | forward | backward | optimizer | memory [MB] | history [MB] | kept [MB] "
        "| over BN |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (arch, batch, size), row in steps.items():
        for i, (name, r) in enumerate((name, r) for name, r in row.items() if name in BENCH):
            where = f"{arch}, batch {batch}, {size} px" if i == 0 else ""
            times = " | ".join(f"{r[k]:.1f}" for k in ("forward", "backward", "optimizer"))
            every.append(
                f"| {where} | {BENCH[name]} | {r['step']:.1f} | {over_bn(r)} | {times} | {r['memory']:.0f} | "
                f"{r['history']:.1f} | {r['kept']:.1f} | {r['kept_over_bn']:.2f} |"
            )
    tables = {"cost": short, "speed": main, "speed-all": every}
    return {name: "\n".join([*lines, "", source]) for name, lines in tables.items()}


SHOWN = [
    ("resnet50", 2, 224), ("resnet50", 2, 512), ("mobilenetv2_100", 2, 224), ("mobilenetv2_100", 2, 512),
    ("mobilenetv2_035", 2, 96),
]  # fmt: skip
BENCH = {
    "bn": "BN", "frozen": "frozen BN", "cbn": "CBN (default)", "cbn-paper": "CBN, the paper's settings",
    "cbn-unfolded": "CBN, not folded", "tune": "frozen BN, folded (tune)", "gn": "GroupNorm",
    "published": "as published, literally",
}  # fmt: skip


def limits() -> dict[str, str]:
    report = json.loads((RESULTS / "bounds.json").read_text())
    lines = [
        "| | step of all convs [GMAC] | BN's passes [MB] | passes over weights, or outputs where smaller [MB] "
        "| looks, mean over steps [MB] | state [MB] |",
        "|---|---|---|---|---|---|",
    ]
    for b in report["bounds"]:
        numbers = " | ".join(f"{b[k]:.0f}" for k in ("bn_mb", "weight_passes_mb", "looks_mb"))
        lines.append(
            f"| {b['arch']}, batch {b['batch_size']} | {b['step_gmacs']:.1f} | {numbers} | {b['state_mb']:.2f} |"
        )
    parts = {
        "step": "whole step",
        "convs": "the convs themselves",
        "begin": "s θ and β + s (b - M) at today's weights",
        "look": "looks (mean over steps)",
        "scale": "outputs scaled: in looks, and where they are smaller than weights",
        "write": "running statistics",
        "gradient": "gradient of the weights through s, M and S",
        "rest": "the rest of the folded layers: sθ in the backward pass, Python",
        "norms": "the norm layers: counting, activations",
    }
    source = (
        f"*`{report['command']}`, [JSON](BASE/benchmarks/results/bounds.json), version {report['commit'][:7]}, "
        f"{report['machine']}*"
    )
    tables = {"bounds": "\n".join([*lines, "", source]), "profile": NOT_YET}
    if report["profile"]:
        where = ["| ms per step, batch 2 | " + " | ".join(p["arch"] for p in report["profile"]) + " |"]
        where.append("|---|" + "---|" * len(report["profile"]))
        for key, label in parts.items():
            where.append(f"| {label} | " + " | ".join(f"{p['ms'][key]:.1f}" for p in report["profile"]) + " |")
        tables["profile"] = "\n".join([*where, "", source])
    return tables


def throughput() -> str:
    """Images per second of `cbn finetune`, medians over rounds, and over BN's in the same round."""
    file = RESULTS / "throughput.json"
    if not file.is_file():
        return NOT_YET
    report = json.loads(file.read_text())
    of = {(r["norm"], r["batch_size"], r["round"]): r["images_per_second"] for r in report["runs"]}
    rounds, sizes = sorted({key[2] for key in of}), sorted({key[1] for key in of})
    lines = ["| images per second | " + " | ".join(f"batch {size} | over BN" for size in sizes) + " |"]
    lines.append("|---|" + "---|---|" * len(sizes))
    for norm in dict.fromkeys(key[0] for key in of):
        cells = []
        for size in sizes:
            ratios = sorted(of[norm, size, i] / of["bn", size, i] for i in rounds)
            spread = "1" if norm == "bn" else f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells += [f"{median(of[norm, size, i] for i in rounds):.0f}", spread]
        lines.append(f"| {BENCH[norm]} | {' | '.join(cells)} |")
    source = (
        f"*median, smallest and largest of {len(rounds)} rounds; `{report['command']}`, "
        f"[JSON](BASE/benchmarks/results/throughput.json), version {report['commit'][:7]}, {report['machine']}*"
    )
    return "\n".join([*lines, "", source])


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
    performance = {**speed(), **limits(), "throughput": throughput()}
    fill(ROOT / "README.md", {"cost": performance.pop("cost")})
    fill(ROOT / "docs" / "start.md", {"demo": demo()})
    fill(ROOT / "docs" / "experiments.md", tables())
    fill(ROOT / "docs" / "method.md", {"parts": parts(), "steepness": steepness(), "traces": traces()})
    fill(ROOT / "docs" / "performance.md", performance)
