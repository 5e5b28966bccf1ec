"""python -m benchmarks.documents.coverage: fills docs/coverage.md from coverage.json and third_party.json."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT

sys.path[:0] = [str(ROOT / "tests")]

from helpers.promises import LARGE_M, SPARED  # noqa: E402
from helpers.subject import CALIBRATION_IMAGES, MOST_NOISE  # noqa: E402

THIRD = RESULTS / "third_party.json"
DOCUMENT = ROOT / "docs" / "coverage.md"
Record = dict[str, Any]
STATUSES = ("compensated", "window", "kept")
# column of the table by family, and the checks of tests/helpers/promises.py that it is about
COLUMNS = {
    "convert": ("build", "convert", "meta"),
    "eval": ("eval",),
    "train": ("train",),
    "copies": ("copies",),
    "revert": ("revert",),
    "fold bn": ("fold_bn",),
    "fold affine": ("fold_affine",),
    "fold conv": ("fold_conv_f64",),
    "export": ("export",),
    "timm's reparameterize": ("reparam",),
}
# those of third_party.py likewise
THIRD_COLUMNS = {
    "convert": ("build", "convert"), "eval": ("eval",), "deepcopy": ("copy",), "3 steps": ("train",),
    "resume": ("resume",), "revert": ("revert",), "fold bn": ("fold_bn",), "fold affine": ("fold_affine",),
    "fold conv": ("fold_conv",),
}  # fmt: skip


def passed(records: Iterable[Record], checks: Iterable[str]) -> str:
    """Architectures that pass all of the checks, over those that were put to one."""
    own = [[r["checks"][c]["ok"] for c in checks if c in r["checks"]] for r in records]
    own = [results for results in own if results]
    return f"{sum(map(all, own))}/{len(own)}" if own else ""


def share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if total else ""


def total(records: Iterable[Record], key: str) -> int:
    return sum(r[key] or 0 for r in records)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, or "None." without rows."""
    head = list(head)
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]) if lines else "None."


def totals(records: list[Record]) -> str:
    norms = total(records, "norms")
    parts = ", ".join(f"{total(records, k)} {k} ({share(total(records, k), norms)} %)" for k in STATUSES)
    failed = sum(any(not c["ok"] for c in r["checks"].values()) for r in records)
    fail = "1 architecture fails" if failed == 1 else f"{failed} architectures fail"
    return f"{len(records)} architectures with BatchNorm, {norms} norm layers: {parts}. {fail}."


def family_row(name: str, records: list[Record]) -> list[object]:
    norms = total(records, "norms")
    folded = [r for r in records if r["left_bn"] is not None]
    return [
        name, len(records), norms, share(total(records, "compensated"), norms), share(total(records, "window"), norms),
        total(records, "kept"), *(passed(records, checks) for checks in COLUMNS.values()),
        f"{total(folded, 'left_bn')}/{total(folded, 'norms')}" if folded else "",
    ]  # fmt: skip


def by_family(records: list[Record]) -> str:
    families = defaultdict(list)
    for record in records:
        families[record["family"]].append(record)
    rows = [family_row(name, own) for name, own in sorted(families.items())]
    head = ["family", "archs", "norms", "compensated [%]", "window [%]", "kept", *COLUMNS, "left BN by fold conv"]
    return table(head, [*rows, family_row("**all**", records)])


def failed_checks(records: list[Record]) -> str:
    rows = [
        (r["architecture"], check, (result["error"] or "").replace("|", "\\|"))
        for r in records
        for check, result in r["checks"].items()
        if not result["ok"]
    ]
    return table(["architecture", "check", "why"], rows)


def why_not_compensated(records: list[Record]) -> str:
    layers: Counter[str] = Counter()
    architectures: Counter[str] = Counter()
    for record in records:
        layers.update(record["reasons"])
        architectures.update(record["reasons"].keys())
    rows = [(*reason.split(": ", 1), n, architectures[reason]) for reason, n in layers.most_common()]
    return table(["status", "reason", "layers", "archs"], rows)


def errors(records: list[Record]) -> str:
    """The largest relative error of each check that measures one; the loss of the training steps is none."""
    rows = []
    for check in ("fold_affine", "fold_conv_f64", "export", "reparam"):
        found = [(r["checks"][check]["value"], r["architecture"]) for r in records if check in r["checks"]]
        if found := [pair for pair in found if pair[0] is not None]:
            rows.append((check, f"{max(found)[0]:.1e}", max(found)[1], f"{sorted(found)[len(found) // 2][0]:.1e}"))
    return table(["check", "largest relative error", "of", "median"], rows)


def onnx(records: list[Record]) -> str:
    rows = [
        (r["architecture"], r["family"], f"{result['value']:.1e}" if result["ok"] else f"fails: {result['error']}")
        for r in records
        if (result := r["checks"].get("onnx", r["checks"].get("build")))
    ]
    return table(["architecture", "family", "relative error in onnxruntime"], rows)


def noisiest(records: list[Record]) -> str:
    worst = max(records, key=lambda r: r["noise"])
    return f"{worst['architecture']}, {worst['noise']:.0e}"


def sizes(records: list[Record]) -> str:
    counted = Counter((r["px"], "img_size" in r["kwargs"]) for r in records)
    return ", ".join(f"{n} at {px} px{' (`img_size`)' if sized else ''}" for (px, sized), n in counted.most_common())


