"""fp16's loss scaling. GradScaler runs on the CPU as on a GPU; half precision itself does not matter to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.runs import config

from cbn_convert.errors import DivergedError
from cbn_convert.training.environment import make_accelerator
from cbn_convert.training.learner import Learner
from cbn_convert.training.loading import Batch, batches, training_loader
from cbn_convert.training.parallel import Ranks
from cbn_convert.training.setup import build


def learner_of(
    opt: str, colors: Path, scaler: torch.amp.GradScaler | None, **changes: Any
) -> tuple[Learner, list[Batch]]:
    """A learner at the start of a run, and four batches."""
    settings = config(colors, colors, opt=opt, **changes)
    torch.manual_seed(0)
    learner = Learner(settings, setup := build(settings), make_accelerator(settings), Ranks(), 100)
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
    conv = next(m for m in learner.model.modules() if isinstance(m, torch.nn.Conv2d))
    conv.weight.data *= 2.0**-20  # which a norm layer answers with a gradient larger by as much
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    scaler._scale.fill_(2.0**127)
    learner.update([parts[2]])
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    assert scaler.get_scale() == 2.0**126
    assert learner.totals.first_bad() is None
    scaler._scale.fill_(2.0**10)
    learner.update([parts[3]])
    assert not all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_part_of_an_update_that_is_not_finite_is_a_fault(place: int, colors: Path) -> None:
    """The part after it does not hide it: a run stops, or leaves the update out with all that it has done."""
    for on_nan in ("stop", "skip"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        learner, parts = learner_of("sgd", colors, scaler, norm="bn", on_nan=on_nan)
        learner.update(parts[:3])
        before = {name: t.clone() for name, t in learner.model.state_dict().items() if t.is_floating_point()}
        parts[place].images[0] = torch.nan
        if on_nan == "stop":
            with pytest.raises(DivergedError, match="at step 2 with lr"):
                learner.update(parts[:3])
        else:
            learner.update(parts[:3])
            after = learner.model.state_dict()
            assert [name for name, t in before.items() if not torch.equal(after[name], t)] == []
            learner.update([parts[3]])
            assert learner.totals.take()[2] == 1


def test_a_gradient_that_no_scale_makes_finite_is_a_fault(colors: Path) -> None:
    learner, parts = learner_of("sgd", colors, torch.amp.GradScaler("cpu", init_scale=2.0**3))
    next(learner.model.parameters()).register_hook(lambda grad: grad * torch.inf)
    for part in parts[:3]:
        learner.update([part])
    with pytest.raises(DivergedError, match="at step 4 with lr"):
        learner.update([parts[3]])


@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_is_not_finite_is_a_fault_though_its_gradient_is_finite(scaled: bool, colors: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    learner, parts = learner_of("sgd", colors, scaler, on_nan="skip", label_smoothing=0.0)
    learner.update([parts[0]])
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    parts[1].labels[0] = 0
    handle = learner.model.register_forward_hook(lambda m, args, out: out - torch.tensor([torch.inf, 0.0]))
    learner.update([parts[1]])
    handle.remove()
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    learner.update([parts[2]])
    assert learner.totals.take()[2] == 1


def test_the_scale_is_part_of_a_checkpoint(colors: Path) -> None:
    learner, parts = learner_of("sgd", colors, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    learner.update([parts[0]])
    scaler = torch.amp.GradScaler("cpu")
    other, _ = learner_of("sgd", colors, scaler)
    other.load(learner.state(), learner.own_state(), same_ranks=True)
    assert scaler.get_scale() == 2.0**10
