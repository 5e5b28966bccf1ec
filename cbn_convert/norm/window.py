"""What a layer normalises by, as one object: `Window`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypedDict, get_args, get_type_hints

HistoryKind = Literal["ema", "ring"]
Compensation = Literal["projection", "taylor", "none"]
Gradient = Literal["full", "current", "straight_through"]
Start = Literal["running", "empty"]

CARRIED_IMAGES = 8192
RING_ITERATIONS = 8  # the paper's
# Above it, a number without a kind could be meant as images or as iterations, each of which keeps a copy of weights.
MOST_ITERATIONS = 64


class WindowKeywords(TypedDict, total=False):
    """The settings of a window one by one, as `convert` and the layers take them; see `Window`."""

    history: HistoryKind | None
    compensation: Compensation
    gradient: Gradient
    burn_in: int
    start: Start | None
    sync: bool
    moments_every: int | None
    moments_positions: int | None


@dataclass(frozen=True)
class Window:
    """The statistics that a layer normalises by in training.

    Args:
        history: "ema", the carried window: the running statistics, following the weights in every step and the images
            as an exponential average; or "ring", the paper's: the last iterations, each as it was.
        size: images that an exponential average remembers; or iterations of a ring, the current one included.
        compensation: how statistics of the past follow the weights: "projection", "taylor" (the paper's, for a ring)
            or "none".
        gradient: "full" backpropagates through what follows the weights too, "current" (the paper's code) does not;
            "straight_through" gives the current batch the whole gradient of a ring.
        burn_in: iterations at the start in which a ring holds the current batch alone.
        start: "running" carries the running statistics on, unless they are a new layer's; with "empty" every layer is
            taken for a new one, which averages its batches (`NewLayerWindow`).
        every: steps of a layer of which one looks at its batch ("ema"); None for statistics that stay as they are.
        positions: about so many positions of the output, of which the input patches are measured; None for all.
        sync: batches are looked at over all ranks of torch.distributed's default group.

    Raises ValueError, naming the argument and what it may be, for what is out of range or does not go together.
    """

    history: HistoryKind = "ema"
    size: int = CARRIED_IMAGES
    compensation: Compensation = "projection"
    gradient: Gradient = "full"
    burn_in: int = 0
    start: Start = "running"
    every: int | None = 8
    positions: int | None = 512
    sync: bool = False

    PAPER: ClassVar[Window]
    TUNE: ClassVar[Window]  # frozen BN that trains folded, the "Tune mode" of arXiv 2305.11624

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            allowed = get_args(kind)
            if allowed and isinstance(allowed[0], str) and getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("size", 1), ("burn_in", 0), ("every", 1), ("positions", 1)):
            value = getattr(self, name)
            if value is None and (name == "positions" or (name == "every" and self.compensation == "none")):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                known = {"size": "window", "every": "moments_every", "positions": "moments_positions"}.get(name, name)
                raise ValueError(f"{known} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.sync, bool):
            raise ValueError(f"sync must be True or False, got {self.sync!r}")
        if self.history == "ema":
            for name, plain in (("burn_in", 0), ("compensation", "projection"), ("gradient", "full")):
                value = getattr(self, name)
                if value in ("taylor", "straight_through") or (name == "burn_in" and value != plain):
                    raise ValueError(f'{name}={value!r} needs history="ring"; the carried window has no such form')

    @property
    def is_carried(self) -> bool:
        """Whether it is the carried window, of images."""
        return self.history == "ema"

    @property
    def is_fixed(self) -> bool:
        """Whether the statistics stay as they are, those of a new layer too."""
        return self.every is None

    def without_weight(self) -> Window:
        """A ring of a layer whose statistics no weight explains: a short one, with the gradient of the whole."""
        if self.is_carried or self.compensation == "none" or self.gradient != "full":
            return self
        return replace(self, size=min(self.size, 2), gradient="straight_through")

    def __str__(self) -> str:
        if self.is_fixed:
            return "fixed statistics"
        what = f"{self.size} images" if self.is_carried else f"{self.size} iterations"
        return f"{what}, {self.compensation}, gradient {self.gradient}"


Window.PAPER = Window(
    history="ring", size=RING_ITERATIONS, compensation="taylor", gradient="current", every=1, positions=None
)
Window.TUNE = Window(compensation="none", every=None)


def window_of(window: Window | int | None, keywords: WindowKeywords) -> Window:
    """The `Window` that the keywords describe.

    A number means iterations of a ring, as in the paper, or images with history "ema". Without a `history`, what only a
    ring has, a number of iterations, "taylor" or burn_in, makes it one. Raises ValueError as `Window` does, for a
    keyword that is unknown, and for a number that could be meant in two ways.
    """
    if odd := sorted(set(keywords) - set(WindowKeywords.__annotations__)):
        raise ValueError(f"unknown argument {odd[0]!r}; known are {', '.join(WindowKeywords.__annotations__)}")
    if isinstance(window, Window):
        if besides := [name for name, value in keywords.items() if value is not None and name != "sync"]:
            raise ValueError(f"{besides[0]} is a part of the Window that is given; set it there")
        return replace(window, sync=window.sync or keywords.get("sync", False))
    given: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    history = given.pop("history", None)
    if history is None:
        ring = window is not None or given.get("compensation") == "taylor" or bool(given.get("burn_in"))
        if ring and isinstance(window, int) and window > MOST_ITERATIONS:
            raise ValueError(
                f'window={window} could be images or iterations; add history="ema" for the carried window of so many '
                'images, or history="ring" for iterations, each of which keeps a copy of the conv weights'
            )
        history = "ring" if ring else "ema"
    ring = history == "ring"
    every, positions = given.pop("moments_every", None), keywords.get("moments_positions", None if ring else 512)
    given.pop("moments_positions", None)
    for name, value, only in (("moments_every", every or 1, 1), ("start", given.get("start", "empty"), "empty")):
        if ring and value != only:
            raise ValueError(f'{name}={value!r} needs history="ema"; a ring holds iterations, each as it was')
    return Window(
        history=history,
        size=window if window is not None else RING_ITERATIONS if ring else CARRIED_IMAGES,
        every=1 if ring else 8 if every is None else every,
        positions=positions,
        **given,
    )
