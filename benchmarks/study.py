"""The comparisons behind docs/results.md, each a run of `cbn compare`.

    python benchmarks/study.py --data ../shared/data --work FOLDER [--only NAME,..] [--jobs 2]

FOLDER keeps the comparisons, which go on where they were stopped; benchmarks/results/study/NAME.json is what the
documentation is made of. One thread for a run, so that times of runs side by side are comparable and no more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import RESULTS, provenance

HERE = Path(__file__).parent
STUDY = RESULTS / "study"
PUBLISHED = "cbn:taylor:current:ring:window=8"

NETWORKS: dict[str, dict[str, Any]] = {
    "v2": {
        "model": "mobilenetv2_035", "checkpoint": "mobilenetv2_035_keras.timm.safetensors",
        "model-kwargs": "pad_type=same", "mean": "0.5", "std": "0.5",
    },
    "v1": {"model": "mobilenetv1_025", "checkpoint": "mobilenetv1_025_retinaface.timm.safetensors"},
    "v2-100": {
        "model": "mobilenetv2_100", "checkpoint": "mobilenetv2_100_tf2ptq.timm.safetensors",
        "model-kwargs": "pad_type=same", "mean": "0.5", "std": "0.5",
    },
}  # fmt: skip
DATA = {"clothing": {"img-size": 96, "min-scale": 0.5}, "hands": {"img-size": 96, "hflip": 0, "min-scale": 0.5}}
FOLDERS = {"clothing": "clothing", "hands": "sign_digits"}
ALL = {"norms": "bn,frozen,gn,brn,cbn", "batch-sizes": "1,2,4", "seeds": 3, "reference": 32}
SHORT = {"images": 1000}
RIVALS = {"norms": "frozen,cbn", "batch-sizes": "2", "seeds": 3, "reference": 32}
FORMS = {
    "norms": f"{PUBLISHED},cbn:taylor,cbn:current,cbn:none:window=4096,cbn:empty",
    "batch-sizes": "2", "seeds": 1, "reference": 0,
}  # fmt: skip
WINDOWS = {
    "norms": ",".join(f"cbn:window={k}" for k in (16, 128, 1024)),
    "batch-sizes": "2", "seeds": 3, "reference": 0,
}  # fmt: skip

# name: data, network, settings
COMPARISONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hands-v2-short": ("hands", "v2", {**ALL, **SHORT}),
    "clothing-v2-short": ("clothing", "v2", {**ALL, **SHORT}),
    "clothing-v1-short": ("clothing", "v1", {**ALL, **SHORT}),
    "hands-v1-short": ("hands", "v1", {**ALL, **SHORT}),
    "clothing-v2-long": ("clothing", "v2", {**RIVALS, "images": 4000}),
    "clothing-v2-recalibrated": (
        "clothing",
        "v2",
        {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn", "recalibrate": 32},
    ),
    "hands-v2-recalibrated": ("hands", "v2", {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn", "recalibrate": 32}),
    "clothing-v2-adamw": ("clothing", "v2", {**RIVALS, **SHORT, "opt": "adamw"}),
    "hands-v2-adamw": ("hands", "v2", {**RIVALS, **SHORT, "opt": "adamw"}),
    "clothing-v2-forms": ("clothing", "v2", {**FORMS, **SHORT}),
    "hands-v2-forms": ("hands", "v2", {**FORMS, **SHORT}),
    "hands-v2-long": ("hands", "v2", {**RIVALS, "images": 4000}),
    "clothing-v2-windows": ("clothing", "v2", {**WINDOWS, **SHORT}),
    "clothing-v2-100": ("clothing", "v2-100", {**RIVALS, **SHORT}),
}


def arguments(name: str, data: Path) -> list[str]:
    """What `cbn compare` is called with, but for the output."""
    images, network, settings = COMPARISONS[name]
    flags = {**NETWORKS[network], **DATA[images], **settings}
    flags["checkpoint"] = data / "weights" / flags["checkpoint"]
    return [str(data / FOLDERS[images]), *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]


def run(name: str, data: Path, work: Path, jobs: int) -> None:
    """Runs a comparison to its end, and writes its JSON."""
    folder = work / name
    if (folder / "results.json").is_file():
        grid = {k: v for k, v in COMPARISONS[name][2].items() if k in ("norms", "batch-sizes", "seeds", "reference")}
        call = [arguments(name, data)[0], "--resume", str(folder)]
        call += [part for k, v in grid.items() for part in (f"--{k}", str(v))]
    else:
        call = [*arguments(name, data), "--output", str(folder)]
    path = os.pathsep.join([str(HERE / "more_models"), str(HERE.parent)])
    place = ["--device", "cpu", "--workers", "0", "--jobs", str(jobs)]
    subprocess.run(
        [sys.executable, "-m", "cbn_convert.cli", "compare", *call, *place],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    stored = json.loads((folder / "results.json").read_text())
    for key in ("data", "checkpoint", "output"):  # folders of this machine
        stored["config"]["run"][key] = Path(stored["config"]["run"][key]).name
    text = json.dumps({**provenance("python benchmarks/study.py --data ../shared/data"), **stored})
    STUDY.mkdir(exist_ok=True)
    (STUDY / f"{name}.json").write_text(text.replace('}, {"norm"', '},\n{"norm"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the comparisons")
    parser.add_argument("--only", default=",".join(COMPARISONS))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    for name in given.only.split(","):
        run(name, given.data.resolve(), given.work.resolve(), given.jobs)


if __name__ == "__main__":
    main()
