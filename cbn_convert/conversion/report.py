"""What a conversion did, one row per norm layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["compensated", "window", "kept"]
Form = Literal["folded", "unfolded"]
Statistics = Literal["pretrained", "new"]


@dataclass(frozen=True)
class ReportRow:
    """One norm layer.

    status: "compensated" (past statistics follow the weights of the module in `fed_by`), "window" (statistics are
    averaged without compensation) or "kept" (still the norm layer that it was); `reason` says why. Several modules in
    `fed_by` are joined by ", ". form: "folded" if the module in `fed_by` applies the layer in training, "unfolded" if
    the layer does so itself. statistics: whether there are "pretrained" ones to carry, or the layer is "new" as
    training begins; None for a kept one. history_bytes: what the layer will remember beside its running statistics.
    """

    name: str
    norm: str
    channels: int
    fed_by: str | None
    status: Status
    reason: str
    form: Form = "unfolded"
    statistics: Statistics | None = None
    history_bytes: int = 0


@dataclass(frozen=True)
class ConversionReport:
    """The rows of a conversion, in the model's order; iterable."""

    rows: tuple[ReportRow, ...]

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers for each status."""
        counted = Counter(row.status for row in self.rows)
        return {status: counted[status] for status in ("compensated", "window", "kept")}

    @property
    def folded(self) -> int:
        """Number of layers that train folded into the module that feeds them."""
        return sum(row.form == "folded" for row in self.rows)

    @property
    def without_statistics(self) -> bool:
        """Whether every converted layer is a new one, as where pretrained weights are still to be loaded."""
        found = [row.statistics for row in self.rows if row.statistics is not None]
        return bool(found) and "pretrained" not in found

    @property
    def history_bytes(self) -> int:
        """What all layers together will remember of past iterations."""
        return sum(row.history_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "counts": self.counts,
            "folded": self.folded,
            "history_bytes": self.history_bytes,
            "layers": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items()) + f" of {len(self)} norm layers"
        if self.without_statistics:
            return f"{counts}; none has pretrained statistics: load weights before training, or train from scratch"
        return counts
