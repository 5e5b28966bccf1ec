"""A run that was interrupted ends in the same bits as one that was not, wherever it was stopped."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.images import write_image
from helpers.runs import Killed, assert_equal, config, final_state, kill_after
from safetensors.torch import load_file

import cbn_convert as cbn
from cbn_convert.errors import CbnWarning, RunError
from cbn_convert.training import checkpoint
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.learner import Learner

CASES = {
    "cbn": {"norm": "cbn", "history": "ema", "no_aug": False},
    "ring, adamw, accumulation": {"history": "ring", "opt": "adamw", "accumulate": 3, "lr": 1e-3, "head_lr_scale": 5.0},
    "EMA, mixup, drop path": {
        "ema": 0.9, "recalibrate": 2, "mixup": 0.4, "drop_path": 0.2, "eval_every": 11, "no_aug": False,
    },
    "bn, balance, skip": {"norm": "bn", "class_balance": "sample", "on_nan": "skip", "opt": "lamb"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere(case: str, colors: Path, tmp_path: Path) -> None:
    settings = {"epochs": 2, "save_every": 5, **CASES[case]}
    cbn.finetune(config(colors, tmp_path / "whole", **settings), quiet=True)
    expected = final_state(tmp_path / "whole")
    for update in (0, 7, 9):
        with pytest.MonkeyPatch.context() as patch:
            kill_after(update, patch)
            with pytest.raises(Killed):
                cbn.finetune(config(colors, tmp_path / "cut", **settings), overwrite=True, quiet=True)
        torch.manual_seed(update)  # the state of the process that goes on is another one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm.models, "load_state_dict", None)  # the weights it started from are not read again
            cbn.resume(tmp_path / "cut", quiet=True)
        assert_equal(final_state(tmp_path / "cut"), expected)
        assert_equal(*(load_file(tmp_path / run / "best/model.safetensors") for run in ("whole", "cut")))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_workers_does_not_matter(colors: Path, tmp_path: Path) -> None:
    states = []
    for workers in (0, 1, 3):
        run = tmp_path / f"run{workers}"
        cbn.finetune(config(colors, run, workers=workers, max_steps=6, no_aug=False), quiet=True)
        states.append(final_state(run))
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


def test_a_finished_run_is_not_trained_again(colors: Path, tmp_path: Path) -> None:
    first = cbn.finetune(config(colors, tmp_path / "run", max_steps=3), quiet=True)
    before = final_state(tmp_path / "run")
    again = cbn.resume(tmp_path / "run", quiet=True)
    assert (again.steps, again.best_top1) == (first.steps, first.best_top1)
    assert_equal(final_state(tmp_path / "run"), before)


def test_killed_before_the_first_checkpoint(colors: Path, tmp_path: Path, monkeypatch) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Killed):
            cbn.finetune(config(colors, tmp_path / "run", max_steps=3), quiet=True)
    assert not checkpoint.checkpoints(tmp_path / "run")
    cbn.resume(tmp_path / "run", quiet=True)
    cbn.finetune(config(colors, tmp_path / "whole", max_steps=3), quiet=True)
    assert_equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images, and a run of 32 updates with checkpoints at 16 and 32."""
    folder = tmp_path_factory.mktemp("finished")
    for split, count in (("train", 16), ("val", 4)):
        for label, color in (("blue", (60, 60, 200)), ("red", (200, 60, 60))):
            for i in range(count):
                write_image(folder / "colors" / split / label / f"{i}.png", color, i)
    cbn.finetune(config(folder / "colors", folder / "run"), quiet=True)
    return folder / "colors", folder / "run"


