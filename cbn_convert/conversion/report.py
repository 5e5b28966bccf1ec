"""What a conversion did, one row per norm layer."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["compensated", "window", "kept"]
Form = Literal["folded", "unfolded"]
Statistics = Literal["pretrained", "new"]

NOT_REACHED = "not reached on the example input"
COLUMNS, MOST_REASONS, MOST_NAMES = 79, 6, 3  # of the printed report


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

    @property
    def thawed(self) -> int:
        """Number of layers that were frozen, whose weight and bias became parameters."""
        return sum("Frozen" in row.norm and row.status != "kept" for row in self.rows)

    def summary(self) -> str:
        """One line for logs."""
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items())
        new = "; none has pretrained statistics" if self.without_statistics else ""
        history = f"history {self.history_bytes / 1e6:.2f} MB"
        return f"{counts} of {len(self)} norm layers; {self.folded} train folded; {history}{new}"

    def __str__(self) -> str:
        """For a terminal of 80 columns: what became of the layers, why not the best of some, and what to do next."""
        groups: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status != "compensated":
                groups.setdefault(f"{row.status}, {row.reason}", []).append(row.name)
        lines = [f"  {reason}: {_few(names)}" for reason, names in [*groups.items()][:MOST_REASONS]]
        if len(groups) > MOST_REASONS:
            lines.append(f"  ... and {len(groups) - MOST_REASONS} more reasons, in the rows of this report")
        return "\n".join(_wrapped(line) for line in [self.summary(), *lines, f"Next: {self._next()}"])

    def _next(self) -> str:
        steps = ["train as usual", "then cbn.fold(model) for inference, or cbn.revert(model)"]
        if self.without_statistics:
            steps.insert(0, "load pretrained weights, or train from scratch")
        if self.thawed:
            steps.insert(0, f"make the optimizer after this, with the new parameters of frozen layers ({self.thawed})")
        if any(row.reason == NOT_REACHED for row in self.rows):
            steps.insert(0, "if training reaches the kept layers, convert with an example_input that does so")
        return "; ".join(steps)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _wrapped(line: str) -> str:
    return textwrap.fill(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False)
