"""What single settings of a run do, against an independent account of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from helpers.runs import config
from safetensors.torch import load_file
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.errors import ModelError, RunError
from cbn_convert.norm import CrossIterationMixin
from cbn_convert.training import checkpoint, loop
from cbn_convert.training.learner import Learner
from cbn_convert.training.metrics import read_metrics


def weights(run: Path) -> dict[str, Tensor]:
    loaded = checkpoint.load(run)
    assert loaded is not None
    return loaded[0]["model"]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that are made."""
    made: list[Any] = []
    init = loop.Trainer.__init__

    def spy(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(loop.Trainer, "__init__", spy)
    return made


def test_accumulated_steps_are_one_large_step(colors: Path, tmp_path: Path) -> None:
    """With statistics that do not depend on the batch."""
    common = {"norm": "frozen", "max_steps": 5, "label_smoothing": 0.0}
    cbn.finetune(config(colors, tmp_path / "large", batch_size=4, **common), quiet=True)
    cbn.finetune(config(colors, tmp_path / "small", batch_size=1, accumulate=4, **common), quiet=True)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)
    assert any("weight" in name and value.std() > 0 for name, value in large.items())


def floats(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def test_the_average_of_weights_and_statistics_is_what_is_evaluated(
    colors: Path, tmp_path: Path, trainers, monkeypatch
) -> None:
    averages: list[dict[str, Tensor]] = []
    step = Learner.step_unless_bad

    def spy(self: Any) -> Tensor:
        if not averages:
            averages.append({k: v.detach().double().clone() for k, v in floats(self.model).items()})
        number = self.updates
        result = step(self)
        decay = 0.0 if number < 2 else min(0.5, 1 - number ** (-2 / 3))  # timm's warm-up, never above what was asked
        for k, v in floats(self.model).items():
            averages[0][k] = decay * averages[0][k] + (1 - decay) * v.detach().double()
        return result

    monkeypatch.setattr(Learner, "step_unless_bad", spy)
    cbn.finetune(config(colors, tmp_path / "run", ema=0.5, max_steps=9), quiet=True)
    best, last = load_file(tmp_path / "run/best/model.safetensors"), weights(tmp_path / "run")
    for name, value in averages[0].items():
        torch.testing.assert_close(best[name].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(best["layer1.0.conv1.weight"], last["layer1.0.conv1.weight"])
    means = [name for name in best if name.endswith("running_mean")]
    assert not any(torch.equal(best[name], last[name]) for name in means)
    assert not [
        m
        for m in trainers[0].learner.ema.module.modules()
        if isinstance(m, CrossIterationMixin) and m.history_tensors()
    ]


@pytest.mark.parametrize(("norm", "batches"), [("cbn", 0), ("frozen", 0), ("bn", 32), ("brn", 32)])
def test_an_average_is_recalibrated_for_norms_that_train_with_a_batchs_statistics(norm: str, batches: int) -> None:
    settings = {"data": "d", "model": "m", "output": "o", "norm": norm}
    assert cbn.FinetuneConfig(**settings, ema=0.9).recalibration_batches == batches
    assert cbn.FinetuneConfig(**settings).recalibration_batches == 0
    assert cbn.FinetuneConfig(**settings, ema=0.9, recalibrate=3).recalibration_batches == 3


@pytest.mark.parametrize("norm", ["cbn", "bn", "frozen", "brn"])
def test_statistics_are_measured_anew_on_training_images(norm: str, colors: Path, tmp_path: Path) -> None:
    from timm.models import create_model

    from cbn_convert.training.loading import plain_loader
    from cbn_convert.training.splits import read_splits

    settings = config(colors, tmp_path / "run", norm=norm, max_steps=4, recalibrate=4)
    cbn.finetune(settings, quiet=True)
    best, last = load_file(tmp_path / "run/best/model.safetensors"), weights(tmp_path / "run")
    assert torch.equal(best["conv1.0.weight"], last["conv1.0.weight"])
    model = create_model(f"local-dir:{tmp_path}/run/best", pretrained=True).eval()
    training, _ = read_splits(str(colors), None, 0)
    data_config = json.loads((tmp_path / "run/config.json").read_text())["data_config"]
    images = torch.cat([batch.images for batch in plain_loader(training, data_config, 8, 0)])
    with torch.no_grad():
        first = model.conv1[0](images).double()
    mean, var = first.mean((0, 2, 3)), first.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(best["conv1.1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(best["conv1.1.running_var"].double(), var, rtol=1e-4, atol=1e-5)


def test_evaluations_every_so_many_updates_and_an_early_stop(colors: Path, tmp_path: Path) -> None:
    settings = config(colors, tmp_path / "run", epochs=9, eval_every=5, patience=3, lr=0.05)
    result = cbn.finetune(settings, quiet=True)
    evals = [r for r in read_metrics(tmp_path / "run") if r["event"] == "eval"]
    assert [r["step"] for r in evals] == list(range(5, result.steps + 1, 5))
    best = max(range(len(evals)), key=lambda i: evals[i]["top1"])
    assert len(evals) == best + 1 + 3
    assert result.stopped_early
    assert result.best_step == evals[best]["step"]


def test_results_tell_what_is_taken_for_what(colors: Path, tmp_path: Path) -> None:
    result = cbn.finetune(config(colors, tmp_path / "run"), quiet=True)
    stored = json.loads((tmp_path / "run/results.json").read_text())
    assert stored["top1"] == result.best_top1
    assert stored["classes"] == ["blue", "red"]
    assert [sum(row) for row in stored["confusion"]] == [6, 6]
    assert stored["per_class"] == [100 * stored["confusion"][i][i] / 6 for i in (0, 1)]


def test_mixed_precision(colors: Path, tmp_path: Path, monkeypatch) -> None:
    seen: set[torch.dtype] = set()
    forward = nn.Conv2d.forward

    def spy(self: nn.Conv2d, x: Tensor) -> Tensor:
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        seen.clear()
        result = cbn.finetune(
            config(colors, tmp_path / precision, mixed_precision=precision, max_steps=8, recalibrate=1), quiet=True
        )
        assert dtype in seen
        assert (torch.bfloat16 in seen) == (precision == "bf16")
        assert result.last_top1 > 50
        assert all(v.dtype != torch.bfloat16 for v in weights(tmp_path / precision).values())
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="mixed_precision 'fp16' needs a GPU, the device is cpu"):
            cbn.finetune(config(colors, tmp_path / "fp16", mixed_precision="fp16"), quiet=True)


def test_memory_formats_and_checkpointing_and_compilation_compute_the_same(
    colors: Path, tmp_path: Path, trainers, monkeypatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    common = {"max_steps": 4, "norm": "cbn"}
    cbn.finetune(config(colors, tmp_path / "plain", **common), quiet=True)
    expected = weights(tmp_path / "plain")
    for option in ("channels_last", "grad_checkpointing", "compile"):
        cbn.finetune(config(colors, tmp_path / option, **{option: True}, **common), quiet=True)
        for name, value in weights(tmp_path / option).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    assert trainers[1].model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert trainers[2].model.grad_checkpointing
    assert hasattr(trainers[3].learner.wrapped, "_orig_mod")


def test_drop_path_and_what_a_model_does_not_have(colors: Path, tmp_path: Path, trainers) -> None:
    cbn.finetune(config(colors, tmp_path / "run", drop_path=0.3, max_steps=2), quiet=True)
    rates = [m.drop_prob for m in trainers[0].model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)
    about = json.loads((tmp_path / "run/best/config.json").read_text())
    assert "drop_path_rate" not in about.get("model_args", {})
    with pytest.raises(ModelError, match="drop_path_rate"):
        cbn.finetune(config(colors, tmp_path / "x", model="dla46_c", drop_path=0.3), quiet=True)


@pytest.mark.filterwarnings("ignore:`log_with=tensorboard` was passed")
def test_any_tracker_of_accelerate(colors: Path, tmp_path: Path, monkeypatch) -> None:
    from accelerate import tracking

    logged: list[tuple[int, dict[str, float]]] = []

    class Memory(GeneralTracker):
        name = "memory"
        requires_logging_directory = False

        def __init__(self, run_name: str, **kwargs: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            logged.append((-1, values))

        @on_main_process
        def log(self, values: dict[str, float], step: int, **kwargs: Any) -> None:
            logged.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    cbn.finetune(config(colors, tmp_path / "run", tracker="memory", max_steps=5), quiet=True)
    assert logged[0][1]["window"] == "4"
    records = read_metrics(tmp_path / "run")
    assert [step for step, _ in logged[1:]] == [r["step"] for r in records] == [5, 5]
    assert logged[1][1]["train/loss"] == records[0]["loss"]
    assert logged[2][1]["eval/top1"] == records[1]["top1"]
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(RunError, match="tracker 'tensorboard' is not installed"):
        cbn.finetune(config(colors, tmp_path / "x", tracker=LoggerType.TENSORBOARD.value), quiet=True)
    with pytest.raises(RunError, match="tracker 'notes' does not work here"):
        cbn.finetune(config(colors, tmp_path / "x", tracker="notes"), quiet=True)
    assert not (tmp_path / "x").exists()
