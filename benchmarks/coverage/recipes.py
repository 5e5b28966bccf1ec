"""Runs the recipes of examples/ as their first lines say, on photos, cut to a few updates, and says what came out.

    python -m benchmarks.coverage.recipes --data ../shared/data [--steps 60]

The model is MobileNetV2-0.35 with ImageNet weights from the folder in place of the recipe's, at 96 px (256 px for large
images). The unbalanced folder is made of the photos: the n-th class keeps 1 / n of its images. Two processes run on the
CPU with gloo. Writes benchmarks/results/recipes.json, and the table in examples/README.md.
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

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT, provenance

SIZES = {"large_images": "256", "unbalanced": "96", "two_processes": "96"}


def unbalanced(data: Path, folder: Path) -> Path:
    """Links to the photos, of which the n-th class keeps 1 / n for training."""
    for split in ("train", "val"):
        for n, kind in enumerate(sorted((data / split).iterdir()), 1):
            (folder / split / kind.name).mkdir(parents=True)
            paths = sorted(kind.iterdir())
            for path in paths[:: n if split == "train" else 1]:
                (folder / split / kind.name / path.name).symlink_to(path.resolve())
    return folder


def run(recipe: str, data: Path, weights: Path, steps: int, folder: Path) -> dict[str, Any]:
    """The result of the command as a user gives it, with these weights, size and number of updates."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if recipe == "two_processes" else []
    )
    command = [
        sys.executable, *launcher, "-m", "cbn_convert.cli", "finetune", str(data), "--config",
        str(ROOT / f"examples/{recipe}.yaml"), "-o", str(folder / recipe), "--model", "mobilenetv2_035", "--checkpoint",
        str(weights), "--model-kwargs", "pad_type=same", "--mean", "0.5", "--std", "0.5", "--img-size", SIZES[recipe],
        "--max-steps", str(steps), "--eval-every", str(max(steps // 2, 1)), "--device", "cpu", "--quiet", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": "1"} if launcher else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    kept = ("steps", "best_top1", "images_per_second", "loader_wait", "train_seconds")
    return {"recipe": recipe, **{name: result[name] for name in kept}, "bad_images": len(result["bad_images"])}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | updates | validation top-1 [%] | images/s | training [s] |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| [{r['recipe']}.yaml]({r['recipe']}.yaml) | {r['steps']} | {r['best_top1']:.1f} | "
        f"{r['images_per_second']:.1f} | {r['train_seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    data, weights = arguments.data / "clothing", arguments.data / "weights/mobilenetv2_035_keras.timm.safetensors"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {"unbalanced": unbalanced(data, folder / "unbalanced-photos")}
        for recipe in SIZES:
            rows.append(run(recipe, folders.get(recipe, data), weights, arguments.steps, folder))
            print(rows[-1], file=sys.stderr, flush=True)
    head = provenance("python -m benchmarks.coverage.recipes --data ../shared/data")
    (RESULTS / "recipes.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    fill(ROOT / "examples" / "README.md", {"recipes": table(rows)})


if __name__ == "__main__":
    main()
