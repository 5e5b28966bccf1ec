"""Settings of a comparison. It needs no torch, so that --help answers at once."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import RunError
from ..training.config import FinetuneConfig
from ..training.settings import NORMS

# What `cbn:NAME` sets, by the setting that has NAME as a value.
VARIANTS = {
    "compensation": ("projection", "taylor", "none"),
    "gradient": ("full", "current"),
    "history": ("ring", "ema"),
    "start": ("running", "empty"),
}
NUMBERS = {"window": int, "burn_in": int}
OF_ANY_NORM = {"head_lr_scale": float}
GRID = ("norm", "batch_size", "lr")  # the settings of a run that the comparison sets itself
PLACE = ("data", "output", "workers", "device")  # say where it runs, not what it computes


@dataclass
class ComparisonConfig:
    """Arguments of `compare`.

    run: the settings that all cells share; its norm, batch size and rate are of no meaning, its seed is the first and
    its output the folder of the comparison. norms: names as in FinetuneConfig, also with a rate of its own for the
    head, as in "frozen:head_lr_scale=10", and variants of CBN, such as "cbn:taylor:window=8". lrs: peak learning rates
    to try; None searches around the automatic one until the best has a worse one on either side. images: training
    images that each run sees, None for those of `run.epochs`. seeds: runs at the best rate. reference: batch size of
    the BN that the others are measured against, 0 for none. jobs: cells at a time.
    """

    run: FinetuneConfig
    norms: tuple[str, ...] = ("bn", "frozen", "gn", "brn", "cbn")
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    lrs: tuple[float, ...] | None = None
    images: int | None = None
    seeds: int = 3
    reference: int = 32
    jobs: int = 1

    def check(self) -> None:
        """Raises RunError for the first setting that does not fit."""
        for name, values in (("norms", self.norms), ("batch sizes", self.batch_sizes), ("lrs", self.lrs)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise RunError(
                    f"the {name} must be different and at least one, got {','.join(map(str, values)) or '-'}"
                )
        for size in self.batch_sizes:
            if not isinstance(size, int) or size < 1:
                raise RunError(f"batch sizes must be whole numbers of at least 1, got {size!r}")
        for lr in self.lrs or ():
            if not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
                raise RunError(f"learning rates must be numbers above 0, got {lr!r}")
        for name, least in (("seeds", 1), ("jobs", 1), ("reference", 0), ("images", 1)):
            value = getattr(self, name)
            if not (value is None and name == "images") and (not isinstance(value, int) or value < least):
                raise RunError(f"{name} must be a whole number of at least {least}, got {value!r}")
        known: dict[str, str] = {}
        for norm in self.norms:
            if (other := known.setdefault(repr(self.cell(norm, 1, None, 0)), norm)) != norm:
                raise RunError(f"the norms {other} and {norm} are the same; leave one out")
        for norm, batch_size in self.columns:
            for seed in (self.run.seed, self.run.seed + self.seeds - 1):
                self.cell(norm, batch_size, self.lrs[0] if self.lrs else None, seed).check()
        for name in ("patience", "max_steps", "eval_every"):
            if getattr(self.run, name) is not None:
                what = "evaluations" if name == "eval_every" else "images"
                raise RunError(f"{name} would give runs of other batch sizes other numbers of {what}; leave it out")

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Norm and batch size of every column of the grid, the reference last."""
        columns = [(norm, size) for norm in self.norms for size in self.batch_sizes]
        reference = ("bn", self.reference)
        return columns if not self.reference or reference in columns else [*columns, reference]

    def cell(self, norm: str, batch_size: int, lr: float | None, seed: int) -> FinetuneConfig:
        """The settings of one run, but for its folder. Raises RunError for an unknown norm or variant.

        Args:
            norm: a name as in `norms`.
            batch_size: images per step.
            lr: the peak rate; None is a rule, as in `FinetuneConfig`.
            seed: that of the run.
        """
        settings = {f.name: getattr(self.run, f.name) for f in fields(FinetuneConfig)}
        settings |= {**read_norm(norm), "batch_size": batch_size, "lr": lr, "seed": seed}
        return FinetuneConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ComparisonConfig:
        """What `to_dict` gave, also after JSON. Raises RunError if it does not fit."""
        try:
            return cls(**{**with_tuples(stored), "run": FinetuneConfig(**with_tuples(stored["run"]))})
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(f"its settings do not fit this version ({error})") from error


def with_tuples(stored: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples in place of JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def read_norm(name: str) -> dict[str, Any]:
    """Settings that "bn" or "cbn:taylor:window=8" stands for. Raises RunError if it is unknown."""
    norm, *parts = name.split(":")
    if norm not in NORMS:
        raise RunError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    settings: dict[str, Any] = {"norm": norm}
    words = VARIANTS if norm == "cbn" else {}
    numbers = {**OF_ANY_NORM, **(NUMBERS if norm == "cbn" else {})}
    for part in parts:
        setting = next((setting for setting, values in words.items() if part in values), None)
        value: Any = part
        if setting is None:
            setting, _, text = part.partition("=")
            value = _number(numbers[setting], text) if setting in numbers else None
        if value is None:
            known = [*(v for values in words.values() for v in values), *(f"{key}=N" for key in numbers)]
            raise RunError(f"{name!r} has the unknown part {part!r}; {norm} can have {', '.join(known)}")
        if setting in settings:
            raise RunError(f"{name!r} sets {setting} twice; leave one out")
        settings[setting] = value
    return settings


def _number(kind: type, text: str) -> Any:
    """None for a text that is no number, or no whole one where that is wanted."""
    try:
        return kind(text) if re.fullmatch(r"[0-9]+" if kind is int else r"[0-9.]+(e-?[0-9]+)?", text) else None
    except ValueError:
        return None