def source(report: dict[str, Any], records: list[Record]) -> str:
    commits = sorted({r["commit"][:10] for r in records})
    versions = report["versions"]
    missing = len(report["architectures"]) - len(records)
    return (
        f"`python -m benchmarks.coverage.sweep`, [JSON](../benchmarks/results/coverage.json), {report['date']}; "
        f"{report['machine']}, torch {versions['torch']}, timm {versions['timm']}; commit {', '.join(commits)}; "
        f"{sum(r['seconds'] for r in records) / 3600:.1f} hours of one core."
        + (f" **{missing} architectures are not checked yet.**" if missing else "")
    )


def conditions(records: list[Record]) -> str:
    """What the architectures were checked with, and how far rounding alone carries them."""
    large = sum("meta" in r["checks"] for r in records)
    return (
        f"Running statistics are of {CALIBRATION_IMAGES} other images and the two that the checks see. Smallest sizes "
        f"that architectures are checked at: {sizes(records)}. {large} have more than 150 million parameters "
        f"and are only converted, on the meta device; for want of time those with more than {LARGE_M} million "
        f"are spared {', '.join(SPARED)}. A change of the images in the last bit changes no outputs by more than "
        f"{MOST_NOISE:.0e}, relative (largest: {noisiest(records)})."
    )


def tables(report: dict[str, Any]) -> dict[str, str]:
    """What docs/coverage.md gets, by the names of its places there."""
    records = sorted(report["records"].values(), key=lambda r: (r["family"], r["architecture"]))
    large = [r for r in records if "meta" in r["checks"]]
    return {
        "totals": f"{totals(records)}\n\n{source(report, records)}",
        "conditions": conditions(records),
        "families": by_family(records),
        "failed": failed_checks(records),
        "errors": errors(records),
        "reasons": why_not_compensated(records),
        "onnx": onnx(list(report["onnx"].values())),
        "meta": ", ".join(f"{r['architecture']} ({r['params_m']:.0f} M)" for r in large) or "None.",
        **third_party(json.loads(THIRD.read_text())),
    }


def third_party(report: Record) -> dict[str, str]:
    """A row for each other library, what fails, and why layers are not compensated; see third_party.py."""
    records = [{"architecture": r["model"], "reasons": {}, **r} for r in report["records"].values()]
    rows = []
    for library in dict.fromkeys(r["architecture"].partition("/")[0] for r in records):
        own = [r for r in records if r["architecture"].startswith(f"{library}/")]
        models = ", ".join(r["architecture"].partition("/")[2] for r in own)
        counts = [total(own, name) for name in ("norms", "compensated", "unfolded", "window", "kept")]
        fails = sum(bool(r.get("bn_error")) for r in own)
        rows.append(
            [f"{library}: {models}", len(own), *counts, fails or ""]
            + [passed(own, checks) for checks in THIRD_COLUMNS.values()]
        )
    head = [
        "library: models", "count", "norms", "compensated", "of these unfolded", "window", "kept", "BN fails",
        *THIRD_COLUMNS,
    ]  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    noisy = [r["architecture"] for r in records if 10 * r.get("noise", 0) > 1e-9]
    well = sum(all(c["ok"] for c in r["checks"].values()) for r in records)
    tolerance = ", ".join(noisy) or "in none"
    return {
        "others-totals": (
            f"{well} of {len(records)} models pass every check they were put to. "
            "`python -m benchmarks.coverage.third_party`, [JSON](../benchmarks/results/third_party.json); "
            f"{report['machine']}; {versions}. Ten times what other last bits of the inputs make is the tolerance of: "
            f"{tolerance}."
        ),
        "others": table(head, rows),
        "others-failed": failed_checks(records),
        "others-reasons": why_not_compensated(records),
    }


def summary(report: dict[str, Any]) -> str:
    """What README says of the sweep."""
    records = list(report["records"].values())
    norms = total(records, "norms")
    checked = [r for r in records if "meta" not in r["checks"]]
    good = [r for r in checked if all(c["ok"] for c in r["checks"].values())]
    converted = [r for r in records if all(r["checks"][c]["ok"] for c in ("convert", "meta") if c in r["checks"])]
    every = len(report["architectures"])
    third = json.loads(THIRD.read_text())["records"]
    well = [r for r in third.values() if all(c["ok"] for c in r["checks"].values())]
    libraries = len({name.split("/")[0] for name in third})
    unseen = f", of which {every - len(records)} are not checked yet," if len(records) < every else ""
    return (
        f"{len(converted)} of timm's {every} architectures with BatchNorm{unseen} convert\n"
        f"({norms} norm layers, {share(total(records, 'compensated'), norms)} % compensated). {len(good)} of the "
        f"{len(checked)} with at most 150 million parameters also train, revert to the bit, fold and export\n"
        f"to plain timm ([docs/coverage.md](docs/coverage.md)). {len(well)} of {len(third)} models of {libraries} "
        "other libraries train, resume and revert to the bit, and fold.\n\n"
        "*`make sweep third-party`, JSON: [timm](benchmarks/results/coverage.json), "
        "[others](benchmarks/results/third_party.json)*"
    )


def main(path: Path) -> None:
    report = json.loads(path.read_text())
    fill(DOCUMENT, tables(report))
    fill(DOCUMENT.parents[1] / "README.md", {"coverage": summary(report)})
    print(totals(list(report["records"].values())))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "coverage.json")
