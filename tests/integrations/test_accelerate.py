"""CbnState in accelerate's save_state and load_state; accelerate is a requirement of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from loop import different, everything, images, network, two_processes
from torch.utils.data import DataLoader, TensorDataset

import cbn_convert as cbn
from cbn_convert.integrations.accelerate import CbnState

STEPS = 12


def run(folder: Path, steps: range, precision: str = "no", resume: bool = False, keep: bool = True) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = network()
    cbn.convert(model, example_input=torch.randn(1, 3, 12, 12))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    data = DataLoader(TensorDataset(*images()), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if keep:
        accelerator.register_for_checkpointing(CbnState(model))
    if resume:
        accelerator.load_state(str(folder / "state"))
    batches = list(data)
    model.train()
    for i in steps:
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        if i == 4 and not resume:
            accelerator.save_state(str(folder / "state"))
    end = everything(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    return {name.removeprefix("weights.module."): t for name, t in end.items()}


def _forget() -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    _forget()  # what tests of other files left in this process
    yield
    _forget()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_is_exact(tmp_path: Path, precision: str) -> None:
    whole = run(tmp_path, range(STEPS), precision)
    assert different(whole, run(tmp_path, range(5, STEPS), precision, resume=True)) == []
    run(tmp_path / "without", range(STEPS), precision, keep=False)
    without = run(tmp_path / "without", range(5, STEPS), precision, resume=True, keep=False)
    assert "weights.head.weight" in different(whole, without)


def resumed_and_not(rank: int, folder: Path) -> None:
    whole = run(folder, range(STEPS // 2 + 2))
    resumed = run(folder, range(5, STEPS // 2 + 2), resume=True)
    torch.save(different(whole, resumed), folder / f"{rank}.pt")


@pytest.mark.xdist_group("distributed")
def test_two_processes_resume_each_with_its_own_window(tmp_path: Path) -> None:
    two_processes(resumed_and_not, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [[], []]


def test_a_model_that_is_not_converted_is_one_sentence() -> None:
    with pytest.raises(cbn.CbnError, match="Net has no converted layer to keep the window of; call cbn_convert"):
        CbnState(network())
