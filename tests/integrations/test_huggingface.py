"""CbnCallback in Hugging Face's Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import randomize_norms
from loop import different, everything, images, two_processes
from torch import nn

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin

pytest.importorskip("transformers", reason="transformers is not installed; make test-integrations installs it")
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from cbn_convert.integrations.huggingface import FILE, CbnCallback

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
        return randomize_norms(ResNetForImageClassification(config))


def trainer(folder: Path, *, steps: int = 12, callbacks: Any = None, model: Any = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=5, logging_steps=2,
        learning_rate=0.01, use_cpu=True, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*images(24, 32), strict=True)]
    callbacks = [CbnCallback()] if callbacks is None else callbacks
    return Trainer(resnet() if model is None else model, arguments, train_dataset=data, callbacks=callbacks)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_resume_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "a", **options)
    whole.train()
    resumed = trainer(tmp_path / "a", **options)
    assert any(isinstance(m, CrossIterationMixin) for m in resumed.model.modules())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert different(everything(whole.model), everything(resumed.model)) == []

    (tmp_path / "a" / "checkpoint-5" / FILE).unlink()
    without = trainer(tmp_path / "a", **options)
    with pytest.warns(cbn.errors.CbnWarning, match="there is no cbn_training_state.pt of this run in"):
        without.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert "weights.classifier.1.weight" in different(everything(whole.model), everything(without.model))


def test_resume_from_another_folder_is_exact_if_it_is_named_and_said_if_not(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a")
    whole.train()
    other = trainer(tmp_path / "b", seed=1)
    other.train()  # has a checkpoint-5 of its own, which must not be taken
    path = str(tmp_path / "moved")
    shutil.copytree(tmp_path / "a" / "checkpoint-5", path)
    named = trainer(tmp_path / "b", resume_from_checkpoint=path)
    named.train(resume_from_checkpoint=path)
    assert different(everything(whole.model), everything(named.model)) == []
    with pytest.warns(cbn.errors.CbnWarning, match="give the checkpoint's folder as TrainingArguments"):
        trainer(tmp_path / "b", steps=6).train(resume_from_checkpoint=path)


def test_a_checkpoint_loads_without_the_package_and_folds(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=5)
    run.train()
    model = run.model.eval()
    expected = model(X).logits
    plain = ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-5").eval()
    assert not any(isinstance(m, CrossIterationMixin) for m in plain.modules())
    assert torch.equal(plain(X).logits, expected)
    folded = cbn.fold(model, example_input=X)
    torch.testing.assert_close(folded(X).logits, expected, rtol=1e-5, atol=1e-5)
    cbn.revert(model).save_pretrained(tmp_path / "plain")
    assert torch.equal(ResNetForImageClassification.from_pretrained(tmp_path / "plain").eval()(X).logits, expected)


def test_what_model_init_makes_is_converted(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*images(24, 32), strict=True)]
    run = Trainer(model_init=resnet, args=arguments, train_dataset=data, callbacks=[CbnCallback()])
    run.train()
    assert any(isinstance(m, CrossIterationMixin) for m in run.model.modules())


def test_resume_with_another_window_is_one_sentence(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    with pytest.raises(cbn.CbnError, match="was trained with Window"):
        trainer(tmp_path, callbacks=[CbnCallback(window=4)]).train(resume_from_checkpoint=True)


def resumed_and_not(rank: int, folder: Path) -> None:
    whole = trainer(folder, ddp_backend="gloo")
    whole.train()
    resumed = trainer(folder, ddp_backend="gloo")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    stem = next(m for m in whole.model.modules() if isinstance(m, CrossIterationMixin))
    patches = stem.history_state()["sources"][0]["slots"]["patch_mean"]
    torch.save((different(everything(whole.model), everything(resumed.model)), patches), folder / f"{rank}.pt")


@pytest.mark.xdist_group("distributed")
def test_two_processes_resume_each_with_its_own_window(tmp_path: Path) -> None:
    two_processes(resumed_and_not, tmp_path)
    (differ, patches), (differ_too, other_patches) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert differ == differ_too == []
    assert not torch.equal(patches, other_patches)
