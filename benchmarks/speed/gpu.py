"""All that needs a GPU, by one command in less than nine minutes: tests, training steps, a fine-tuning.

    python -m benchmarks.speed.gpu [--output gpu.json] [--seconds 520] [--device cuda]

What is worth most comes first, and no part begins that may not end in time. The report is written after every part, so
that a run that is cut off loses nothing; a part that fails leaves the last line of its error there. `--device cpu` runs
all of it on a tiny network, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cbn_convert.cli.demo import write_digits

import cbn_convert as cbn
from benchmarks.provenance import RESULTS, ROOT, provenance
from benchmarks.speed import step_time
from cbn_convert.bench.steps import COLUMNS, _model
from cbn_convert.norm.carried import FIRST_LOOKS

NORMS = ["bn", "frozen", "tune", "cbn"]
BF16 = {"dtype": "bfloat16", "channels_last": True}


def cells(tiny: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """Cells of step_time.py, and the seconds that it may take."""
    if tiny:
        small = {"arch": "test_resnet", "batch_size": 2, "img_size": 32, "columns": NORMS, "steps": 2}
        yield small, 10
        yield {**small, **BF16}, 10
        return
    first = {"arch": "resnet50", "batch_size": 2, "img_size": 512, "columns": [*NORMS, "gn"], "steps": 32}
    yield {**first, **BF16}, 40
    yield {**first, **BF16, "columns": NORMS, "compile": True}, 150
    yield first, 40
    for arch in ("mobilenetv2_100", "efficientnet_b0"):
        yield {**first, **BF16, "arch": arch, "columns": NORMS}, 30
    for size, batch in ((224, 2), (224, 8), (1024, 1)):
        yield {**first, **BF16, "img_size": size, "batch_size": batch, "columns": NORMS}, 30
    yield {**first, **BF16, "arch": "mobilenetv2_100", "columns": NORMS, "compile": True}, 120


def tests(device: str) -> dict[str, Any]:
    """The layer on CUDA, and its kernels as compiled, which are interpreted elsewhere."""
    files = ["tests/norm/test_layer.py", *["tests/norm/test_kernels.py"] * (device == "cuda")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "cuda or gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return {"exit_code": done.returncode, "output": done.stdout.splitlines()[-15:]}


def launches(device: str, arch: str) -> dict[str, Any]:
    """Kernels that a training step launches, and how long they run [ms], with each norm."""
    found = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    size = 224 if device == "cuda" else 32
    x, y = torch.randn(2, 3, size, size, device=device), torch.arange(2, device=device)
    for norm in NORMS:
        model = _model(arch).train()
        COLUMNS[norm](model, torch.randn(2, 3, size, size))
        model.to(device)
        for _ in range(FIRST_LOOKS + 8):
            F.cross_entropy(model(x), y).backward()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(8):
                F.cross_entropy(model(x), y).backward()
            if device == "cuda":
                torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.profiler.DeviceType.CUDA]
        operations = sum(e.name.startswith("aten::") for e in profiler.events())
        found[norm] = {
            "kernels": len(kernels) / 8,
            "kernel_ms": sum(e.time_range.elapsed_us() for e in kernels) / 8e3,
            "operations": operations / 8,
        }
    return found


def finetuning(folder: Path, norm: str, device: str) -> dict[str, Any]:
    """Fine-tunes a small network of scikit-learn's digits 0 to 4 on 5 to 9 at batch size 2."""
    tiny = device == "cpu"
    common: dict[str, Any] = {
        "img_size": 32, "no_aug": True, "workers": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "device": device,
        **({"max_steps": 4} if tiny else {}),
    }  # fmt: skip
    if not (folder / "source").is_dir():
        write_digits(folder)
        cbn.finetune(
            cbn.FinetuneConfig(
                data=str(folder / "digits-0-4"), output=str(folder / "source"), norm="bn", pretrained=False,
                model="test_resnet" if tiny else "resnet18", batch_size=32, lr=0.1, epochs=5, **common,
            ),
            quiet=True,
        )  # fmt: skip
    config = cbn.FinetuneConfig(
        data=str(folder / "digits-5-9"), output=str(folder / norm), norm=norm, batch_size=2, epochs=2,
        model=f"local-dir:{folder}/source/best", **common,
    )  # fmt: skip
    result = cbn.finetune(config, quiet=True)
    names = ("best_top1", "last_top1", "steps", "median_step_seconds", "images_per_second", "peak_memory")
    return {"lr": config.peak_lr(), **{name: getattr(result, name) for name in names}}


def parts(device: str, folder: Path) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, seconds that it may take, and what to do for each part."""
    tiny = device == "cpu"
    steps = [
        (json.dumps(cell), seconds, lambda c=cell: step_time.run(c, device)) for cell, seconds in cells(tiny)
    ]  # fmt: skip
    yield "tests", 60, lambda: tests(device)
    yield from steps[:2]  # what the bars are about
    yield "launches", 30, lambda: launches(device, "test_resnet" if tiny else "mobilenetv2_100")
    for norm in NORMS:
        yield f"finetuning {norm}", 40, lambda n=norm: finetuning(folder, n, device)
    yield from steps[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--seconds", type=float, default=520, help="after which no part is running any more")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu tries the script on a tiny network")
    report: dict[str, Any] = {**provenance("python -m benchmarks.speed.gpu"), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds, part in parts(given.device, Path(folder)):
            print(f"{name} ..", file=sys.stderr, flush=True)
            found: Any
            try:
                found = part() if given.device == "cpu" or time.monotonic() + seconds < end else "left out, too late"
            except Exception as error:  # the others go on
                found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            report["parts"][name] = found
            given.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
