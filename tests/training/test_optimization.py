"""Which weights learn, at which rate, and that the others stay bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.runs import config
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.errors import RunError
from cbn_convert.training import load_run, runs
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.optimization import freeze, frozen_modules, make_optimizer, make_scheduler

CONFIG = FinetuneConfig("d", "m", "o", lr=0.5)


def frozen_parameters(name: str, parts: str) -> set[str]:
    model = timm.create_model(name)
    freeze(model, frozen_modules(model, parts))
    return {key for key, p in model.named_parameters() if not p.requires_grad}


def starting_with(name: str, *prefixes: str) -> set[str]:
    return {key for key, _ in timm.create_model(name).named_parameters() if key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("name", "parts", "prefixes"),
    [
        ("resnet18", "stem", ["conv1.", "bn1."]),
        ("resnet18", "stage1", ["layer1."]),
        ("resnet18", " stem, stage2 ,", ["conv1.", "bn1.", "layer2."]),
        ("resnet18", "layer1.*", ["layer1."]),
        ("resnet18", "layer3", ["layer3."]),
        ("resnet18", "layer[12].0.conv?,fc", [f"layer{n}.0.conv{k}." for n in (1, 2) for k in (1, 2)] + ["fc."]),
        ("mobilenetv2_035", "stem", ["conv_stem.", "bn1."]),
        ("mobilenetv2_035", "stage2", ["blocks.1."]),
        ("mobilenetv2_035", "stem,blocks.[0-2].*", ["conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2."]),
        ("efficientnet_b0", "stem,stage1", ["conv_stem.", "bn1.", "blocks.0."]),
        ("efficientnet_b0", "stage7", ["blocks.6.", "conv_head.", "bn2."]),
    ],
)  # fmt: skip
def test_parts_are_those_of_timm_or_patterns(name: str, parts: str, prefixes: list[str]) -> None:
    expected = starting_with(name, *prefixes)
    assert expected
    assert frozen_parameters(name, parts) == expected


def test_nothing_is_frozen_without_a_part() -> None:
    model = timm.create_model("resnet18")
    for parts in (None, "", " , "):
        assert frozen_modules(model, parts) == []


@pytest.mark.parametrize(
    ("name", "stages"),
    [("resnet18", 4), ("mobilenetv2_035", 7), ("efficientnet_b0", 7)],
)
def test_a_part_that_is_not_there(name: str, stages: int) -> None:
    model = timm.create_model(name)
    known = ", ".join(["stem", *(f"stage{number}" for number in range(1, stages + 1))])
    with pytest.raises(RunError, match=f"has no part 'stage9'; it has {known}$"):
        frozen_modules(model, "stem,stage9")
    with pytest.raises(RunError, match=r"has no part 'head\.\*'; its modules are conv"):
        frozen_modules(model, "head.*")
    with pytest.raises(RunError, match="has no part 'stage1'; timm knows no stages of it"):
        frozen_modules(nn.Sequential(nn.Conv2d(3, 4, 3)), "stage1")
    with pytest.raises(RunError, match="freeze leaves no weight to train"):
        freeze(model, frozen_modules(model, "*"))


def run(data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[dict, dict]:
    """The state before training and that of the best model after it."""
    states: list[dict[str, Tensor]] = []
    build = runs.build

    def spy(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        states.append({k: v.clone() for k, v in built.model.state_dict().items()})
        return built

    monkeypatch.setattr(runs, "build", spy)
    # without zeros in the residual branches, so that four updates change every weight that learns
    settings = config(data, output, max_steps=4, lr=0.1, model_kwargs={"zero_init_last": False}, **changes)
    cbn.finetune(settings, quiet=True)
    return states[0], load_run(output)[0].state_dict()


def check_frozen(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    kinds = ("weight", "bias", "running_mean", "running_var")
    keys = [key for key in before if key.endswith(kinds)]
    frozen = {key for key in keys if key.startswith(("conv1.", "bn1.", "layer1."))}
    assert {key.rpartition(".")[2] for key in frozen} == set(kinds)
    assert {key for key in keys if torch.equal(before[key], after[key])} == frozen


@pytest.mark.parametrize("norm", ["cbn", "bn", "brn"])
def test_a_run_leaves_frozen_weights_and_statistics_as_they_are(
    norm: str, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_frozen(*run(colors, tmp_path / "run", monkeypatch, norm=norm, freeze="stem,stage1", weight_decay=0.1))


@pytest.mark.parametrize("changes", [{"recalibrate": 2}, {"ema": 0.5}])
def test_frozen_statistics_are_not_measured_anew(
    changes: dict[str, Any], colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_frozen(*run(colors, tmp_path / "run", monkeypatch, freeze="stem,stage1", weight_decay=0.1, **changes))


def test_freezing_with_group_norm_is_refused_at_once(colors: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="freeze"):
        cbn.finetune(config(colors, tmp_path / "run", norm="gn", freeze="stem", max_steps=1), quiet=True)
    assert not (tmp_path / "run").exists()


def rates(model: nn.Module, settings: FinetuneConfig, steps: int) -> list[dict[str, float]]:
    """The rate of each parameter at each update."""
    optimizer = make_optimizer(model, settings, settings.peak_lr())
    scheduler = make_scheduler(optimizer, settings, settings.peak_lr(), steps)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for step in range(steps):
        scheduler.step_update(step)
        found.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
    return found


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.2])
@pytest.mark.parametrize("sched", ["cosine", "linear", "constant"])
def test_schedules(sched: str, warmup_ratio: float) -> None:
    steps, warmup = 50, round(50 * warmup_ratio)
    got = rates(nn.Linear(2, 2), replace(CONFIG, sched=sched, warmup_ratio=warmup_ratio), steps)
    assert all(len(set(step.values())) == 1 for step in got)
    shape = {
        "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
        "linear": lambda part: 1 - part,
        "constant": lambda part: 1.0,
    }[sched]
    rising = [0.5 * (1 / warmup + (1 - 1 / warmup) * step / warmup) for step in range(warmup)]
    falling = [0.5 * shape(step / (steps - warmup)) for step in range(steps - warmup)]
    assert [step["weight"] for step in got] == pytest.approx(rising + falling)
    assert got[warmup]["weight"] == 0.5  # the peak, right after the warm-up
    assert min(step["weight"] for step in got) > 0


@pytest.mark.parametrize("sched", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2])
def test_schedules_of_a_step_or_two(sched: str, steps: int) -> None:
    got = rates(nn.Linear(2, 2), replace(CONFIG, sched=sched, warmup_ratio=0.9), steps)
    assert [step["weight"] for step in got] == pytest.approx([0.5] * steps)


@pytest.mark.parametrize("sched", ["cosine", "linear", "constant"])
def test_layer_decay_lowers_the_rate_layer_by_layer_through_the_whole_schedule(sched: str) -> None:
    settings = replace(CONFIG, sched=sched, warmup_ratio=0.25)
    plain = rates(timm.create_model("resnet18"), settings, 20)
    got = rates(timm.create_model("resnet18"), replace(settings, layer_decay=0.5), 20)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    order = ["conv1", *blocks, "fc"]
    for before, after in zip(plain, got, strict=True):
        assert before.keys() == after.keys()
        factors = {name: after[name] / before[name] for name in after}
        for place, layer in enumerate(order):
            own = {round(f, 9) for name, f in factors.items() if name.startswith(f"{layer}.")}
            assert own == {round(0.5 ** (len(order) - 1 - place), 9)}


@pytest.mark.parametrize("sched", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_head_learns_at_so_many_times_the_rate_through_the_whole_schedule(
    layer_decay: float | None, sched: str
) -> None:
    settings = replace(CONFIG, sched=sched, warmup_ratio=0.25, layer_decay=layer_decay)
    plain = rates(timm.create_model("test_resnet"), settings, 20)
    got = rates(timm.create_model("test_resnet"), replace(settings, head_lr_scale=3.0), 20)
    for before, after in zip(plain, got, strict=True):
        factors = {name: 3.0 if name.startswith("fc.") else 1.0 for name in before}
        assert after == pytest.approx({name: factors[name] * rate for name, rate in before.items()})


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("levit_128s", ("head.linear.", "head_dist.linear.")),  # distilled
        ("volo_d1_224", ("head.", "aux_head.")),  # get_classifier gives one of two
        ("caformer_s18", ("head.fc.fc2.",)),  # what is before it is pretrained
    ],
)
def test_the_head_is_what_depends_on_the_classes(name: str, prefixes: tuple[str, ...]) -> None:
    model = timm.create_model(name, num_classes=3)
    (got,) = rates(model, replace(CONFIG, head_lr_scale=3.0), 1)
    scaled = {key for key, rate in got.items() if rate == pytest.approx(1.5)}
    assert scaled == {key for key in got if key.startswith(prefixes)}
    assert got.keys() == {key for key, _ in model.named_parameters()}


def test_a_rate_of_its_own_for_a_head_that_does_not_learn(colors: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="head_lr_scale is for a classifier that learns"):
        cbn.finetune(config(colors, tmp_path / "run", freeze="fc", head_lr_scale=10.0), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"layer_decay": 0.5}, {"head_lr_scale": 4.0}, {}])
def test_a_run_reports_the_rate_without_the_factor_of_a_layer(
    changes: dict[str, float], colors: Path, tmp_path: Path
) -> None:
    given = config(colors, tmp_path / "run", lr=0.01, sched="constant", warmup_ratio=0.0, max_steps=2, **changes)
    cbn.finetune(given, quiet=True)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (logged,) = {e["lr"] for e in events if e["event"] == "train"}
    assert logged == pytest.approx(0.01)


def test_weight_decay_is_for_weights_only() -> None:
    model = timm.create_model("test_resnet")
    optimizer = make_optimizer(model, replace(CONFIG, weight_decay=0.01, layer_decay=0.8), 0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[id(p)] == (0.01 if p.ndim > 1 else 0) for p in model.parameters())


def test_sgd_is_nesterovs_and_adamw_is_torchs() -> None:
    sgd = make_optimizer(nn.Linear(2, 2), replace(CONFIG, momentum=0.7), 0.5)
    assert type(sgd) is torch.optim.SGD
    assert {(g["momentum"], g["nesterov"], g["lr"]) for g in sgd.param_groups} == {(0.7, True, 0.5)}
    adamw = make_optimizer(nn.Linear(2, 2), replace(CONFIG, opt="adamw"), 0.5)
    assert type(adamw) is torch.optim.AdamW


@pytest.mark.parametrize(("opt", "lr"), [("lamb", 0.02), ("lion", 5e-4)])
def test_another_of_timms_optimizers_trains(opt: str, lr: float, colors: Path, tmp_path: Path) -> None:
    result = cbn.finetune(config(colors, tmp_path / "run", opt=opt, lr=lr), quiet=True)
    assert result.best_top1 > 90


def test_an_optimizer_that_cannot_be_made_here() -> None:
    with pytest.raises(RunError, match="another of timm's optimizers, got 'sdg'"):
        make_optimizer(nn.Linear(2, 2), replace(CONFIG, opt="sdg"), 0.5)
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match=r"optimizer fusedadam cannot be made \(.*\); take sgd or adamw"):
            make_optimizer(nn.Linear(2, 2), replace(CONFIG, opt="fusedadam"), 0.5)
