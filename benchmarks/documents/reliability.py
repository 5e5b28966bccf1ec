"""python -m benchmarks.documents.reliability: fills docs/reliability.md from chaos.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "reliability.md"


def table(head: tuple[str, ...], groups: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each kind, and one for all."""
    rows = ["| " + " | ".join((*head, "cases", "as they must be", "exit codes: how often", "s")) + " |"]
    rows.append("|---" * (len(head) + 4) + "|")
    for name, group in groups.items():
        codes = ", ".join(f"{code}: {count}" for code, count in group["codes"].items())
        rows.append(f"| {name} | {group['runs']} | {group['ok']} | {codes} | {group['seconds']:.0f} |")
    runs, ok, seconds = (sum(group[key] for group in groups.values()) for key in ("runs", "ok", "seconds"))
    rows.append(f"| **all** | {runs} | {ok} | | {seconds:.0f} |")
    return "\n".join(rows)


def tables(report: dict[str, Any]) -> dict[str, str]:
    """What docs/reliability.md gets, by the names of its places there."""
    versions = report["versions"]
    return {
        "tried": (
            f"`{report['command']}`, [JSON](../benchmarks/results/chaos.json), {report['date']}; {report['machine']}, "
            f"Python {versions['python']}, torch {versions['torch']}, timm {versions['timm']}; "
            f"commit {report['commit'][:10]}."
        ),
        "kills": table(("signal, to",), report["kills"]),
        "settings": table(("settings of the run",), report["settings"]),
        "files": table(("file",), report["targets"]),
        "damages": table(("damage",), report["damages"]),
        "failures": "\n".join(f"- {failure['reason']}" for failure in report["failures"]) or "None.",
    }


def main(path: Path) -> None:
    fill(DOCUMENT, tables(json.loads(path.read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "chaos.json")
