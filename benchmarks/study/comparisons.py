"""The comparisons behind docs/results.md, each a run of `cbn compare`.

    python -m benchmarks.study.comparisons --data ../shared/data --work FOLDER [--only NAME,..] [--again NORM]

FOLDER keeps the comparisons, which go on where they were stopped, and the networks that are trained first. What it
lacks is taken from benchmarks/results/study/NAME.json, of which the documentation is made; --again runs what is there
of some norms once more. One thread for a run of a comparison, so that times of runs side by side are comparable and no
more than that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, ROOT, provenance
from cbn_convert.norm import Window
from cbn_convert.norm.functional import AXES

HERE = Path(__file__).parent
STUDY = RESULTS / "study"

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
    "lite0": {
        "model": "tf_efficientnet_lite0", "checkpoint": "tf_efficientnet_lite0_imagenet.timm.safetensors",
        "mean": str(127 / 255), "std": str(128 / 255),
    },
    "resnet": {"model": "resnet10t", "checkpoint": "FROM-CLOTHING"},
    "preact": {"model": "resnetv2_18", "model-kwargs": "width_factor=0.5", "checkpoint": "FROM-CLOTHING"},
    "densenet": {
        "model": "densenet121", "model-kwargs": "{'growth_rate': 16, 'block_config': (3, 4, 6, 4)}",
        "checkpoint": "FROM-CLOTHING",
    },
    "convmixer": {"model": "convmixer_96_6", "checkpoint": "FROM-CLOTHING"},
    "new": {"model": "test_resnet", "no-pretrained": True},
}  # fmt: skip
# How the weights FROM-CLOTHING are trained, from random ones.
SOURCE = {"norm": "bn", "batch-size": 32, "lr": 0.05, "epochs": 10, "weight-decay": 5e-4, "seed": 0}
DATA = {"clothing": {"img-size": 96, "min-scale": 0.5}, "hands": {"img-size": 96, "hflip": 0, "min-scale": 0.5}}
FOLDERS = {"clothing": "clothing", "hands": "sign_digits"}
# of which so many percent of the training images are there, for few data
PARTS = {"clothing, 15 %": ("clothing", 15), "hands, 15 %": ("hands", 15)}
ALL = {"norms": "bn,frozen,gn,brn,cbn", "batch-sizes": "1,2,4", "seeds": 3, "reference": 32}
SHORT = {"images": 1000}
RIVALS = {"norms": "frozen,cbn", "batch-sizes": "2", "seeds": 3, "reference": 32}
EIGHT = {"norms": "bn,frozen,gn,brn,cbn", "batch-sizes": "8", "seeds": 3, "reference": 0}
# at the rates of the search without recalibration, beside which these runs are set
RECALIBRATED = {
    "norms": "bn,frozen,brn,cbn", "batch-sizes": "2", "seeds": 3, "reference": 0,
    "lrs": "0.0003,0.000949,0.003,0.00949", "recalibrate": 32,
}  # fmt: skip
LITE0 = {"norms": "bn,frozen,tune,brn,cbn", "batch-sizes": "1,2,4", "img-size": 128}
LITE0_LARGE = {**LITE0, "norms": "frozen,tune,cbn", "batch-sizes": "2", "img-size": 224, "reference": 0}
LITE0_EIGHT = {**LITE0, "batch-sizes": "8", "reference": 0}
LONGEST = {"images": 8000, "lrs": "0.0003,0.000949,0.003", "seeds": 1, "reference": 0}
NEW = {**RIVALS, "images": 4000, "norms": "bn,gn,brn,cbn"}

# name: data, network, settings
COMPARISONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hands-v2-short": ("hands", "v2", {**ALL, **SHORT}),
    "clothing-v2-short": ("clothing", "v2", {**ALL, **SHORT}),
    "clothing-v1-short": ("clothing", "v1", {**ALL, **SHORT}),
    "hands-v1-short": ("hands", "v1", {**ALL, **SHORT}),
    "clothing-v2-long": ("clothing", "v2", {**RIVALS, "images": 4000}),
    "clothing-v2-batch8": ("clothing", "v2", {**EIGHT, **SHORT}),
    "hands-v2-batch8": ("hands", "v2", {**EIGHT, **SHORT}),
    "clothing-v2-longest": ("clothing", "v2", {**RIVALS, **LONGEST}),
    "clothing-v2-recalibrated": ("clothing", "v2", {**RECALIBRATED, **SHORT}),
    "hands-v2-recalibrated": ("hands", "v2", {**RECALIBRATED, **SHORT}),
    "clothing-v2-adamw": ("clothing", "v2", {**RIVALS, **SHORT, "opt": "adamw"}),
    "hands-v2-adamw": ("hands", "v2", {**RIVALS, **SHORT, "opt": "adamw"}),
    "hands-v2-long": ("hands", "v2", {**RIVALS, "images": 4000}),
    "clothing-v2-large": ("clothing", "v2", {**RIVALS, **SHORT, "img-size": 160}),
    "clothing-v2-100": ("clothing", "v2-100", {**RIVALS, **SHORT}),
    "clothing-lite0": ("clothing", "lite0", {**RIVALS, **SHORT, **LITE0}),
    "hands-lite0": ("hands", "lite0", {**RIVALS, **SHORT, **LITE0}),
    "clothing-lite0-few": ("clothing, 15 %", "lite0", {**RIVALS, **SHORT, **LITE0, "batch-sizes": "2"}),
    "hands-lite0-few": ("hands, 15 %", "lite0", {**RIVALS, **SHORT, **LITE0, "batch-sizes": "2"}),
    "clothing-lite0-large": ("clothing", "lite0", {**RIVALS, **SHORT, **LITE0_LARGE}),
    "hands-lite0-large": ("hands", "lite0", {**RIVALS, **SHORT, **LITE0_LARGE}),
    "clothing-lite0-batch8": ("clothing", "lite0", {**RIVALS, **SHORT, **LITE0_EIGHT}),
    "hands-lite0-batch8": ("hands", "lite0", {**RIVALS, **SHORT, **LITE0_EIGHT}),
    "hands-resnet": ("hands", "resnet", {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn"}),
    "hands-preact": ("hands", "preact", {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn", "batch-sizes": "1,2"}),
    "hands-densenet": ("hands", "densenet", {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn"}),
    "hands-convmixer": (
        "hands",
        "convmixer",
        {**RIVALS, **SHORT, "norms": "bn,frozen,brn,cbn,cbn:ring:window=2", "batch-sizes": "1,2"},
    ),
    "hands-new": ("hands", "new", {**NEW, "batch-sizes": "1,2,4"}),
    "clothing-new": ("clothing", "new", NEW),
}


def arguments(name: str, data: Path, work: Path, jobs: int) -> list[str]:
    """What `cbn compare` is called with, but for the output."""
    images, network, settings = COMPARISONS[name]
    flags = {**NETWORKS[network], **DATA[PARTS.get(images, (images,))[0]], **settings}
    if "checkpoint" in flags:
        flags["checkpoint"] = weights(network, data, work, jobs)
    return [str(photos(images, data, work)), *as_flags(flags)]


def photos(images: str, data: Path, work: Path) -> Path:
    """The folder of a data set, or of one with a part of the training images, taken evenly from every class."""
    if images not in PARTS:
        return data / FOLDERS[images]
    whole, percent = PARTS[images]
    source, made = data / FOLDERS[whole], work / "parts" / f"{FOLDERS[whole]}-{percent}"
    if not made.is_dir():
        unfinished = made.with_name(f"{made.name}-unfinished")
        for group in sorted((source / "train").iterdir()):
            (unfinished / "train" / group.name).mkdir(parents=True, exist_ok=True)
            files = sorted(group.iterdir())
            count = math.ceil(len(files) * percent / 100)
            for file in (files[i * len(files) // count] for i in range(count)):
                link(unfinished / "train" / group.name / file.name, file)
        for split in ("val", "test"):
            link(unfinished / split, source / split)
        unfinished.rename(made)
    return made


def link(path: Path, target: Path) -> None:
    """A symbolic link, over one that is there."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def weights(network: str, data: Path, work: Path, jobs: int) -> Path:
    """The file that a network's runs start from."""
    file = NETWORKS[network]["checkpoint"]
    return source(network, data, work, jobs) if file == "FROM-CLOTHING" else data / "weights" / file


