"""What the settings of a window may be, and what the keywords that people use mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cbn_convert.norm import CrossIterationBatchNorm2d, Window, window_of


@pytest.mark.parametrize(
    ("window", "keywords", "expected"),
    [
        (None, {}, Window()),
        (8, {}, Window(history="ring", size=8, every=1, positions=None)),
        (1, {}, Window(history="ring", size=1, every=1, positions=None)),
        (None, {"history": "ring"}, Window(history="ring", size=8, every=1, positions=None)),
        (None, {"history": "ema", "gradient": "current"}, Window(gradient="current")),
        (300, {"history": "ema"}, Window(size=300)),
        (None, {"compensation": "taylor", "gradient": "current"}, Window.PAPER),
        (8, {"history": "ring", "compensation": "taylor", "gradient": "current"}, Window.PAPER),
        (None, {"burn_in": 5}, Window(history="ring", size=8, every=1, positions=None, burn_in=5)),
        (None, {"compensation": "none"}, Window(compensation="none")),
        (None, {"start": "empty"}, Window(start="empty")),
        (None, {"moments_every": 4, "moments_positions": None}, Window(every=4, positions=None)),
        (Window(size=99), {"sync": True}, Window(size=99, sync=True)),
    ],
)
def test_keywords(window: Any, keywords: Any, expected: Window) -> None:
    assert window_of(window, keywords) == expected


@pytest.mark.parametrize(
    ("window", "keywords", "message"),
    [
        (0, {}, "window must be an integer of at least 1, got 0"),
        (2.5, {}, "window must be an integer of at least 1, got 2.5"),
        (True, {}, "window must be an integer of at least 1, got True"),
        (None, {"compensation": "guess"}, "compensation must be one of projection, taylor, none, got 'guess'"),
        (None, {"gradient": "half"}, "gradient must be one of full, current, straight_through, got 'half'"),
        (None, {"history": "list"}, "history must be one of ema, ring, got 'list'"),
        (None, {"burn_in": -1}, "burn_in must be an integer of at least 0"),
        (None, {"burn_in": 3, "history": "ema"}, 'burn_in=3 needs history="ring"'),
        (None, {"compensation": "taylor", "history": "ema"}, "compensation='taylor' needs history=\"ring\""),
        (None, {"gradient": "straight_through"}, "gradient='straight_through' needs history=\"ring\""),
        (4096, {}, "window=4096 could be images or iterations"),
        (8, {"moments_every": 8}, 'moments_every=8 needs history="ema"'),
        (8, {"start": "running"}, "start='running' needs history=\"ema\""),
        (None, {"moments_every": 0}, "moments_every must be an integer of at least 1, got 0"),
        (None, {"moments_positions": 0}, "moments_positions must be an integer of at least 1, got 0"),
        (None, {"sync": 1}, "sync must be True or False, got 1"),
        (None, {"windows": 3}, "unknown argument 'windows'"),
        (Window(), {"gradient": "full"}, "gradient is a part of the Window that is given"),
    ],
)
def test_what_is_refused(window: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        window_of(window, keywords)


def test_a_window_cannot_be_changed_and_is_compared_by_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window().size = 3  # type: ignore[misc]
    assert Window(size=3, history="ring") == Window("ring", 3)


def test_a_layer_takes_a_window_or_the_keywords() -> None:
    assert CrossIterationBatchNorm2d(4).window == window_of(8, {"history": "ring"})
    assert CrossIterationBatchNorm2d(4, window=Window.PAPER).window == Window.PAPER
    assert CrossIterationBatchNorm2d(4, 1e-3, window=3, compensation="taylor").window.size == 3
