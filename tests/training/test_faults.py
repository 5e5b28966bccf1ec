"""What goes wrong in a run ends it with one sentence, or is left out and counted; the last checkpoint stays good."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import COMMAND, FLAGS, assert_equal, config, final_state
from helpers.waiting import wait_until
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.errors import DataError, RunError
from cbn_convert.training import checkpoint, loop
from cbn_convert.training.faults import TrainingInterrupted, first_non_finite
from cbn_convert.training.learner import Learner
from cbn_convert.training.metrics import read_metrics
from cbn_convert.training.setup import owned


def spoil(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Makes the gradients of these updates, counted from 1, infinite."""
    clip = loop.Accelerator.clip_grad_norm_
    count = 0

    def spoiled(self: Any, parameters: list[Tensor], *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in updates:
            parameters[3].grad[0] = torch.inf
        return clip(self, parameters, *arguments)

    monkeypatch.setattr(loop.Accelerator, "clip_grad_norm_", spoiled)


@pytest.mark.parametrize("update", [1, 6])
@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_a_gradient_that_is_not_finite_stops_the_run(
    opt: str, update: int, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, update)
    with pytest.raises(RunError, match=rf"at step {update} with lr 0\.\d+, first in the loss or its gradient; lower"):
        cbn.finetune(config(colors, tmp_path / "run", opt=opt, save_every=2), quiet=True)
    shared, _, _ = checkpoint.load(tmp_path / "run")
    assert shared["updates"] == 2 * ((update - 1) // 2)
    assert all(torch.isfinite(t).all() for t in shared["model"].values())


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("norm", ["cbn", "bn"])
def test_such_an_update_can_be_left_out(
    norm: str, opt: str, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, the optimizer's state and the statistics stay as they were."""
    spoil(monkeypatch, 1, 4)
    states = []
    step = Learner.step_unless_bad

    def spy(self: Any) -> Tensor:
        before = {k: v.clone() for k, v in self.model.named_parameters()}
        bad = step(self)
        moved = any(not torch.equal(v, before[k]) for k, v in self.model.named_parameters())
        states.append((bool(bad), moved))
        return bad

    monkeypatch.setattr(Learner, "step_unless_bad", spy)
    settings = config(colors, tmp_path / "run", norm=norm, opt=opt, max_steps=6, on_nan="skip")
    result = cbn.finetune(settings, quiet=True)
    assert states == [(True, False), (False, True), (False, True), (True, False), (False, True), (False, True)]
    assert result.skipped == 2
    assert read_metrics(tmp_path / "run")[0]["skipped"] == 2
    shared, _, _ = checkpoint.load(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in shared["model"].values())
    optimizer = [t for state in shared["optimizer"]["state"].values() for t in state.values() if isinstance(t, Tensor)]
    assert optimizer
    assert all(torch.isfinite(t).all() for t in optimizer)


@pytest.mark.parametrize("norm", ["cbn", "bn", "brn", "frozen"])
def test_an_image_of_nan_leaves_no_trace_where_it_is_left_out(
    norm: str, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    update = Learner.update

    def poisoned(self: Any, parts: list[Any]) -> None:
        nonlocal count
        count += 1
        if count == 3:
            parts[0].images[0] = torch.nan
        update(self, parts)

    monkeypatch.setattr(Learner, "update", poisoned)
    result = cbn.finetune(config(colors, tmp_path / "run", norm=norm, max_steps=6, on_nan="skip"), quiet=True)
    assert result.skipped == 1
    assert result.last_top1 > 0
    shared, own, _ = checkpoint.load(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in shared["model"].values())
    for source in (s for layer in own["history"].values() for s in layer["sources"]):
        tensors = [t for t in torch.utils._pytree.tree_leaves(source) if isinstance(t, Tensor)]
        assert all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_value_per_channel(accumulate: int, colors: Path, tmp_path: Path) -> None:
    """test_resnet ends with one pixel at 32 px, of which one image has no variance; with CBN that does not matter."""
    settings = config(colors, tmp_path / "run", norm="bn", batch_size=1, max_steps=2, accumulate=accumulate)
    with pytest.raises(RunError, match=r"one value per channel.*; use --norm cbn, or a larger --batch-size"):
        cbn.finetune(settings, quiet=True)
    cbn.finetune(replace(settings, norm="cbn"), overwrite=True, quiet=True)


def test_where_a_value_is_not_finite() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    assert first_non_finite(model, x) == "in the loss or its gradient"
    assert first_non_finite(model, x.clone().fill_(torch.nan)) == "in the images"
    model[0].weight.data *= 1e4
    assert first_non_finite(model, x * 1e37) == "in the output of 0"
    model[3].weight.data[0, 0] = torch.inf
    assert first_non_finite(model, x) == "in the parameter 3.weight"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(
    number: int, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 2, "no_aug": False}
    cbn.finetune(config(colors, tmp_path / "whole", **settings), quiet=True)
    update = Learner.update

    def signalled(self: Any, parts: list[Any]) -> None:
        if self.updates == 5:
            os.kill(os.getpid(), number)
        update(self, parts)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", signalled)
        with pytest.raises(TrainingInterrupted, match=r"after step 6; go on with cbn finetune .* --resume") as raised:
            cbn.finetune(config(colors, tmp_path / "run", **settings), quiet=True)
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == "step-00000006"
    cbn.resume(tmp_path / "run", quiet=True)
    got, want = final_state(tmp_path / "run"), final_state(tmp_path / "whole")
    assert_equal(got, want)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 4, "eval_every": 2}
    evaluate = loop.Trainer._evaluate

    def signalled(self: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_evaluate", signalled)
        with pytest.raises(TrainingInterrupted, match="after step 2"):
            cbn.finetune(config(colors, tmp_path / "run", **settings), quiet=True)
    assert not [r for r in read_metrics(tmp_path / "run") if r["event"] == "eval"]
    cbn.resume(tmp_path / "run", quiet=True)
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["event"] == "eval"] == [2, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_of_the_command(number: int, code: int, colors: Path, tmp_path: Path) -> None:
    arguments = [str(colors), *FLAGS, "--workers", "2", "--epochs", "500", "-o", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: checkpoint.checkpoints(tmp_path / "run") or process.poll() is not None)
    time.sleep(1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"stopped by {signal.Signals(number).name} after step ")
    assert last.endswith(f" --resume {tmp_path / 'run'}")
    assert "Traceback" not in err
    step = int(last.split("step ")[1].split(";")[0])
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == f"step-{step:08d}"


def test_a_full_disk(colors: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the checkpoint is the largest one."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    run = tmp_path / "run"
    arguments = [str(colors), *FLAGS, "--workers", "0", "--max-steps", "4", "-o", str(run), "--quiet"]
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: cannot write {run}/checkpoints/step-00000000: File too large; free some space"
    )
    assert done.stderr.count("\n") == 1
    assert list((run / "checkpoints").iterdir()) == []


def test_a_folder_that_is_not_ours_to_write(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # root may write anywhere
    with pytest.raises(RunError, match=r"cannot write .*: Permission denied; choose an output folder"):
        cbn.finetune(config(colors, tmp_path / "run"), quiet=True)


def test_two_processes_do_not_write_to_one_run(colors: Path, tmp_path: Path) -> None:
    cbn.finetune(config(colors, tmp_path / "run", max_steps=1), quiet=True)
    command = [*COMMAND, str(colors), "--resume", str(tmp_path / "run")]
    with owned(tmp_path / "run"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: another process is writing to the run in")


def test_what_a_killed_process_left_is_cleaned_up(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cbn.finetune(config(colors, run, max_steps=2), quiet=True)
    (run / "best").rename(run / ".best.old-abcdefgh")  # moved aside, and its successor is not there yet
    (run / ".best.tmp-abcdefgh").mkdir()
    (run / ".metrics.jsonl.tmp-abcdefgh").write_text("half")
    (run / "checkpoints/.step-00000099.tmp-abcdefgh").mkdir()
    cbn.resume(run, quiet=True)
    assert {p.name for p in run.iterdir() if p.name.startswith(".")} == {".lock"}
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert (run / "best/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("batch", "advice"),
    [(8, "try --batch-size 4"), (1, "try --grad-checkpointing, --mixed-precision bf16 or a smaller")],
)
def test_too_little_memory(batch: int, advice: str, colors: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more")

    monkeypatch.setattr(Learner, "update", full)
    with pytest.raises(RunError, match=rf"is not enough for batch size {batch}; {advice}"):
        cbn.finetune(config(colors, tmp_path / "run", batch_size=batch), quiet=True)


def test_unreadable_images_are_named_or_left_out(colors: Path, tmp_path: Path) -> None:
    bad = [str(colors / name) for name in ("train/blue/3.png", "val/red/1.png")]
    for path in bad:
        Path(path).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*3\.png"):
        cbn.finetune(config(colors, tmp_path / "run"), quiet=True)
    result = cbn.finetune(config(colors, tmp_path / "run", skip_bad_images=True, epochs=1), overwrite=True, quiet=True)
    assert result.bad_images == bad
    assert result.steps == 16
