"""Processes that load images and cannot go on: no run waits for them for ever, and none loses a step by it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.images import write_colors
from helpers.runs import COMMAND, FLAGS, assert_equal, config, final_state
from helpers.waiting import wait_until
from timm.data import resolve_data_config
from torch.utils.data import get_worker_info

import cbn_convert as cbn
from cbn_convert.errors import DataError
from cbn_convert.training import checkpoint, loading
from cbn_convert.training.faults import TrainingInterrupted
from cbn_convert.training.loading import ImageList, batches, plain_loader
from cbn_convert.training.splits import read_splits

SETTINGS: dict[str, Any] = {"epochs": 1, "eval_every": 8, "recalibrate": 1}


def with_shared_memory(size: str) -> list[str]:
    """What runs a command under a /dev/shm of that size, of its own."""
    words = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here, to make a mount namespace")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"no mount namespace may be made here: {tried.stderr.strip()}")
    return words


@pytest.mark.parametrize(
    ("size", "options", "sentence"),
    [
        # a batch of 77 MB
        (
            "64m", ["--img-size", "448", "--batch-size", "32", "--workers", "1"],
            "error: a batch of 32 images does not fit into the shared memory of processes, /dev/shm (unable to ",
        ),
        ("4k", ["--workers", "2"], "error: cannot start 2 processes that load images (No space left on device; what "),
    ],
    ids=["docker's", "none"],
)  # fmt: skip
def test_too_little_shared_memory(size: str, options: list[str], sentence: str, colors: Path, tmp_path: Path) -> None:
    command = [*with_shared_memory(size), *COMMAND, str(colors), *FLAGS, *options, "-q", "-o", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(sentence)
    assert "/dev/shm" in done.stderr
    assert "--workers 0" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images, and a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write_colors(folder / "colors")
    cbn.finetune(config(folder / "colors", folder / "run", **SETTINGS), quiet=True)
    return folder / "colors", folder / "run"


def stop_at(monkeypatch: pytest.MonkeyPatch, images: int, seed: int | None) -> None:
    """The process that loads this image of a split of so many interrupts the run, and goes no further."""
    load = ImageList.__getitem__

    def stopping(self: ImageList, item: Any) -> Any:
        if get_worker_info() is not None and (len(self), item[1]) == (images, seed):
            time.sleep(0.5)  # until the images before this one are used up
            os.kill(os.getppid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGSTOP)
        return load(self, item)

    monkeypatch.setattr(ImageList, "__getitem__", stopping)


@pytest.mark.parametrize(
    ("images", "seed", "step"),
    [
        (32, loading._mixed(0, -1, 4), 0),
        (32, loading._mixed(0, 0, 10), 5),
        (32, None, 8),
        (12, None, 8),
    ],
    ids=["warm-up", "training", "recalibration", "evaluation"],
)
def test_the_first_signal_ends_a_wait_for_images(
    images: int, seed: int | None, step: int, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """A step whose images did not come was never made, so that the run goes on as if nothing had been."""
    data, expected = whole
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, images, seed)
        with pytest.raises(
            TrainingInterrupted, match=rf"stopped by SIGINT after step {step}; go on with cbn finetune .* --resume"
        ):
            cbn.finetune(config(data, run, **SETTINGS, workers=1), quiet=True)
    assert [path.name for path in checkpoint.checkpoints(run)[:1]] == ([f"step-{step:08d}"] if step else [])
    cbn.resume(run, quiet=True)
    assert_equal(final_state(run), final_state(expected))


def test_nor_does_it_wait_to_see_how_far_the_images_are(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, trained = whole
    settings = config(data, tmp_path / "run", workers=1, checkpoint=str(trained / "best/model.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 32, None)
        with pytest.raises(TrainingInterrupted, match="after step 0"):
            cbn.finetune(settings, quiet=True)


def test_a_wait_for_images_has_an_end(colors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(image: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    loader = plain_loader(read_splits(str(colors), None, 0)[0], resolve_data_config({"img_size": 32}), 4, 1)
    monkeypatch.setattr(loader.dataset, "transform", stopped)
    monkeypatch.setattr(loading, "LONGEST_WAIT", 1.0)
    with pytest.raises(DataError, match=r"^no images have come from the loading processes .* or use --workers 0$"):
        list(batches(loader))
    assert len(loader.processes) == 1
    assert not any(process.is_alive() for process in loader.processes)


@pytest.fixture
def command(colors: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two loading processes that has begun."""
    arguments = [str(colors), *FLAGS, "--workers", "2", "--epochs", "500", "-o", str(tmp_path / "run")]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(checkpoint.checkpoints(tmp_path / "run")) > 1 or process.poll() is not None)
            yield process
        finally:
            process.kill()


def test_stopped_processes_do_not_hold_the_command_back(command: subprocess.Popen[str], tmp_path: Path) -> None:
    tasks = Path(f"/proc/{command.pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    assert len(children) >= 2
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    last = err.splitlines()[-1]
    step = int(last.removeprefix("stopped by SIGINT after step ").split(";")[0])
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == f"step-{step:08d}"
    assert not any(Path(f"/proc/{child}").exists() for child in children)
