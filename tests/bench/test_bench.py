"""The benchmark's own baselines and the command; times are looked at nowhere."""

from __future__ import annotations

import json

import pytest
import torch
from cbn_convert.cli.main import app
from helpers.reference import ReferenceCBN
from torch import nn

import cbn_convert as cbn
from benchmarks.speed.published import PublishedBatchNorm2d, use_published
from cbn_convert.bench import COLUMNS, StepSettings, bench_inference, bench_step
from cbn_convert.bench.steps import _model
from cbn_convert.errors import CbnError
from cbn_convert.norm import Window


def test_the_published_baseline_is_the_paper() -> None:
    """Its cost is only a fair comparison if it computes what the paper says."""
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    norm = PublishedBatchNorm2d(4).double()
    norm.bind(conv, 4)

    def apply(y, weight, bias):
        return nn.functional.conv2d(y, weight)

    reference = ReferenceCBN(apply, 4, 4, compensation="taylor", gradient="current")
    for _ in range(6):
        y = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        out, want = norm(conv(y)), reference(y, conv.weight, None, norm.weight, norm.bias)
        torch.testing.assert_close(out, want)
        direction = torch.randn_like(out)
        (got,) = torch.autograd.grad((out * direction).sum(), conv.weight)
        (expected,) = torch.autograd.grad((want * direction).sum(), conv.weight)
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            conv.weight += 0.05 * torch.randn_like(conv.weight)
    assert len(norm.past) == 3


def test_it_takes_the_place_of_the_norms_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "published", use_published)
    _, result = bench_step("test_resnet", ["published"], StepSettings(img_size=32), steps=2, untimed=1)
    weights = sum(p.numel() for p in cbn_convs()) * 4 / 1e6
    # μ, ν, two derivatives of the weights' size and the weights, for each of 3 steps so far
    assert result.history == pytest.approx(3 * 3 * weights, rel=0.3)


def test_every_column_runs_and_bn_is_the_measure() -> None:
    results = bench_step("test_resnet", list(COLUMNS), StepSettings(img_size=32), steps=2, untimed=1)
    assert [r.column for r in results] == list(COLUMNS)
    by_name = {r.column: r for r in results}
    assert by_name["bn"].over_bn == 1
    assert by_name["bn"].history == by_name["frozen"].history == 0
    weights = sum(p.numel() for p in cbn_convs()) * 4 / 1e6
    # p̄ and d, which all channels of a group share
    assert 0 < by_name["cbn"].history < 0.2 * weights
    assert by_name["cbn-paper"].history == pytest.approx(3 * weights, rel=0.3)
    assert all(r.memory > 0 for r in results)


def test_the_layers_are_those_of_fine_tuning() -> None:
    model = _model("test_resnet")
    plain = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in plain} == {0.1}
    cbn.convert(model)
    assert not any(m.is_new for m in plain)
    assert {m.window for m in plain} == {Window()}


def cbn_convs() -> list[nn.Parameter]:
    import timm

    model = timm.create_model("test_resnet", num_classes=10)
    cbn.convert(model)
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_folded_inference_is_compared_with_timm() -> None:
    milliseconds, ratio = bench_inference("test_resnet", StepSettings(img_size=32), steps=1)
    assert milliseconds > 0
    assert ratio > 0


def test_unknown_norm_is_one_sentence() -> None:
    with pytest.raises(CbnError, match=r"unknown norm 'layernorm'.*choose from bn, frozen"):
        bench_step("test_resnet", ["layernorm"], StepSettings(img_size=32), steps=1)


def test_one_value_per_channel_is_one_sentence() -> None:
    """test_resnet ends with one pixel at 32 px, of which one image has no variance."""
    with pytest.raises(CbnError, match=r"one value per channel.*; use a larger --batch-size"):
        bench_step("test_resnet", ["cbn"], StepSettings(batch_size=1, img_size=32), steps=1)


def test_command(capsys) -> None:
    arguments = ["--arch", "test_resnet", "--img-size", "32", "--steps", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as done:
        app(["bench", *arguments, "--norms", "cbn,cbn-paper", "--json"])
    assert not done.value.code
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [row["column"] for row in result["norms"]] == ["bn", "cbn", "cbn-paper"]
    assert "CBN as published" in err
    with pytest.raises(SystemExit) as done:
        app(["bench", *arguments, "--norms", "nonsense"])
    assert done.value.code == 1
    assert "unknown norm 'nonsense'" in capsys.readouterr().err
