"""What an evaluation counts, statistics measured anew, and the way back to plain BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.images import write_image
from helpers.models import randomize_norms
from helpers.runs import config
from sklearn.metrics import confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import cbn_convert as cbn
from cbn_convert.conversion import norm_layers
from cbn_convert.errors import DataError, RunError
from cbn_convert.training.alternatives import apply_norm, restore_norm
from cbn_convert.training.evaluation import Evaluation, accuracy, resolve_device
from cbn_convert.training.loading import IGNORED, Batch
from cbn_convert.training.recalibration import recalibrate

CPU = torch.device("cpu")
NORMS = ["cbn", "bn", "frozen", "brn"]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def evaluated(logits: Tensor, labels: Tensor, sizes: list[int], bad: tuple[str, ...] = ()) -> Evaluation:
    """The images are the logits themselves, in batches of these sizes."""
    pairs = zip(logits[:, :, None, None].split(sizes), labels.split(sizes), strict=True)
    result = accuracy(nn.Flatten(), [Batch(x, y, list(bad)) for x, y in pairs], CPU)
    assert result is not None
    return result


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("ignored", [0, 9])
def test_accuracy_is_that_of_scikit_learn(classes: int, ignored: int) -> None:
    labels = torch.randint(0, classes - 1, (50,))  # the last class has no image
    logits = torch.randn(50, classes) + 0.5 * nn.functional.one_hot(labels, classes)
    places = torch.randperm(50)[:ignored]
    labels[places] = IGNORED
    result = evaluated(logits, labels, [16, 16, 16, 2])
    known = labels >= 0
    y, z, order = labels[known].numpy(), logits[known].double().numpy(), np.arange(classes)
    taken = z.argmax(1)
    assert result.images == 50 - ignored
    assert result.top1 == pytest.approx(100 * (taken == y).mean())
    top5 = 100 * top_k_accuracy_score(y, z, k=5, labels=order) if classes > 5 else 100
    assert (top5 < 100) == (classes > 5)
    assert result.top5 == pytest.approx(top5)
    assert result.loss == pytest.approx(log_loss(y, np.exp(z) / np.exp(z).sum(1, keepdims=True), labels=order))
    assert result.confusion == confusion_matrix(y, taken, labels=order).tolist()
    recall = 100 * recall_score(y, taken, labels=order, average=None, zero_division=np.nan)
    assert result.per_class[-1] is None
    assert result.per_class[:-1] == pytest.approx(recall[:-1].tolist())
    assert 0 < result.top1 < result.top5


def test_a_batch_of_which_nothing_counts_and_the_names_of_bad_files() -> None:
    labels = torch.tensor([0, 1, IGNORED, IGNORED, 1])
    result = evaluated(torch.tensor([[1.0, 0.0]] * 5), labels, [2, 2, 1], ("b.png", "a.png"))
    assert (result.images, result.confusion, result.bad_images) == (3, [[1, 0], [2, 0]], ["a.png", "b.png"])
    assert result.to_dict()["per_class"] == [100.0, 0.0]
    for empty in (torch.full((5,), IGNORED), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(DataError, match="no readable image"):
            evaluated(torch.zeros(len(empty), 2), empty, [len(empty)])


def test_an_interrupted_evaluation_gives_up() -> None:
    seen = []

    def images() -> Iterator[Batch]:
        for number in range(5):
            seen.append(number)
            yield Batch(torch.zeros(1, 2, 1, 1), torch.zeros(1, dtype=torch.long), [])

    assert accuracy(nn.Flatten(), images(), CPU, interrupted=lambda: len(seen) == 3) is None
    assert seen == [0, 1, 2]


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in [n for n, there in (("cuda", torch.cuda.is_available()), ("tpu", False)) if not there]:
        with pytest.raises(RunError, match=f"device {name} is not available on this machine; use --device cpu or auto"):
            resolve_device(name)


def test_recalibrated_statistics_are_the_means_over_the_batches() -> None:
    model: Any = randomize_norms(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)))
    model.append(nn.BatchNorm2d(4, track_running_stats=False))
    model.train()(torch.randn(6, 3, 8, 8))  # so that some batches are counted already
    images = [torch.randn(6, 3, 8, 8) * scale + scale for scale in (1.0, 2.0, 5.0)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    recalibrate(model, images)

    inputs = [nn.functional.conv2d(x.double(), model[1].weight.double(), model[1].bias.double()) for x in images]
    means = [x.mean((0, 2, 3)) for x in inputs]
    variances = [x.var((0, 2, 3), correction=1) for x in inputs]
    torch.testing.assert_close(model[2].running_mean.double(), sum(means) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[2].running_var.double(), sum(variances) / 3, rtol=1e-5, atol=1e-6)
    assert model[2].momentum == 0.3
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_recalibration_depends_on_nothing_that_was_before_and_fails_cleanly() -> None:
    model = randomize_norms(timm.create_model("test_resnet", num_classes=2, drop_rate=0.5))
    other = randomize_norms(timm.create_model("test_resnet", num_classes=2))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "running" not in k}, strict=False)
    for m in (model, other):
        recalibrate(m, [X, X + 1])
    a, b = model.state_dict(), other.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if "running" in k)

    def broken() -> Iterator[Tensor]:
        yield X
        raise DataError("no more")

    momenta = [m.momentum for m in model.modules() if isinstance(m, _BatchNorm)]
    with pytest.raises(DataError):
        recalibrate(model, broken())
    assert [m.momentum for m in model.modules() if isinstance(m, _BatchNorm)] == momenta
    assert not any(m.training for m in model.modules())


def test_a_model_without_batchnorm_is_not_touched() -> None:
    def unused() -> Iterator[Tensor]:
        raise AssertionError
        yield X

    recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), unused())


def test_recalibration_when_one_image_is_left_over(colors: Path, tmp_path: Path) -> None:
    write_image(colors / "train/red/one more.png", (200, 60, 60), 99)
    settings = config(colors, tmp_path / "run", model="resnet18", recalibrate=2, max_steps=1, norm="bn")
    assert cbn.finetune(settings, quiet=True).steps == 1


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": getattr(layer, kind).clone()
        for name, layer in norm_layers(model).items()
        for kind in ("running_mean", "running_var")
    }


def applied(model: nn.Module, norm: str, frozen: tuple[str, ...] = ()) -> None:
    apply_norm(model, norm, frozen, **({"window": 4, "example_input": X} if norm == "cbn" else {}))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
@pytest.mark.parametrize("norm", NORMS)
def test_restore_norm_is_the_way_back(norm: str, name: str) -> None:
    model = randomize_norms(timm.create_model(name, num_classes=3)).eval()
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        expected = model(X)
    applied(model, norm, ("bn1",))
    assert norm == "bn" or sum(type(m) is not c for m, c in zip(model.modules(), classes, strict=True)) > 15
    restore_norm(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_restore_norm_keeps_what_was_learnt(norm: str) -> None:
    model = randomize_norms(timm.create_model("resnet18", num_classes=3))
    applied(model, norm)
    model.train()(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval()
    with torch.no_grad():
        expected, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
        restore_norm(model)
        assert torch.equal(model(X), expected)
    assert all(type(m) is nn.BatchNorm2d for m in norm_layers(model).values())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("every", [False, True])
def test_frozen_layers_keep_their_statistics_in_training_and_others_do_not(every: bool, norm: str) -> None:
    model = randomize_norms(timm.create_model("resnet18", num_classes=3))
    frozen = tuple(norm_layers(model)) if every else ("bn1", "layer1.0.bn1", "layer1.0.bn2")
    applied(model, norm, frozen)
    before = statistics(model)
    model.train()
    for _ in range(2):
        model(X).square().mean().backward()
    after = statistics(model)
    assert len(after) == 40
    for key, old in before.items():
        stays = norm == "frozen" or key.rpartition(".")[0] in frozen
        assert torch.equal(after[key], old) == stays, key


def test_a_folder_that_is_neither_run_nor_export(colors: Path, tmp_path: Path) -> None:
    """A timm name, which models are also given by, is no answer here."""
    with pytest.raises(RunError, match=r"is neither a run folder nor an exported one: it has no config\.json"):
        cbn.evaluate(tmp_path, str(colors), device="cpu", workers=0)
