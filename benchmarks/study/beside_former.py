"""Further seeds of CBN, with today's window and with the exponential one that it replaced, on one machine.

    git worktree add --detach ../former 42d2965
    (cd ../former && python setup.py build_ext --inplace)
    python -m benchmarks.study.beside_former --former ../former --data ../shared/data --work FOLDER

Both run the cells of benchmarks/results/former/study.json, each at its own best rate, with seeds that neither rate was
chosen by. Writes benchmarks/results/former/more_seeds.json after every run; runs that are there already are not made
again. benchmarks/documents/results.py sets them beside the first three seeds, which are of several machines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.documents.results import read
from benchmarks.provenance import RESULTS, ROOT
from benchmarks.study.comparisons import COMPARISONS, HERE, arguments, as_flags
from benchmarks.study.patched import measure

OUTPUT = RESULTS / "former" / "more_seeds.json"
COMMAND = "python -m benchmarks.study.beside_former --former ../former --data ../shared/data --work FOLDER"
SEEDS = range(3, 6)
GRID = ("--norms", "--batch-sizes", "--lrs", "--seeds", "--reference")  # of the comparison, which a cell is one of


def best_rates() -> list[dict[str, Any]]:
    """Comparison, batch size, version and rate of every cell that both versions have."""
    former = json.loads((RESULTS / "former" / "study.json").read_text())["comparisons"]
    studies, found = read(), []
    for name, old in former.items():
        for size in sorted({cell["batch_size"] for cell in old["cells"]}):
            then = next(cell["lr"] for cell in old["cells"] if cell["batch_size"] == size)
            for version, lr in (("today", studies[name].rows["cbn", size].lr), ("former", then)):
                found.append({"comparison": name, "batch_size": size, "version": version, "lr": lr})
    return found


def run(cell: dict[str, Any], sources: dict[str, Path], data: Path, work: Path) -> dict[str, Any]:
    """Accuracies of a comparison of one cell, which the version of the tool in its folder makes."""
    folder, *words = arguments(cell["comparison"], data, work, 1)
    pairs = zip(words[::2], words[1::2], strict=True)
    words = [word for pair in pairs if pair[0] not in GRID for word in pair]
    words += as_flags({
        "norms": "cbn", "batch-sizes": cell["batch_size"], "lrs": cell["lr"], "seed": cell["seed"], "seeds": 1,
        "reference": 0, "device": "cpu", "workers": 0,
    })  # fmt: skip
    path = os.pathsep.join([str(HERE / "more_models"), str(sources[cell["version"]])])
    with tempfile.TemporaryDirectory() as output:
        subprocess.run(
            [sys.executable, "-m", "cli", "compare", folder, *words, "--output", f"{output}/run"], check=True,
            cwd=output, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        (result,) = json.loads(Path(output, "run", "results.json").read_text())["cells"]
    return {k: v for k, v in result.items() if k in ("error", "top1", "test_top1", "steps")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--former", type=Path, required=True, help="working tree of the version before the redesign")
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights that are trained for the study")
    parser.add_argument("--only", default=",".join(COMPARISONS))
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    sources = {"today": ROOT, "former": given.former.resolve()}
    cells = [cell for cell in best_rates() if cell["comparison"] in given.only.split(",")]
    todo = [{**cell, "seed": seed} for seed in SEEDS for cell in cells]
    measure(OUTPUT, COMMAND, todo, lambda c: run(c, sources, given.data.resolve(), given.work.resolve()), given.jobs)


if __name__ == "__main__":
    main()
