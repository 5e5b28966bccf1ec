"""Checkpoints of two processes: each writes and reads its own state, one chooses, none waits for one that failed."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cbn_convert.errors import CbnError, RunError
from cbn_convert.training import checkpoint
from cbn_convert.training.parallel import Ranks

pytestmark = pytest.mark.xdist_group("distributed")

PATIENCE = 120  # seconds


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    ranks, run, outcomes = Ranks(), Path(folder) / "run", {}

    def save(step: int) -> None:
        own = {"rank": rank, "values": torch.full((3,), 10.0 * step + rank)}
        checkpoint.save(run, step, {"step": step} if ranks.main else None, own, 2, ranks)

    def load() -> Any:
        shared, own, count = checkpoint.load(run, ranks)
        return shared["step"], own["rank"], own["values"].tolist(), count

    def note(name: str, act: Callable[[], Any], at: int | None = None, *fault: Any) -> None:
        """What comes of it, and which folders are there then; with a fault in one process."""
        try:
            with mock.patch.object(*fault[:2], side_effect=fault[2]) if at == rank else mock.MagicMock():
                result = act()
        except CbnError as error:
            result = f"{type(error).__name__}: {error}"
        ranks.agreed(lambda: None)
        outcomes[name] = result, sorted(path.name for path in (run / "checkpoints").iterdir())
        ranks.agreed(lambda: None)

    full, ill = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, os.strerror(errno.EIO))
    for step in (1, 2, 3):
        save(step)
    note("load", load)
    note("a full disk in the other", lambda: save(4), 1, torch, "save", full)
    note("a full disk in the first", lambda: save(4), 0, torch, "save", full)
    note("no manifest", lambda: save(4), 0, checkpoint, "write_json", RunError("cannot write it"))
    note("no folder", lambda: save(4), 0, checkpoint, "new_directory", RunError("cannot make it"))
    note("no memory in the other", load, 1, torch, "load", MemoryError())
    note("a disk error in the first", load, 0, checkpoint, "_sha256", ill)
    if rank == 0:
        path = run / "checkpoints/step-00000003/rank-1.pt"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged") if rank == 0 else mock.MagicMock():
        note("damage", load)
    note("again", load)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    context = mp.spawn(worker, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


WHOLE = ["step-00000002", "step-00000003"]


def test_each_process_gets_its_own_state(outcomes: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(outcomes):
        assert got["load"] == [[3, rank, [30.0 + rank] * 3, 2], WHOLE]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a full disk in the other", "checkpoints/step-00000004: No space left on device; free some space"),
        ("a full disk in the first", "checkpoints/step-00000004: No space left on device; free some space"),
        ("no manifest", "cannot write it"),
        ("no folder", "cannot make it"),
        ("no memory in the other", "the memory of this machine is not enough to read"),
        ("a disk error in the first", "Input/output error; allow it and try again, or move"),
    ],
)
def test_a_failure_of_one_ends_all_and_changes_nothing(case: str, message: str, outcomes: list[dict[str, Any]]) -> None:
    for got in outcomes:
        result, names = got[case]
        assert result.startswith("RunError: ")
        assert message in result
        assert names == WHOLE


def test_one_process_chooses_the_checkpoint(outcomes: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(outcomes):
        for case in ("damage", "again"):
            assert got[case] == [[2, rank, [20.0 + rank] * 3, 2], ["damaged-step-00000003", "step-00000002"]]
