"""fp16's loss scaling. GradScaler runs on the CPU as on a GPU; half precision itself does not matter to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from test_engine import config

from cbn_convert.training.engine import _accelerator
from cbn_convert.training.learner import Learner
from cbn_convert.training.loading import Batch, batches, training_loader
from cbn_convert.training.parallel import Ranks
from cbn_convert.training.setup import build


def learner_of(opt: str, colors: Path, scaler: torch.amp.GradScaler | None) -> tuple[Learner, list[Batch]]:
    """A learner at the start of a run, and four batches."""
    settings = config(colors, colors, opt=opt)
    torch.manual_seed(0)
    learner = Learner(settings, setup := build(settings), _accelerator(settings), Ranks(), 100)
    learner.wrapped.train()
    if scaler is not None:
        learner.prepared_optimizer = AcceleratedOptimizer(learner.optimizer, scaler=scaler)
        learner.accelerator.scaler, learner.accelerator._optimizers = scaler, [learner.prepared_optimizer]
        learner.accelerator.native_amp = True
    loader, _ = training_loader(setup.training, setup.data_config, settings)
    return learner, list(batches(loader))[:4]


@pytest.fixture(autouse=True)
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate unscales gradients before it clips them, if the precision is called so."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")


@pytest.mark.parametrize("opt", ["sgd", "adamw", "rmsprop"])
def test_a_scaled_loss_gives_the_same_weights(opt: str, colors: Path) -> None:
    """A scale is a power of two: what does not overflow has the same bits."""
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        learner, parts = learner_of(opt, colors, scaler)
        for part in parts:
            learner.update([part])
        states.append(learner.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("opt", ["sgd", "adamw", "rmsprop"])
def test_a_scale_that_overflows_is_lowered_and_no_fault(opt: str, colors: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    learner, parts = learner_of(opt, colors, scaler)
    for part in parts[:2]:
        learner.update([part])
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    scaler._scale.fill_(2.0**127)
    learner.update([parts[2]])
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    assert scaler.get_scale() == 2.0**126
    assert learner.totals.first_bad() is None
    scaler._scale.fill_(2.0**10)
    learner.update([parts[3]])
    assert not all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


def test_the_scale_is_part_of_a_checkpoint(colors: Path) -> None:
    learner, parts = learner_of("sgd", colors, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    learner.update([parts[0]])
    scaler = torch.amp.GradScaler("cpu")
    other, _ = learner_of("sgd", colors, scaler)
    other.load(learner.state(), learner.own_state(), same_ranks=True)
    assert scaler.get_scale() == 2.0**10
