"""What the arguments of a window may be."""

from __future__ import annotations

from .functional import COMPENSATIONS, GRADIENTS
from .history import HISTORIES, STARTS


def check_window_options(
    window: int,
    compensation: str,
    gradient: str,
    history: str,
    burn_in: int,
    moments_every: int = 1,
    moments_positions: int | None = None,
    start: str = "empty",
) -> None:
    """Raises ValueError, naming the argument and what it may be, unless all are valid."""
    numbers: list[tuple[str, int, int]] = [
        ("window", window, 1), ("burn_in", burn_in, 0), ("moments_every", moments_every, 1),
    ]  # fmt: skip
    if moments_positions is not None:
        numbers.append(("moments_positions", moments_positions, 1))
    for name, number, least in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if moments_every > 1 and history == "ring":
        raise ValueError(f'moments_every={moments_every} needs history="ema"; a ring keeps every iteration as it was')
    if start == "running" and history == "ring":
        raise ValueError('start="running" needs history="ema"; a ring holds iterations only')
    for name, value, allowed in (
        ("compensation", compensation, COMPENSATIONS),
        ("gradient", gradient, GRADIENTS),
        ("history", history, HISTORIES),
        ("start", start, STARTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
