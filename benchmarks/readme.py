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
    fill(ROOT / "README.md", {"clothing": clothing(["bn", "frozen", "cbn"]), "demo": demo()})
    fill(ROOT / "docs" / "method.md", {"variants": clothing(["cbn", "cbn-ring8", "cbn-published"])})
