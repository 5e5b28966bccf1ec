"""python benchmarks/readme.py: writes the tables of README.md and docs/method.md from benchmarks/results/*.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {
    "bn": "BN",
    "frozen": "frozen BN",
    "cbn": "CBN (default)",
    "cbn-ring8": "CBN, ring of 8",
    "cbn-published": "CBN as published",
}


def clothing(names: list[str]) -> str:
    report = json.loads((RESULTS / "clothing_batch2.json").read_text())
    cells = {(c["norm"], c["lr"]): c for c in report["cells"] if c["seed"] == 0}
    rates = sorted({lr for norm, lr in cells if norm in names})
    lines = ["| top-1 [%] at lr | " + " | ".join(f"{lr:g}" for lr in rates) + " | best |"]
    lines.append("|---|" + "---|" * (len(rates) + 1))
    for norm in names:
        own = {lr: c.get("last_top1") for (n, lr), c in cells.items() if n == norm}
        best = max(v for v in own.values() if v is not None)
        row = ["" if lr not in own else "diverged" if own[lr] is None else f"{own[lr]:.1f}" for lr in rates]
        lines.append(f"| {LABELS[norm]} | " + " | ".join(row) + f" | **{best:.1f}** |")
    link = "[JSON](BASE/benchmarks/results/clothing_batch2.json)"
    source = f"`{report['command']}`, {link}, torch {report['versions']['torch']}"
    return "\n".join([*lines, "", f"*{source}*"])


NAMES = {
    "cbn": "CBN (default)",
    "cbn-ring8": "CBN, ring of 8",
    "cbn-no-exact": "CBN, projection everywhere",
    "taylor-full": "Taylor, full gradient",
    "published": "as published: Taylor, current gradient, ring of 8",
    "none": "averaging only",
    "none-w2": "averaging only, window 2",
    "bn": "BN",
    "frozen": "frozen BN",
    **{f"cbn-w{k}": f"CBN, window {k}" for k in (1, 2, 4, 8, 32, 64)},
    "unbound-bn": "BN there, CBN elsewhere",
    "unbound-straight-2": "window 2, whole gradient (default)",
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
    main = ["cbn", "cbn-ring8", "taylor-full", "published", "none", "bn"]
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
    fill(
        ROOT / "README.md",
        {
            "clothing": clothing(["bn", "frozen", "cbn"]),
            "demo": demo(),
            **{name: study[name] for name in ("sign_digits-clip", "clothing-clip")},
        },
    )
    fill(ROOT / "docs" / "method.md", study)
