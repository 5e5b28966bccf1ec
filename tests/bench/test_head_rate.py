"""The study in which the head learns at a rate of its own."""

from __future__ import annotations

import pytest
import timm

from benchmarks.study.head_rate import best_rate, scale_head
from cbn_convert import FinetuneConfig
from cbn_convert.training import optimization


def test_the_head_learns_at_so_many_times_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "create_optimizer_v2", optimization.create_optimizer_v2)  # put back at the end
    scale_head(10.0)
    model = timm.create_model("test_resnet", num_classes=4)
    config = FinetuneConfig(data="-", model="test_resnet", output="-", weight_decay=1e-4)
    optimizer = optimization.make_optimizer(model, config, 0.01)
    schedule = optimization.make_scheduler(optimizer, config, 0.01, 100)
    head = {id(p) for p in model.get_classifier().parameters()}
    for update in (0, 5, 50, 99):
        schedule.step_update(update)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {id(p) for p in model.parameters()}
        (of_head,) = {rates[p] for p in head}
        (of_rest,) = {rate for p, rate in rates.items() if p not in head}
        assert of_head == pytest.approx(10 * of_rest)
        assert of_rest <= 0.01
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decayed} == {id(p) for p in model.parameters() if p.dim() > 1}


def test_the_rate_is_chosen_by_validation_and_the_first_seed() -> None:
    at = {"subject": "hands", "norm": "cbn", "factor": 1.0, "seed": 0}
    cells = [
        {**at, "lr": 0.001, "top1": 60.0, "test_top1": 90.0},
        {**at, "lr": 0.003, "top1": 70.0, "test_top1": 50.0},
        {**at, "lr": 0.01, "error": "diverged"},
        {**at, "lr": 0.0003, "top1": 99.0, "seed": 1},
        {**at, "lr": 0.0003, "top1": 99.0, "norm": "frozen"},
    ]
    assert best_rate(cells, "hands", "cbn", 1.0) == 0.003
    assert best_rate(cells, "hands", "cbn", 10.0) is None
