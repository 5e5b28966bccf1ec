"""What a run needs to go on after an interruption: a folder that is there as a whole or not at all, and is checked.

    checkpoints/step-00000120/training.pt     the model, the optimizer and all that the processes share
                              rank-0.pt, ..   what each process has of its own: CBN history, statistics, random states
                              manifest.json   size and SHA-256 of each

Nothing is unpickled: torch.load reads with weights_only=True, and only what the manifest vouches for.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..errors import CbnWarning, RunError, first_line
from ..files import new_directory, remove_directory, write_json, writing
from .parallel import Ranks

_NAME = re.compile(r"step-(\d{8,})")
_SHARED, _MANIFEST = "training.pt", "manifest.json"
_ASIDE = "damaged-"


def save(
    run: Path, step: int, shared: dict[str, Any] | None, own: dict[str, Any], keep: int, ranks: Ranks | None = None
) -> None:
    """Writes the checkpoint of `step`, then deletes the oldest ones, so that `keep` are left.

    All processes call it. Raises RunError in all of them if one cannot write; there is no new checkpoint then.

    Args:
        run: the run folder.
        step: updates of the weights so far.
        shared: what the processes have in common, which the first one writes; None elsewhere.
        own: what each process has of its own, and writes.
        keep: checkpoints that are left, the new one included.
        ranks: the processes; by default this one alone.
    """
    ranks = ranks or Ranks(alone=True)
    path = run / "checkpoints" / f"step-{step:08d}"
    contents = {_rank_file(ranks.rank): own, **({} if shared is None else {_SHARED: shared})}
    with ExitStack() as stack:
        folder = ranks.told(lambda: stack.enter_context(new_directory(path, overwrite=True)))
        ranks.agreed(lambda: _write(path, folder, contents))

        def finish() -> None:
            files = {
                name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
                for name in (_SHARED, *map(_rank_file, range(ranks.count)))
            }
            write_json(folder / _MANIFEST, {"step": step, "files": files})
            stack.close()  # gives the folder its name
            for old in checkpoints(run)[keep:]:
                with _moving(old):
                    remove_directory(old)

        ranks.told(finish)


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _write(path: Path, folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    for name, state in contents.items():
        with writing(path, folder), (folder / name).open("wb") as file:
            torch.save(state, file)


@contextmanager
def _moving(path: Path) -> Iterator[None]:
    """Raises RunError if the folder cannot be deleted or renamed."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot move {path}: {error.strerror or error}; allow it, and go on with --resume") from error


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the newest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def load(run: Path, ranks: Ranks | None = None) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """The newest checkpoint that is whole: what is shared, this process's own state, how many processes it has.

    The first process chooses it, and moves aside those whose files are not what their manifest says, with a
    CbnWarning. With fewer processes in it, the state is that of its rank modulo their number. None if there is no
    checkpoint. Raises RunError in all processes if all checkpoints are damaged, or if the chosen one cannot be read in
    one of them; it is left as it is then.
    """
    ranks = ranks or Ranks(alone=True)
    path = ranks.told(lambda: _newest(run))
    return None if path is None else ranks.agreed(lambda: _read(path, ranks.rank))


def _newest(run: Path) -> Path | None:
    found = checkpoints(run)
    for path in found:
        damage = _damage(path)
        if damage is None:
            return path
        _set_aside(path, damage)
    # also those of an attempt before this one; to begin anew without a word would throw the run away
    if found or any((run / "checkpoints").glob(f"{_ASIDE}step-*")):
        raise RunError(
            f"all checkpoints in {run / 'checkpoints'} are damaged; start again with --overwrite, or delete {run} if a "
            "comparison is to train it again"
        )
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are those that were written."""
    with _reading(path):
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            files = {name: (about["bytes"], about["sha256"]) for name, about in manifest["files"].items()}
        except FileNotFoundError:
            return f"it has no {_MANIFEST}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"its {_MANIFEST} says {type(error).__name__}: {first_line(error)}"
        if sorted(files) != sorted([_SHARED, *map(_rank_file, range(max(1, len(files) - 1)))]):
            return f"its {_MANIFEST} names {', '.join(files)}"
        for name, (expected, digest) in files.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                return f"{name} is missing"
            if size != expected:
                return f"{name} has {size} bytes instead of {expected}"
            if _sha256(path / name) != digest:
                return f"{name} is not the file that was written"
    return None


def _read(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    with _reading(path):
        ranks = len(json.loads((path / _MANIFEST).read_bytes())["files"]) - 1
        try:
            shared, own = (
                torch.load(path / name, map_location="cpu", weights_only=True)
                for name in (_SHARED, _rank_file(rank % ranks))
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch.load has many, about files that are as they were written
            reason = str(error).strip().splitlines() or [type(error).__name__]
            if "not enough memory" in reason[0] or "can't allocate memory" in reason[0]:
                raise MemoryError from error
            raise RunError(
                f"{path} is whole but cannot be read here ({reason[0]}); use the versions of torch and cbn_convert in "
                f"{path.parents[1]}/config.json, or start again with --overwrite"
            ) from error
    return shared, own, ranks


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises RunError if the machine does not give what the files of a checkpoint hold, which says nothing of them."""
    try:
        yield
    except MemoryError as error:
        raise RunError(f"the memory of this machine is not enough to read {path}; free some and try again") from error
    except OSError as error:
        raise RunError(
            f"cannot read {error.filename or path}: {error.strerror or error}; allow it and try again, or move {path} "
            "away to go on from the checkpoint before it"
        ) from error


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{_ASIDE}{path.name}")
    with _moving(path):
        if aside.exists():
            remove_directory(aside)
        path.rename(aside)
    warnings.warn(
        f"checkpoint {path} is damaged ({reason}); it is now {aside.name}, and the one before it is used",
        CbnWarning,
        stacklevel=5,
    )


def random_states() -> dict[str, Any]:
    """The states of all random number generators of this process."""
    name, keys, *rest = cast(Any, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` gave; the GPU's only where there is one."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
