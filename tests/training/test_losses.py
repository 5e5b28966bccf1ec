"""Gradients of a data set of unequal classes, against those of equal ones written out image by image in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import config
from timm.data import Mixup
from torch import Tensor

from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.environment import make_accelerator
from cbn_convert.training.learner import Learner
from cbn_convert.training.loading import Batch, batches, training_loader
from cbn_convert.training.parallel import Ranks
from cbn_convert.training.setup import build

SMOOTHING = 0.125  # like the parts of a mixed image below exact in float32, the type of timm's targets
COUNTS = [16, 4]  # of the classes


@pytest.fixture
def unequal(colors: Path) -> Path:
    """Images of two classes: 16 and 4 for training."""
    for i in range(4, 16):
        (colors / f"train/red/{i}.png").unlink()
    return colors


def learner_of(settings: FinetuneConfig) -> tuple[Learner, list[Batch]]:
    """A learner in float64 whose norms do not look at the batch, and all batches of an epoch."""
    learner = Learner(settings, setup := build(settings), make_accelerator(settings), Ranks(), 100)
    torch.nn.init.normal_(setup.model.get_classifier().weight)  # zeros at the start, which stop every gradient
    learner.model.double()
    learner.loss.double()
    learner.wrapped.train()
    loader, _ = training_loader(setup.training, setup.data_config, settings)
    return learner, [Batch(b.images.double(), b.labels, b.bad) for b in batches(loader)]


def mean_gradient(learner: Learner, parts: list[Batch], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of all updates of an epoch, none of which is made."""
    found: list[list[Tensor]] = []

    def spy(self: Any) -> Tensor:
        found.append([p.grad.clone() for p in self.model.parameters()])
        return torch.tensor(False)

    monkeypatch.setattr(Learner, "step_unless_bad", spy)
    accumulate = learner.config.accumulate
    for first in range(0, len(parts), accumulate):
        learner.update(parts[first : first + accumulate])
    return [torch.stack(grads).mean(0) for grads in zip(*found, strict=True)]


def smoothed(logits: Tensor, label: int) -> Tensor:
    """The cross-entropy of one image [classes], with label smoothing."""
    logs = logits - logits.exp().sum().log()
    return -(1 - SMOOTHING) * logs[label] - SMOOTHING * logs.mean()


def gradient_of(loss: Tensor, learner: Learner) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(learner.model.parameters())))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert max(float(w.abs().max()) for w in want) > 1e-3
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 5), (20, 1)])
def test_weighted_classes_have_the_gradient_of_equal_ones(
    batch: int, accumulate: int, unequal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, parts = learner_of(
        config(
            unequal, tmp_path / "run", norm="frozen", class_balance="weight", label_smoothing=SMOOTHING,
            batch_size=batch, accumulate=accumulate,
        )
    )  # fmt: skip
    got = mean_gradient(learner, parts, monkeypatch)
    losses: list[list[Tensor]] = [[], []]
    for part in parts:
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            losses[label].append(smoothed(learner.model(image[None])[0], label))
    assert [len(own) for own in losses] == COUNTS
    assert_same(got, gradient_of(sum(sum(own) / len(own) for own in losses) / len(losses), learner))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("balance", ["weight", "none"])
def test_the_labels_of_a_mixed_image_weigh_with_their_parts(
    balance: str, accumulate: int, unequal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixup, "_params_per_batch", lambda self: (0.75, False))
    learner, parts = learner_of(
        config(
            unequal, tmp_path / "run", norm="frozen", class_balance=balance, label_smoothing=SMOOTHING, mixup=1.0,
            accumulate=accumulate,
        )
    )  # fmt: skip
    # timm mixes in place
    mixed = [
        (0.75 * part.images[i] + 0.25 * part.images[1 - i], part.labels[i], part.labels[1 - i])
        for part in parts for i in (0, 1)
    ]  # fmt: skip
    got = mean_gradient(learner, parts, monkeypatch)
    weights = [20 / 2 / count for count in COUNTS] if balance == "weight" else [1, 1]
    losses = []
    for image, one, other in mixed:
        logits = learner.model(image[None])[0]
        losses.append(0.75 * weights[one] * smoothed(logits, one) + 0.25 * weights[other] * smoothed(logits, other))
    assert_same(got, gradient_of(sum(losses) / len(losses), learner))
