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
MOST_STAGES = 5  # into which a model is divided on, where it has fewer


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

    def stages(self) -> dict[str, list[ReportRow]]:
        """The rows by the part of the model that they are in, as many parts as a person can take in at once."""
        parts = {"": list(self.rows)}
        while len(parts) < MOST_STAGES:
            inner = {name: _parts(name, rows) for name, rows in parts.items()}
            name = max(parts, key=lambda name: len(parts[name]) if len(inner[name]) > 1 else 0)
            if len(inner[name]) < 2 or (name and len(parts) + len(inner[name]) - 1 > 3 * MOST_STAGES):
                break
            parts = {k: v for n in parts for k, v in (inner[n] if n == name else {n: parts[n]}).items()}
        return parts

    def exceptions(self) -> list[str]:
        """Why layers are not compensated, a line for each reason with the names of some."""
        groups: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status != "compensated":
                groups.setdefault(f"{row.status}, {row.reason}", []).append(row.name)
        lines = [f"  {reason}: {_few(names)}" for reason, names in [*groups.items()][:MOST_REASONS]]
        if len(groups) > MOST_REASONS:
            lines.append(f"  ... and {len(groups) - MOST_REASONS} more reasons, in the rows of this report")
        return lines

    def __str__(self) -> str:
        """For a terminal of 80 columns: what became of the layers, why not the best of some, and what to do next."""
        return "\n".join(_wrapped(line) for line in [self.summary(), *self.exceptions(), f"Next: {self._next()}"])

    def _next(self) -> str:
        steps = ["train as usual", "then cbn.fold(model) for inference, or cbn.revert(model)"]
        if self.without_statistics:
            steps.insert(0, "load pretrained weights, or train from scratch")
        if self.thawed:
            steps.insert(0, f"make the optimizer after this, with the new parameters of frozen layers ({self.thawed})")
        if any(row.reason == NOT_REACHED for row in self.rows):
            steps.insert(0, "if training reaches the kept layers, convert with an example_input that does so")
        return "; ".join(steps)


def _parts(name: str, rows: Sequence[ReportRow]) -> dict[str, list[ReportRow]]:
    """The rows of a part of the model by the parts of that one, as deep as it is before it divides."""
    depth = name.count(".") + 1 if name else 0
    while True:
        parts: dict[str, list[ReportRow]] = {}
        for row in rows:
            parts.setdefault(".".join(row.name.split(".")[: depth + 1]), []).append(row)
        if len(parts) > 1 or all(row.name in parts for row in rows):
            return parts
        depth += 1


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _wrapped(line: str) -> str:
    return textwrap.fill(line, COLUMNS, subsequent_indent="    ", break_on_hyphens=False)
