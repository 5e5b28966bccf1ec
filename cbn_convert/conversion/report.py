"""What a conversion did, one row per norm layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["compensated", "window", "kept"]


@dataclass(frozen=True)
class ReportRow:
    """One norm layer.

    status: "compensated" (past statistics follow the weights of the module in `fed_by`), "window" (statistics are
    averaged without compensation) or "kept" (still the norm layer that it was); `reason` says why. Several modules in
    `fed_by` are joined by ", ". history_bytes: what the layer will remember of past iterations.
    """

    name: str
    norm: str
    channels: int
    fed_by: str | None
    status: Status
    reason: str
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
    def history_bytes(self) -> int:
        """What all layers together will remember of past iterations."""
        return sum(row.history_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "counts": self.counts,
            "history_bytes": self.history_bytes,
            "layers": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        return ", ".join(f"{n} {status}" for status, n in self.counts.items()) + f" of {len(self)} norm layers"
