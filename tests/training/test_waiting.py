"""No update waits for a GPU: nothing in it asks for the value of a tensor that would be on the device.

There is no GPU here to wait for. On the CPU every such question is an `aten._local_scalar_dense`, which a dispatch mode
sees; what the package decides on the CPU only, because it is free there, is decided as on a device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import randomize_norms
from helpers.runs import config
from torch.utils._python_dispatch import TorchDispatchMode

from cbn_convert.norm import carried, kernels, layer, ring
from cbn_convert.training.environment import make_accelerator
from cbn_convert.training.learner import Learner
from cbn_convert.training.loading import batches, training_loader
from cbn_convert.training.parallel import Ranks
from cbn_convert.training.setup import build

# operators whose result or its shape the host must wait for
QUESTIONS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten.unique",
    "aten.is_nonzero",
)


class Questions(TorchDispatchMode):
    """Keeps the names of operators that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(QUESTIONS):
            self.asked.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opt": "adamw", "ema": 0.9, "clip_grad": 0.0, "channels_last": True},
        {"mixup": 0.2, "cutmix": 1.0, "accumulate": 2},
        {"class_balance": "weight", "label_smoothing": 0.1, "mixed_precision": "bf16"},
        {"norm": "bn"}, {"norm": "frozen"}, {"norm": "gn"}, {"norm": "brn"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("measured", [True, False])
def test_an_update_asks_for_no_value(
    measured: bool, changes: dict[str, Any], colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(colors, tmp_path / "run", **changes)
    setup = build(settings)
    loader, _ = training_loader(setup.training, setup.data_config, settings)
    parts = list(batches(loader))[: settings.accumulate]
    learner = Learner(settings, setup, make_accelerator(settings), Ranks(), 100)
    learner.wrapped.train()
    if measured:  # so that there is something to carry
        randomize_norms(learner.model)
    for module in (carried, layer, ring):
        monkeypatch.setattr(module, "is_known", lambda condition: False)
    monkeypatch.setattr(learner, "stop_if_bad", lambda: None)
    for _ in range(2):  # the first may ask: there is no state of the optimizer and no past
        learner.update(parts)
    with kernels.forced("plain"), Questions() as questions:
        for _ in range(9):  # every eighth looks at its batch
            learner.update(parts)
    assert questions.asked == []


def test_a_question_is_seen() -> None:
    with Questions() as questions:
        torch.ones(3).sum().item()
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
    assert len(questions.asked) == 3
