"""Runs the recipes in examples/ with CBN and with what it replaces, and says what came out.

    python -m benchmarks.coverage.examples [--data ../shared/data] [--only 'smp*'] [--again]

Needs the libraries (make test-integrations' environment has them). Writes benchmarks/results/examples.json after every
run, and the table in examples/README.md; runs that are in the JSON are not repeated without --only or --again. Each
norm at three rates, of which the best is shown, and one seed: it shows that the recipes run and where they stand, not
which norm is better.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT, provenance

OUTPUT = RESULTS / "examples.json"
FIGURE = re.compile(r"^(?:cbn|bn|frozen): (.+) ([\d.]+) on (.+)$", re.MULTILINE)  # what common.say prints
SHARES = (1.0, 0.3, 0.1)  # of the recipe's own rate


class Recipe(NamedTuple):
    """A file in examples/ with its rate, the norms that it is run with, and other arguments."""

    file: str
    lr: float
    norms: tuple[str, ...] = ("cbn", "bn", "frozen")
    options: tuple[str, ...] = ()


RECIPES = {  # by the name in the table
    "Lightning": Recipe("lightning_classification", 0.01),
    "Hugging Face Trainer": Recipe("huggingface_classification", 0.01),
    "timm's own loop": Recipe("timm_loop", 0.01),
    "mmengine, norm_eval": Recipe("mmengine_norm_eval", 0.01),
    "FCOS": Recipe("detection", 0.01),
    "Faster R-CNN": Recipe("detection", 0.01, options=("--detector", "faster_rcnn")),
    "FCOS, FrozenBN backbone": Recipe("frozen_backbone", 0.01, ("cbn", "frozen")),
    "smp Unet": Recipe("smp_unet", 0.03),
    "MONAI 3d UNet, from scratch": Recipe("monai_unet3d", 0.05, ("cbn", "bn")),
    "YOLO11, from scratch": Recipe("ultralytics_yolo", 0.005, ("cbn", "bn")),
}


def run(name: str, norm: str, lr: float, data: Path) -> dict[str, Any]:
    """The figure that the recipe prints, and how long it took."""
    recipe = RECIPES[name]
    command = [sys.executable, str(ROOT / f"examples/{recipe.file}.py"), "--data", str(data), "--norm", norm]
    command += ["--lr", f"{lr:g}", *recipe.options]
    began = time.monotonic()
    # threads that wait for each other are slower than none beside any other process
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{name}, {norm}, {lr:g}: {done.stderr[-2000:]}")
    ((what, value, where),) = FIGURE.findall(done.stdout)
    return {
        "recipe": name, "file": recipe.file, "norm": norm, "lr": lr, "what": what, "value": float(value),
        "where": where, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| recipe | figure | CBN | BN | frozen BN | CBN's longest run [s] |", "|---|---|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row["recipe"] == name]
        # a rate counts where all norms have run at it
        ran = {rate: {row["norm"] for row in own if row["lr"] == rate} for rate in {row["lr"] for row in own}}
        own = [row for row in own if ran[row["lr"]] == set(recipe.norms)]
        if not own:
            lines.append(f"| [{name}]({recipe.file}.py) | not run yet | | | | |")
            continue
        cells = []
        for norm in ("cbn", "bn", "frozen"):
            best = max((row for row in own if row["norm"] == norm), key=lambda row: row["value"], default=None)
            cells.append("" if best is None else f"{best['value']:.1f} @ {best['lr']:g}")
        seconds = max(row["seconds"] for row in own if row["norm"] == "cbn")
        figure = f"{own[0]['what']}, {own[0]['where']}"
        lines.append(f"| [{name}]({recipe.file}.py) | {figure} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--only", default="*", help="a pattern of recipes' files")
    parser.add_argument("--again", action="store_true", help="run again what is in the report already")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    rows = json.loads(OUTPUT.read_text())["rows"] if OUTPUT.is_file() else []
    chosen = [
        (name, norm, share * recipe.lr)
        for share, (name, recipe) in product(SHARES, RECIPES.items())
        for norm in recipe.norms
        if fnmatchcase(recipe.file, arguments.only)
    ]
    if not arguments.again and arguments.only == "*":
        chosen = [c for c in chosen if c not in [(row["recipe"], row["norm"], row["lr"]) for row in rows]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(run, *c, arguments.data) for c in chosen]):
            new = future.result()
            same = ("recipe", "norm", "lr")
            rows = [row for row in rows if any(row[k] != new[k] for k in same)] + [new]
            print(new, file=sys.stderr, flush=True)
            head = provenance("python -m benchmarks.coverage.examples --data ../shared/data")
            OUTPUT.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    fill(ROOT / "examples" / "README.md", {"loops": table(rows)})


if __name__ == "__main__":
    main()
