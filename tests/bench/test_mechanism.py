"""What is changed in the runs of benchmarks/study/mechanism.py."""

from __future__ import annotations

import pytest
import timm

from cbn_convert import FinetuneConfig
from cbn_convert.training import learner
from cbn_convert.training.optimization import make_scheduler

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("factor", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_beta_learns_at_so_many_times_the_rate(
    factor: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every update of a schedule, and γ and all else at the rate itself."""
    from benchmarks.study import mechanism

    monkeypatch.setattr(learner, "make_optimizer", learner.make_optimizer)
    model = timm.create_model("test_resnet", num_classes=3)
    settings = FinetuneConfig(model="test_resnet", data="-", output="-", weight_decay=weight_decay)
    mechanism.shift_rate(factor)
    optimizer = learner.make_optimizer(model, settings, 0.01)
    schedule = make_scheduler(optimizer, settings, 0.01, 20)
    shifts = {id(p) for name, p in model.named_parameters() if name.endswith("bias") and "fc" not in name}
    for update in range(20):
        schedule.step_update(update)
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert of.keys() == {id(p) for p in model.parameters()}
        (rate,) = {lr for p, lr in of.items() if p not in shifts}
        assert rate > 0
        assert [of[p] / rate for p in shifts] == pytest.approx([factor] * len(shifts))
