"""What the table that one chooses by says to take."""

from __future__ import annotations

import pytest

from benchmarks.documents.choose import Case, advice
from cbn_convert.comparison.summary import Row


def row(top1: float, std: float) -> Row:
    return Row("cbn", 2, 0.01, False, top1, std, seeds=3, failed=0, failure=None, step_seconds=None, peak_memory=None)


def case(apart: float, std: float) -> Case:
    """CBN ahead by so much, with the same scatter in both."""
    return Case("detection", 2, "", True, row(50 + apart, std), row(50, std), "frozen BN", None)


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([case(5, 1)], "CBN"),
        ([case(5, 9)], "CBN or frozen BN"),
        ([case(-5, 9)], "frozen BN or CBN"),
        ([case(-5, 1)], "frozen BN"),
        ([case(0.6, 0.1), case(-3, 9)], "frozen BN or CBN"),  # clearly ahead once, behind in the mean
        ([case(-0.6, 0.1), case(3, 9)], "CBN or frozen BN"),
    ],
)
def test_what_is_clear_and_the_mean_must_agree(cases: list[Case], expected: str) -> None:
    assert advice(cases) == expected
