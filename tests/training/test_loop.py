"""The training loop: it learns, it resumes, it stops with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.runs import config
from timm.scheduler import CosineLRScheduler

import cbn_convert as cbn
from cbn_convert.errors import RunError
from cbn_convert.training import load_run
from cbn_convert.training.checkpoint import checkpoints
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.metrics import read_metrics


@pytest.mark.parametrize("norm", ["cbn", "bn", "frozen", "gn", "brn"])
def test_a_run_learns_and_leaves_what_is_promised(norm: str, colors: Path, tmp_path: Path) -> None:
    settings = config(colors, tmp_path / "run", norm=norm)
    result = cbn.finetune(settings, quiet=True)
    # GroupNorm has no pretrained statistics to build on in 32 steps, and BN learns from two images or does not
    assert norm in ("gn", "bn") or result.best_top1 > 90
    assert result.steps == 32
    run = tmp_path / "run"
    stored = json.loads((run / "config.json").read_text())
    assert stored["classes"] == ["blue", "red"]
    assert stored["config"]["norm"] == norm
    assert FinetuneConfig.of_run(run) == settings
    records = read_metrics(run)
    assert [r["step"] for r in records if r["event"] == "eval"] == [16, 32]
    assert [r["step"] for r in records if r["event"] == "train"] == [16, 20, 32]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoints(run)] == ["step-00000032", "step-00000016"]
    assert cbn.evaluate(run, str(colors), device="cpu").top1 == pytest.approx(result.best_top1)
    card = (run / "best/README.md").read_text()
    assert ("timm.create_model" in card) == (norm != "gn")
    if norm != "gn":
        model = timm.create_model(f"local-dir:{run}/best", pretrained=True)
        assert model.num_classes == 2


def test_warm_up_runs_before_the_first_update(colors: Path, tmp_path: Path, monkeypatch) -> None:
    from cbn_convert.training import loop

    lengths = []
    original = loop.warm_up

    def spy(model, batches):
        original(model, batches)
        lengths.append({m._sources[0].state.seen for m in model.modules() if hasattr(m, "_sources")})

    monkeypatch.setattr(loop, "warm_up", spy)
    cbn.finetune(config(colors, tmp_path / "run", history="ring"), quiet=True)
    assert lengths == [{3}]


def test_the_head_starts_at_zero_and_the_rate_rises_then_falls(colors: Path, tmp_path: Path, monkeypatch) -> None:
    from cbn_convert.training import runs

    heads, rates = [], []
    build, step_update = runs.build, CosineLRScheduler.step_update

    def spy_build(*args, **kwargs):
        built = build(*args, **kwargs)
        heads.append(built.model.get_classifier().weight.detach().clone())
        return built

    def spy_step(self, number):
        step_update(self, number)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(runs, "build", spy_build)
    monkeypatch.setattr(CosineLRScheduler, "step_update", spy_step)
    cbn.finetune(config(colors, tmp_path / "run", warmup_ratio=0.25), quiet=True)
    assert torch.count_nonzero(heads[0]) == 0
    assert len(rates) == 32
    assert max(rates) == 0.01
    peak = rates.index(max(rates))
    assert peak == 8
    assert 0 < rates[0] < rates[peak - 1] < rates[peak]
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_same_seed_same_run(colors: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cbn.finetune(config(colors, tmp_path / name, seed=seed, epochs=1, no_aug=False), quiet=True)
        runs.append(load_run(tmp_path / name)[0].state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())
    assert not all(torch.equal(v, runs[2][k]) for k, v in runs[0].items())


def test_max_steps_and_best(colors: Path, tmp_path: Path) -> None:
    result = cbn.finetune(config(colors, tmp_path / "run", epochs=5, max_steps=20), quiet=True)
    assert result.steps == 20
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["event"] == "eval"] == [16, 20]
    assert result.best_top1 == max(r["top1"] for r in read_metrics(tmp_path / "run") if r["event"] == "eval")


def test_a_loss_that_is_not_finite_stops_the_run(colors: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no longer finite at step 2 with lr .* lower --lr"):
        cbn.finetune(config(colors, tmp_path / "run", norm="frozen", lr=1e6), quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "ln"}, "norm must be one of cbn, bn, frozen, tune, gn, brn"),
        ({"opt": "lion", "lr": None}, "lr has no automatic value"),
        ({"opt": "lam"}, "another of timm's optimizers"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"window": 0}, "window must be"),
        ({"compensation": "guess"}, "projection"),
        ({"val_fraction": 1.5}, "val_fraction"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"epochs": "ten"}, "epochs must be of type int"),
        ({"mixup": 0.2, "batch_size": 1}, "batch_size must be even"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_arguments_out_of_range(change: dict, message: str, colors: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=message):
        cbn.finetune(config(colors, tmp_path / "run", **change), quiet=True)
    assert not (tmp_path / "run").exists()


def test_damaged_settings(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cbn.finetune(config(colors, run, max_steps=1), quiet=True)
    with pytest.raises(RunError, match="is not empty"):
        cbn.finetune(config(colors, run), quiet=True)
    stored = json.loads((run / "config.json").read_text())
    for change, message in (({"widow": 3}, "unknown here"), ({"window": "3"}, "window must be of type int")):
        (run / "config.json").write_text(json.dumps({**stored, "config": {**stored["config"], **change}}))
        with pytest.raises(RunError, match=message):
            FinetuneConfig.of_run(run)
    (run / "config.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        FinetuneConfig.of_run(run)
    with pytest.raises(RunError, match="is not a run folder"):
        FinetuneConfig.of_run(tmp_path)


def test_no_gradient_is_longer_than_clip_grad(colors: Path, tmp_path: Path, monkeypatch) -> None:
    lengths = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        lengths.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    for limit in (0.01, 0.0):
        cbn.finetune(config(colors, tmp_path / f"run{limit}", clip_grad=limit, max_steps=6), quiet=True)
    assert max(lengths[:6]) <= 0.0101
    assert max(lengths[6:]) > 0.02


def test_automatic_rates_grow_with_the_root_of_the_images_per_update() -> None:
    settings = {"data": "d", "model": "m", "output": "o"}
    assert cbn.FinetuneConfig(**settings).peak_lr() == 3e-3
    assert cbn.FinetuneConfig(**settings, opt="adamw").peak_lr() == 3e-4
    assert cbn.FinetuneConfig(**settings, batch_size=4, accumulate=2).peak_lr(ranks=4) == pytest.approx(4 * 3e-3)
    assert cbn.FinetuneConfig(**settings, norm="frozen").peak_lr() == pytest.approx(3e-3 / 10**0.5)
    assert cbn.FinetuneConfig(**settings, norm="frozen", lr=1e-2).peak_lr() == 1e-2
    assert cbn.FinetuneConfig(**settings, opt="adamw", batch_size=8, lr=1e-2).peak_lr(ranks=4) == 1e-2
    assert cbn.FinetuneConfig(**settings).summary(ranks=4)["lr"] == cbn.FinetuneConfig(**settings).peak_lr(ranks=4)
