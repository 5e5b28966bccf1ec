"""What a run needs to go on after an interruption, written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RunError
from ..files import new_directory
from ..norm import history_state, load_history_state


def save_last(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Writes run/checkpoints/last: model, optimizer, CBN history, and `progress` (numbers and strings)."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history_state(model),
        "progress": progress,
    }
    with new_directory(run / "checkpoints" / "last", overwrite=True) as folder:
        torch.save(state, folder / "training.pt")


def load_last(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores `save_last` and returns its progress. Raises RunError if there is none or it is damaged."""
    path = run / "checkpoints" / "last" / "training.pt"
    if not path.is_file():
        raise RunError(f"{run} has no checkpoint to resume from; start again with --overwrite")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        load_history_state(model, state["history"])
        return dict(state["progress"])
    except Exception as error:  # torch.load raises many types, all of them about this file
        raise RunError(f"{path} is damaged or of another run; start again with --overwrite") from error
