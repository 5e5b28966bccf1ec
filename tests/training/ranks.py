"""What each process of test_processes.py runs: python ranks.py SETTINGS.json, under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import destroy_process_group, get_rank

import cbn_convert as cbn
from cbn_convert.training import loop
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.learner import Learner

torch.set_num_threads(1)


class Killed(BaseException):
    """Stands for the end of all processes."""


def main(folder: Path, settings: dict[str, Any]) -> None:
    """A whole run, and one that is killed in the middle of an epoch and resumed; the model of each process is kept."""
    trainers: list[Any] = []
    init, step = loop.Trainer.__init__, Learner.step_unless_bad

    def noted(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        trainers.append(self)

    def killing(self: Any) -> Any:
        if self.updates == 7:
            raise Killed
        return step(self)

    loop.Trainer.__init__ = noted
    cbn.finetune(FinetuneConfig(output=str(folder / "whole"), **settings), quiet=True)
    torch.save(trainers[0].model.state_dict(), folder / f"whole-{get_rank()}.pt")
    result = cbn.resume(folder / "whole", quiet=True)

    Learner.step_unless_bad = killing
    try:
        cbn.finetune(FinetuneConfig(output=str(folder / "cut"), **settings), quiet=True)
    except Killed:
        Learner.step_unless_bad = step
    cbn.resume(folder / "cut", quiet=True)
    torch.save(trainers[-1].model.state_dict(), folder / f"cut-{get_rank()}.pt")
    (folder / f"result-{get_rank()}.json").write_text(json.dumps(result.to_dict()))
    destroy_process_group()


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1]).read_text())
    main(Path(stored["folder"]), stored["settings"])
