"""Runs the recipes in examples/ with CBN and with what it replaces, and says what came out.

    python benchmarks/examples.py [--data ../shared/data] [--only 'smp*'] [--again]

Needs the libraries (make test-integrations' environment has them). Writes benchmarks/results/examples.json after every
run, and the table in examples/README.md; runs that are in the JSON are not repeated without --only or --again. Same
settings for all norms of a recipe, one seed: it shows that they run and where they stand, not which norm is better.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from readme import fill
from report import RESULTS, provenance

ROOT = RESULTS.parents[1]
OUTPUT = RESULTS / "examples.json"
FIGURE = re.compile(r"^(?:cbn|bn|frozen): (.+) ([\d.]+) on (.+)$", re.MULTILINE)  # what common.say prints
# the recipe's name in the table: its file, arguments, and the norms
RECIPES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "Lightning": ("lightning_classification", [], ("cbn", "bn", "frozen")),
    "Hugging Face Trainer": ("huggingface_classification", [], ("cbn", "bn", "frozen")),
    "timm's own loop": ("timm_loop", [], ("cbn", "bn", "frozen")),
    "mmengine, norm_eval": ("mmengine_norm_eval", [], ("cbn", "bn", "frozen")),
    "FCOS": ("detection", [], ("cbn", "bn", "frozen")),
    "Faster R-CNN": ("detection", ["--detector", "faster_rcnn"], ("cbn", "bn", "frozen")),
    "FCOS, FrozenBN backbone": ("frozen_backbone", [], ("cbn", "frozen")),
    "smp Unet": ("smp_unet", [], ("cbn", "bn", "frozen")),
    "MONAI 3d UNet, from scratch": ("monai_unet3d", [], ("cbn", "bn")),
    "YOLO11, from scratch": ("ultralytics_yolo", [], ("cbn", "bn")),
}


def run(recipe: str, norm: str, data: Path) -> dict[str, Any]:
    """The figure that the recipe prints, and how long it took."""
    file, options, _ = RECIPES[recipe]
    command = [sys.executable, str(ROOT / f"examples/{file}.py"), "--data", str(data), "--norm", norm, *options]
    began = time.monotonic()
    # threads that wait for each other are slower than none beside any other process
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{recipe}, {norm}: {done.stderr[-2000:]}")
    ((what, value, where),) = FIGURE.findall(done.stdout)
    return {
        "recipe": recipe, "file": file, "norm": norm, "what": what, "value": float(value), "where": where,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| recipe | figure | CBN | BN | frozen BN | CBN's run [s] |", "|---|---|---|---|---|---|"]
    for recipe, (file, _, _) in RECIPES.items():
        own = {row["norm"]: row for row in rows if row["recipe"] == recipe}
        if not own:
            lines.append(f"| [{recipe}]({file}.py) | not run yet | | | | |")
            continue
        one = next(iter(own.values()))
        values = " | ".join(f"{own[norm]['value']:.1f}" if norm in own else "" for norm in ("cbn", "bn", "frozen"))
        seconds = f"{own['cbn']['seconds']:.0f}" if "cbn" in own else ""
        lines.append(f"| [{recipe}]({file}.py) | {one['what']}, {one['where']} | {values} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--only", default="*", help="a pattern of recipes")
    parser.add_argument("--again", action="store_true", help="run again what is in the report already")
    arguments = parser.parse_args()
    rows = json.loads(OUTPUT.read_text())["rows"] if OUTPUT.is_file() else []
    for recipe, (file, _, norms) in RECIPES.items():
        for norm in norms if fnmatchcase(file, arguments.only) else ():
            old = [row for row in rows if (row["recipe"], row["norm"]) == (recipe, norm)]
            if old and not arguments.again and arguments.only == "*":
                continue
            rows = [row for row in rows if row not in old] + [run(recipe, norm, arguments.data)]
            print(rows[-1], file=sys.stderr, flush=True)
            head = provenance("python benchmarks/examples.py --data ../shared/data")
            OUTPUT.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    fill(ROOT / "examples" / "README.md", {"loops": table(rows)})


if __name__ == "__main__":
    main()
