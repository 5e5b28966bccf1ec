"""Several processes train one model: on the CPU with gloo, with numbers of images that do not divide."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.images import write_image
from helpers.runs import assert_equal, config, final_state
from helpers.waiting import wait_until

import cbn_convert as cbn
from cbn_convert.errors import CbnWarning
from cbn_convert.training import checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes: 37 for training, 13 for validation."""
    folder = tmp_path_factory.mktemp("uneven")
    for split, counts in (("train", (18, 19)), ("val", (6, 7))):
        for label, color, count in zip(("blue", "red"), ((60, 60, 200), (200, 60, 60)), counts, strict=True):
            for i in range(count):
                write_image(folder / split / label / f"{i}.png", color, i)
    return folder


def launch(processes: int, data: Path, folder: Path, **changes: Any) -> Path:
    settings = config(data, folder / "none", save_every=5, no_aug=False, epochs=2, **changes).to_dict()
    del settings["output"]
    (folder / "settings.json").write_text(json.dumps({"folder": str(folder), "settings": settings}))
    program = str(Path(__file__).with_name("ranks.py"))
    command = [*TORCHRUN, "--nproc-per-node", str(processes), program, str(folder / "settings.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder


SHARED = {
    "norm": "cbn", "sync_cbn": True, "history": "ring", "recalibrate": 1, "accumulate": 2, "batch_size": 1,
    "workers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "changes"),
    [(2, {"norm": "cbn", "ema": 0.8}), (3, SHARED)],
    ids=["two", "three, shared statistics"],
)
def test_processes_agree_and_resume(processes: int, changes: dict[str, Any], uneven: Path, tmp_path: Path) -> None:
    launch(processes, uneven, tmp_path, **changes)
    models = {
        (run, rank): torch.load(tmp_path / f"{run}-{rank}.pt", weights_only=True)
        for run in ("whole", "cut") for rank in range(processes)
    }  # fmt: skip
    for model in models.values():
        assert_equal(model, models["whole", 0])
    got, want = final_state(tmp_path / "cut"), final_state(tmp_path / "whole")
    assert_equal(got, want)
    ranks = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "cut").glob("checkpoints/*/rank-*.pt"))]
    histories = [json.dumps(rank["history"], default=lambda t: t.tolist()) for rank in ranks[-processes:]]
    assert len(set(histories)) == (1 if changes.get("sync_cbn") else processes)

    per_update = processes * 2
    assert int(want["step"].removeprefix("step-")) == 2 * (37 // per_update)
    # every image is counted once, as by a single process
    alone = cbn.evaluate(tmp_path / "whole", str(uneven), device="cpu", workers=0)
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(processes)]
    assert alone.images == 13
    assert [r["best_top1"] for r in results] == [pytest.approx(alone.top1)] * processes
    stored = json.loads((tmp_path / "whole/results.json").read_text())
    assert stored["confusion"] == alone.confusion

    if processes == 2:
        newest = checkpoint.checkpoints(tmp_path / "cut")[0]
        newest.rename(newest.with_name("gone"))
        with pytest.warns(CbnWarning, match="had 2 processes and goes on with 1"):
            result = cbn.resume(tmp_path / "cut", quiet=True)
        assert result.steps == 2 * (37 // 2)


@pytest.mark.parametrize(
    "launcher",
    [[*TORCHRUN, "--nproc-per-node", "2"], [*ACCELERATE, "--num_processes", "2"]],
    ids=["torchrun", "accelerate"],
)
def test_the_command_under_a_launcher(launcher: list[str], uneven: Path, tmp_path: Path) -> None:
    """One process speaks and writes; a signal to the launcher stops all of them with a checkpoint."""
    arguments = [
        "finetune", str(uneven), "-m", "test_resnet", "--no-pretrained", "--img-size", "32", "--no-aug",
        "--device", "cpu", "--workers", "0", "--epochs", "500", "-o", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*launcher, "-m", "cbn_convert.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    wait_until(lambda: len(checkpoint.checkpoints(tmp_path / "run")) > 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("stopped by SIGTERM") == 1, err
    assert err.count(": validation top-1") >= 1
    step = int(json.loads(out.splitlines()[-1])["error"].split("step ")[1].split(";")[0])
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == f"step-{step:08d}"
