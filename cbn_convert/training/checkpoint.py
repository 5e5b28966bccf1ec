"""What a run needs to go on after an interruption: a folder that is there as a whole or not at all, and is checked.

    checkpoints/step-00000120/training.pt     the model, the optimizer and all that the processes share
                              rank-0.pt, ..   what each process has of its own: CBN history, statistics, random states
                              manifest.json   size and SHA-256 of each

Nothing is unpickled: torch.load reads with weights_only=True, and only what the manifest vouches for.
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..errors import CbnWarning, RunError
from ..files import new_directory, read_json, remove_directory, write_json

_NAME = re.compile(r"step-(\d{8,})")
_SHARED, _MANIFEST = "training.pt", "manifest.json"


def save(run: Path, step: int, shared: dict[str, Any], ranks: list[dict[str, Any]], keep: int) -> None:
    """Writes the checkpoint of `step`, then deletes the oldest ones, so that `keep` are left."""
    with new_directory(run / "checkpoints" / f"step-{step:08d}", overwrite=True) as folder:
        contents = {_SHARED: shared, **{f"rank-{number}.pt": state for number, state in enumerate(ranks)}}
        for name, state in contents.items():
            with (folder / name).open("wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # torch's own words for a disk that is full
                    raise OSError(f"{name} could not be written whole") from error
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in contents}
        write_json(folder / _MANIFEST, {"step": step, "files": files})
    for old in checkpoints(run)[keep:]:
        remove_directory(old)


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the newest first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def load(run: Path, rank: int = 0) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """The newest checkpoint that is whole: what is shared, the state of process `rank`, and how many processes it has.

    With fewer processes in it, that of `rank` modulo their number. None if there is no checkpoint. A damaged one is
    moved aside, with a CbnWarning. Raises RunError if all are damaged.
    """
    found = checkpoints(run)
    for path in found:
        try:
            return _read(path, rank)
        except Exception as error:  # whatever is wrong with it, the older ones may be good
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            _set_aside(path, reason)
    if found:
        raise RunError(f"all checkpoints in {run / 'checkpoints'} are damaged; start again with --overwrite")
    return None


def _read(path: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    manifest = read_json(path / _MANIFEST, "the manifest")
    ranks = len(manifest["files"]) - 1
    names = [_SHARED, *(f"rank-{number}.pt" for number in range(ranks))]
    if sorted(manifest["files"]) != sorted(names):
        raise ValueError(f"its manifest names {', '.join(manifest['files'])}")
    for name, expected in manifest["files"].items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if _sha256(path / name) != expected["sha256"]:
            raise ValueError(f"{name} is not the file that was written")
    wanted = (_SHARED, f"rank-{rank % ranks}.pt")
    shared, own = (torch.load(path / name, map_location="cpu", weights_only=True) for name in wanted)
    return shared, own, ranks


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    if aside.exists():
        remove_directory(aside)
    path.rename(aside)
    warnings.warn(
        f"checkpoint {path} is damaged ({reason}); it is now {aside.name}, and the one before it is used",
        CbnWarning,
        stacklevel=4,
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
