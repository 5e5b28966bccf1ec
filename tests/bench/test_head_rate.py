"""The study in which the head learns at a rate of its own."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.study.head_rate import FACTORS, FIRST, RATES, best_factor, best_rate, searched


def test_the_rate_is_chosen_by_validation_and_the_first_seed() -> None:
    at = {"subject": "hands-v1", "norm": "cbn", "factor": 1.0, "seed": 0}
    cells = [
        {**at, "lr": 0.001, "top1": 60.0, "test_top1": 90.0},
        {**at, "lr": 0.003, "top1": 70.0, "test_top1": 50.0},
        {**at, "lr": 0.01, "error": "diverged"},
        {**at, "lr": 0.0003, "top1": 99.0, "seed": 1},
        {**at, "lr": 0.0003, "top1": 99.0, "norm": "frozen"},
    ]
    assert best_rate(cells, "hands-v1", "cbn", 1.0) == 0.003
    assert best_rate(cells, "hands-v1", "cbn", 10.0) is None


def test_the_search_goes_on_beyond_a_best_rate_at_the_edge() -> None:
    cells: list[dict[str, Any]] = []
    for _ in range(9):
        todo = searched(cells, "hands-v1")
        cells += [{**cell, "top1": -abs(RATES.index(cell["lr"]) - 1)} for cell in todo]
    assert not searched(cells, "hands-v1")
    assert {c["lr"] for c in cells} == {*RATES[:4], *FIRST}
    assert best_rate(cells, "hands-v1", "frozen", 10.0) == RATES[1]
    assert len(cells) == len({tuple(c.items()) for c in cells}) == 6 * len({c["lr"] for c in cells})


def test_a_search_in_which_no_run_ends_well_ends() -> None:
    cells = [{**cell, "error": "diverged"} for cell in searched([], "hands-v1")]
    assert not searched(cells, "hands-v1")


@pytest.mark.parametrize(
    ("top1", "best"),
    [((70.0, 71.0, 71.5), 10.0), ((71.5, 71.5, 70.0), 1.0), ((70.0, 71.5, 71.5), 1.0), ((71.5, 70.0, 71.5), 0.1)],
)
def test_equal_factors_are_not_told_apart_by_the_test_photos(top1: tuple[float, ...], best: float) -> None:
    at = {"subject": "hands-v1", "norm": "cbn", "lr": 0.003, "seed": 0}
    cells = [{**at, "factor": f, "top1": t, "test_top1": 10 * f} for f, t in zip(FACTORS, top1, strict=True)]
    assert best_factor(cells, "hands-v1", "cbn") == best