def as_flags(settings: dict[str, Any]) -> list[str]:
    """As words of a command line."""
    return [part for k, v in settings.items() for part in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def cbn(command: str, words: list[str], threads: int = 1) -> None:
    """Runs a command of the tool."""
    path = os.pathsep.join([str(HERE / "more_models"), str(ROOT)])
    subprocess.run(
        [sys.executable, "-m", "cbn_convert.cli", command, *words, "--device", "cpu", "--workers", "0"],
        check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
    )  # fmt: skip


def source(network: str, data: Path, work: Path, jobs: int) -> Path:
    """Weights that our own tool trains on the clothing, with BN at batch size 32."""
    folder, unfinished = work / "sources" / network, work / "sources" / f"{network}-unfinished"
    if not folder.is_dir():
        flags = {k: v for k, v in NETWORKS[network].items() if k != "checkpoint"}
        words = as_flags({**flags, "no-pretrained": True, **DATA["clothing"], **SOURCE, "output": unfinished})
        cbn("finetune", [str(data / FOLDERS["clothing"]), *words, "--overwrite"], threads=jobs)
        unfinished.rename(folder)
    return folder / "best" / "model.safetensors"


def default_window(network: str) -> str:
    """CBN's, by which runs of another default are told."""
    return "average of batches, the newest half" if network == "new" else f"{Window()}, {AXES} axes"


def restore(name: str, folder: Path, data: Path, work: Path, jobs: int, again: set[str]) -> None:
    """Makes of the committed JSON a comparison that can go on, without the runs of the norms in `again`."""
    stored = json.loads((STUDY / f"{name}.json").read_text())
    run, network = stored["config"]["run"], COMPARISONS[name][1]
    run |= {"data": str(photos(COMPARISONS[name][0], data, work)), "output": str(folder)}
    if run["checkpoint"] is not None:
        run["checkpoint"] = str(weights(network, data, work, jobs))
    if "source" in stored and stored["source"]["top1"] != source_top1(network, work):
        raise SystemExit(f"{name}: training {network} anew gave another network; delete its JSON to start anew")
    if unknown := again - {"", *(cell["norm"] for cell in stored["cells"])}:
        raise SystemExit(f"{name} has no runs of {', '.join(unknown)}; see --again")
    cells = [cell for cell in stored["cells"] if cell["norm"] not in again]
    kept = {key: stored[key] for key in ("images", "versions")}
    unfinished = folder.with_name(f"{name}-unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / "results.json").write_text(json.dumps({"config": stored["config"], "cells": cells, **kept}))
    unfinished.rename(folder)


def source_top1(network: str, work: Path) -> float:
    """Validation top-1 of a network that `source` has trained."""
    return float(json.loads((work / "sources" / network / "results.json").read_text())["top1"])


def note(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def run(name: str, data: Path, work: Path, jobs: int, again: set[str]) -> None:
    """Runs a comparison to its end, and writes its JSON."""
    folder, label, window = work / name, work / f"{name}.window", default_window(COMPARISONS[name][1])
    if again != {""} and folder.exists():
        raise SystemExit(f"{folder} is there already; --again begins with the committed JSON, in another --work")
    if not folder.exists() and (STUDY / f"{name}.json").is_file():
        had = window if "cbn" in again else json.loads((STUDY / f"{name}.json").read_text())["window"]
        note(label, had)
        restore(name, folder, data, work, jobs, again)
    elif not folder.exists():
        note(label, window)
    if not label.is_file() or label.read_text() != window:
        raise SystemExit(f"{folder} has runs of CBN with another default; --again cbn, in another --work, repeats them")
    if (folder / "results.json").is_file():
        grid = {
            k: v for k, v in COMPARISONS[name][2].items() if k in ("norms", "batch-sizes", "lrs", "seeds", "reference")
        }
        words = [str(photos(COMPARISONS[name][0], data, work)), "--resume", str(folder), *as_flags(grid)]
    else:
        words = [*arguments(name, data, work, jobs), "--output", str(folder)]
    cbn("compare", [*words, "--jobs", str(jobs)])
    stored = json.loads((folder / "results.json").read_text())
    for key in ("data", "checkpoint", "output"):  # folders of this machine
        if stored["config"]["run"][key] is not None:
            stored["config"]["run"][key] = Path(stored["config"]["run"][key]).name
    network = COMPARISONS[name][1]
    if NETWORKS[network].get("checkpoint") == "FROM-CLOTHING":
        stored["source"] = {"data": "clothing", **SOURCE, "top1": source_top1(network, work)}
    command = "python -m benchmarks.study.comparisons --data ../shared/data"
    text = json.dumps({**provenance(command), "window": window, **stored})
    STUDY.mkdir(exist_ok=True)
    (STUDY / f"{name}.json").write_text(text.replace('}, {"norm"', '},\n{"norm"') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/, sign_digits/ and weights/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the comparisons")
    parser.add_argument("--only", default=",".join(COMPARISONS))
    parser.add_argument("--again", default="", help="norms of which runs that the JSON has are run once more")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    for name in given.only.split(","):
        run(name, given.data.resolve(), given.work.resolve(), given.jobs, set(given.again.split(",")))


if __name__ == "__main__":
    main()
