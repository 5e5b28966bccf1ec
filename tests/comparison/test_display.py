"""What a user sees while a comparison runs."""

from __future__ import annotations

import pytest

from cbn_convert.comparison import display
from cbn_convert.comparison.display import Display
from cbn_convert.comparison.plan import Cell

A, B, C = (Cell("bn", size, 0.01, 0) for size in (1, 2, 4))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its only number."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def left(shown: Display) -> str:
    return str(shown.bar.tasks[0].fields["left"])


def test_the_time_left_counts_by_batch_size(clock: list[float]) -> None:
    shown = Display(quiet=True, jobs=1)
    shown.update(0, {A: 1.0, B: 1.0}, 100)
    assert left(shown) == ""  # nothing is known yet
    shown.begin(A, 0.0)
    clock[0] = 200.0
    assert shown.end(A, 100, "") == 200.0
    shown.update(1, {B: 0.5}, 100)
    assert left(shown) == "at least 2 min left"  # half of what the other batch size took
    shown.begin(B, 0.5)
    clock[0] = 220.0
    shown.end(B, 100, "")  # 20 s for one half: 40 s for all
    other = Cell("cbn", 2, 0.01, 0)
    shown.update(2, {other: 1.0}, 100)
    assert left(shown) == "at least 40 s left"
    shown.update(2, {other: 1.0, C: 1.0}, 100)  # of 4 nothing is known: the mean of 2 s and 0.4 s an image
    assert left(shown) == "at least 3 min left"
    assert shown.bar.tasks[0].completed == pytest.approx(0.5)
    two = Display(quiet=True, jobs=2)
    two.rates = {2: [72.0]}
    two.update(2, {other: 1.0}, 200)
    assert left(two) == "at least 2.0 h left"


def test_lines_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Display(quiet=False, jobs=1) as shown:
        shown.begin(A, 0.0)
        clock[0] = 1.0
        shown.end(A, 10, "bn: no [/such] tag")
    assert capsys.readouterr().err == "bn: no [/such] tag\n"
    with Display(quiet=True, jobs=1) as shown:
        shown.line("nothing")
    assert capsys.readouterr().err == ""
