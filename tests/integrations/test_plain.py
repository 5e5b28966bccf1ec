"""The pair of functions for every loop."""

from __future__ import annotations

import io
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import different, everything, images, network
from torch import nn

import cbn_convert as cbn
from cbn_convert.integrations import load_training_state, shared, training_state

STEPS = 12


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, bf16: bool = False) -> None:
    x, y = images()
    model.train()
    for i in steps:
        at = slice(2 * i % 24, 2 * i % 24 + 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(x[at]).float(), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def begun(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    cbn.convert(model, example_input=torch.randn(1, 3, 12, 12), **options)
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"moments_every": 3}], ids=["carried", "ring", "every 3"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any], bf16: bool) -> None:
    model, optimizer = begun(**options)
    train(model, optimizer, range(5), bf16)
    checkpoint = saved_and_loaded(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cbn": training_state(model)}
    )
    train(model, optimizer, range(5, STEPS), bf16)

    def resumed(with_window: bool) -> dict[str, Any]:
        other, its_optimizer = begun(**options)
        other.load_state_dict(checkpoint["model"])
        its_optimizer.load_state_dict(checkpoint["optimizer"])
        if with_window:
            load_training_state(other, checkpoint["cbn"])
        train(other, its_optimizer, range(5, STEPS), bf16)
        return everything(other)

    assert different(everything(model), resumed(True)) == []
    assert "weights.head.weight" in different(everything(model), resumed(False))


def test_saving_leaves_the_run_as_it_is() -> None:
    (a, first), (b, second) = begun(), begun()
    train(a, first, range(STEPS))
    for i in range(STEPS):
        train(b, second, range(i, i + 1))
        training_state(b)
    assert different(everything(a), everything(b)) == []


def test_names_are_those_of_the_bare_model() -> None:
    model, _ = begun()
    assert training_state(torch.compile(model))["ranks"][0].keys() == training_state(model)["ranks"][0].keys()


def test_the_weights_beside_it_are_plain() -> None:
    model, optimizer = begun()
    train(model, optimizer, range(5))
    plain = network(1)
    plain.load_state_dict(model.state_dict())
    x, _ = images()
    assert torch.equal(plain.eval()(x), model.eval()(x))


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    del state["ranks"][0]["body.1"]["sources"]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "no state of cbn_convert's windows"),
        (lambda s: s | {"format": 9, "version": "7.0"}, "saved by cbn_convert 7.0 in format 9"),
        (lambda s: s | {"ranks": [{"other.1": {}}]}, "of other layers than the model's: body.1, neck.1, other.1"),
        (lambda s: s | {"ranks": []}, "cannot be restored"),
        (damaged, "cannot be restored .KeyError: 'sources'"),
    ],
)
def test_a_state_that_does_not_fit_is_one_sentence_and_changes_nothing(change: Any, message: str) -> None:
    model, optimizer = begun()
    train(model, optimizer, range(5))
    other = saved_and_loaded(training_state(model))
    train(model, optimizer, range(5, 7))
    before = everything(model)
    with pytest.raises(cbn.CbnError, match=message) as error:
        load_training_state(model, change(other))
    assert str(error.value).count(". ") == 0
    assert different(before, everything(model)) == []


@pytest.mark.parametrize("options", [{"window": 64, "history": "ema"}, {"moments_every": 4}, {"window": 4}])
def test_a_state_of_another_window_is_one_sentence(options: dict[str, Any]) -> None:
    model, optimizer = begun()
    train(model, optimizer, range(5))
    with pytest.raises(cbn.CbnError, match=r"layer 'stem.1' was trained with Window\(.* convert with the arguments"):
        load_training_state(begun(**options)[0], training_state(model))


def test_a_model_that_is_not_converted_is_one_sentence() -> None:
    model, optimizer = begun()
    train(model, optimizer, range(5))
    with pytest.raises(cbn.CbnError, match="the model has none; call cbn_convert"):
        load_training_state(network(), training_state(model))


FRAMEWORKS = {
    "lightning": "lightning", "huggingface": "transformers", "fastai": "fastai", "ultralytics": "ultralytics",
    "mmengine": "mmengine",
}  # fmt: skip


@pytest.mark.parametrize(("module", "package"), FRAMEWORKS.items())
def test_a_framework_that_is_missing_or_too_old_is_one_sentence(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"cbn_convert.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(shared, "version", lambda _: "0.0.1")
    with pytest.raises(cbn.CbnError, match=rf"needs {package} .* or newer, and 0\.0\.1 is installed; pip install -U"):
        import_module(name)

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(shared, "version", missing)
    with pytest.raises(
        cbn.CbnError, match=rf"needs {package} .* or newer, which is not installed; pip install {package}"
    ):
        import_module(name)


def test_the_core_imports_no_framework() -> None:
    root = Path(cbn.__file__).parent
    for file in root.rglob("*.py"):
        if file.parent.name != "integrations":
            assert not re.search(r"^ *(from|import) .*integrations", file.read_text(), re.MULTILINE), file