@pytest.mark.parametrize("file", ["training.pt", "rank-0.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "gone"])
def test_a_damaged_checkpoint_is_set_aside(file: str, damage: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    path = run / "checkpoints/step-00000032" / file
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.warns(CbnWarning, match=r"step-00000032 is damaged \(.+\); it is now damaged-step-00000032") as warned:
        result = cbn.resume(run, quiet=True)
    assert "\n" not in str(warned[0].message)
    assert result.steps == 32
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "damaged-step-00000032", "step-00000016", "step-00000032",
    }  # fmt: skip
    assert_equal(final_state(run), final_state(finished[1]))


def test_all_checkpoints_damaged(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """A second attempt, which some schedulers make by themselves, does not begin anew in silence."""
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    for path in checkpoint.checkpoints(run):
        (path / "training.pt").write_bytes(b"junk")
    with pytest.warns(CbnWarning), pytest.raises(RunError, match=r"all checkpoints in .* are damaged"):
        cbn.resume(run, quiet=True)
    before = sorted(run.rglob("*"))
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged; start again with --overwrite"):
        cbn.resume(run, quiet=True)
    assert sorted(run.rglob("*")) == before
    cbn.finetune(replace(FinetuneConfig.of_run(run), output=str(run)), overwrite=True, quiet=True)
    assert checkpoint.checkpoints(run)[0].name == "step-00000032"


def test_nothing_in_a_checkpoint_is_unpickled(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Not even if the manifest vouches for the file."""
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    newest = checkpoint.checkpoints(run)[0]
    torch.save({"model": Evil()}, newest / "training.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    path = newest / "training.pt"
    manifest["files"]["training.pt"] = {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        RunError, match=r"step-00000032 is whole but cannot be read here \(.*; use the versions of torch"
    ):
        checkpoint.load(run)
    assert len(checkpoint.checkpoints(run)) == 2
    assert not (tmp_path / "owned").exists()


def failing(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


READING = {
    "a file's disk error": (checkpoint, "_sha256", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "no permission": (checkpoint, "_sha256", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    "the manifest's disk error": (Path, "read_bytes", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "no memory": (torch, "load", MemoryError(), "memory of this machine is not enough to read"),
    "no memory for a tensor": (
        torch, "load",
        # torch's words
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to .."),
        "memory of this machine is not enough to read",
    ),
    "a disk error at the second reading": (torch, "load", OSError(errno.EIO, "Input/output error"), "Input/output"),
    "another version": (torch, "load", ValueError("unknown\nformat"), r"whole but cannot be read here \(unknown\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", READING)
def test_what_fails_while_a_good_checkpoint_is_read_says_nothing_of_it(
    case: str, finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, error, message = READING[case]
    before = sorted(finished[1].rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(error))
        with pytest.raises(RunError, match=rf"step-00000032\b.*{message}|{message}.*step-00000032\b") as raised:
            checkpoint.load(finished[1])
    assert "\n" not in str(raised.value)
    assert sorted(finished[1].rglob("*")) == before
    assert checkpoint.load(finished[1])[0]["updates"] == 32


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b'{"files": []}', b'{"files": {"training.pt": {}}}', b'{"files": {"rank-0.pt": 3}}', b"\xff",
        b"[" * 99999, b'{"files": {"training.pt": {"bytes": 4, "sha256": "9f86"}}}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_manifest_that_is_none_is_damage(content: bytes, finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    (run / "checkpoints/step-00000032/manifest.json").write_bytes(content)
    with pytest.warns(CbnWarning, match=r"step-00000032 is damaged \(its manifest"):
        loaded = checkpoint.load(run)
    assert loaded is not None
    assert loaded[0]["updates"] == 16


def test_too_little_memory_of_the_gpu_to_resume(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "load", failing(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(RunError, match="is not enough for batch size 2; try --batch-size 1"):
        cbn.resume(finished[1], quiet=True)
    assert len(checkpoint.checkpoints(finished[1])) == 2


def test_as_many_checkpoints_as_asked_for(colors: Path, tmp_path: Path) -> None:
    cbn.finetune(config(colors, tmp_path / "run", max_steps=8, save_every=2, keep=3), quiet=True)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "run")]
    assert names == ["step-00000008", "step-00000006", "step-00000004"]


def test_the_flag_of_before_still_resumes(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    settings = replace(FinetuneConfig.of_run(run), output=str(run))
    with pytest.warns(DeprecationWarning, match=r"is now resume\(run\)"):
        assert cbn.finetune(settings, resume=True, quiet=True).steps == 32


def test_other_images_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data = Path(shutil.copytree(finished[0], tmp_path / "colors"))
    (data / "train/red/0.png").unlink()
    with pytest.raises(RunError, match="has other images than the run"):
        cbn.resume(finished[1], data=str(data), quiet=True)


def test_a_lost_best_model_is_written_anew(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[1], tmp_path / "run"))
    shutil.rmtree(run / "best")
    with pytest.warns(CbnWarning, match="best is lost; the next evaluation writes it anew"):
        cbn.resume(run, quiet=True)
    # that of the last step, as there is no other
    best, last = load_file(run / "best/model.safetensors"), final_state(finished[1])["shared"]["model"]
    assert_equal({name: best[name] for name in last}, dict(last))
