"""python -m benchmarks.documents.training: writes the tables of docs/training.md from benchmarks/results/*.json."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT


def source(report: dict[str, Any], file: str) -> str:
    versions = report["versions"]
    link = f"[JSON](BASE/benchmarks/results/{file})"
    return f"*`{report['command']}`, {link}, {report['machine']}, torch {versions['torch']}*"


def auto_lr() -> str:
    """Validation top-1 by images per update and rate."""
    report = json.loads((RESULTS / "auto_lr.json").read_text())
    cells = {(c["opt"], c["batch_size"], c["factor"]): c for c in report["cells"] if c["seed"] == 0}
    factors = sorted({key[2] for key in cells})
    names = {1.0: "auto"}
    heads = [names.get(f, "a third" if f < 1 else f"{f:g} times") for f in factors]
    lines = ["| top-1 [%] | images per update | auto | " + " | ".join(f"at {h}" for h in heads) + " |"]
    lines.append("|---|---|---|" + "---|" * len(factors))
    for opt, batch in sorted({key[:2] for key in cells}, reverse=True):
        own = [cells.get((opt, batch, factor)) for factor in factors]
        tops = ["" if c is None else f"{c['last_top1']:.1f}" if "last_top1" in c else "diverged" for c in own]
        rate = cells[opt, batch, 1.0]["lr"] if (opt, batch, 1.0) in cells else None
        lines.append(f"| {opt} | {batch} | {'' if rate is None else f'{rate:.2g}'} | " + " | ".join(tops) + " |")
    return "\n".join([*lines, "", source(report, "auto_lr.json") + ", one seed"])


def statistics_shift() -> str:
    """Distance of each data set from ImageNet, for each network the range over the seeds."""
    report = json.loads((RESULTS / "statistics_shift.json").read_text())
    nats: dict[tuple[str, str], list[float]] = {}
    for c in report["cells"]:
        nats.setdefault((c["data"], c["model"]), []).append(c["nats"])
    models = list(dict.fromkeys(model for _, model in nats))
    lines = [f"| nats | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    for data in dict.fromkeys(data for data, _ in nats):
        ranges = [f"{min(nats[data, m]):.2f} to {max(nats[data, m]):.2f}" for m in models]
        lines.append(f"| {data} | {' | '.join(ranges)} |")
    return "\n".join([*lines, "", source(report, "statistics_shift.json") + ", three choices of 64 images"])


def communication() -> str:
    """Bytes of gradients and statistics."""
    report = json.loads((RESULTS / "communication.json").read_text())
    lines = ["| | history of each process's own | `--sync-cbn` |", "|---|---|---|"]
    own, sync = report["own"], report["sync"]
    mega = "{:.1f} MB".format
    for what, key in (
        ("gradients, in every update", "gradient_bytes"),
        ("statistics, in every step", "bytes_per_step"),
    ):
        lines.append(f"| {what} | {mega(own[key] / 1e6)} | {mega(sync[key] / 1e6)} |")
    lines.append(
        f"| messages of norm layers, in every step | {own['calls_per_step']:.0f} | {sync['calls_per_step']:.0f} |"
    )
    lines.append(f"| running statistics, before an evaluation | {mega(own['statistics_bytes'] / 1e6)} | the same |")
    lines.append(f"| never sent: the history | {mega(own['history_bytes'] / 1e6)} | the same |")
    return "\n".join([*lines, "", source(report, "communication.json")])


def loader() -> str:
    """Images per second of loader, training and both."""
    report = json.loads((RESULTS / "loader_cpu.json").read_text())
    lines = ["| images/s | px | batch | workers | loader alone | training alone | both | both over training |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in report["rows"]:
        rates = " | ".join(f"{r[what]:.1f}" for what in ("loader", "training", "both"))
        lines.append(
            f"| {r['model']} | {r['size']} | {r['batch_size']} | {r['workers']} | {rates} | "
            f"{r['both_over_training']:.2f} |"
        )
    note = f"; photos of {report['pixels']} px, medians of {report['rounds']} rounds of {report['steps']} steps"
    return "\n".join([*lines, "", source(report, "loader_cpu.json") + note])


if __name__ == "__main__":
    fill(
        ROOT / "docs" / "training.md",
        {
            "auto_lr": auto_lr(),
            "communication": communication(),
            "loader": loader(),
            "shift": statistics_shift(),
        },
    )
