"""Mean and scatter of each column at its best learning rate, as a table for people and for programs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .config import ComparisonConfig
from .plan import Cell, Column, Results, columns

HEADERS = ("norm", "batch size", "top-1 [%]", "seeds", "best lr", "step [ms]", "GPU memory [MB]")


@dataclass(frozen=True)
class Row:
    """A norm at a batch size.

    top1: mean in percent over the runs at the rate `lr`, None if none has ended well; std: their sample standard
    deviation, None for one run. at_edge: a better rate may lie beyond those that were tried. failed: runs at that rate
    that did not end, or all if every rate failed; failure: why the first one did not. step_seconds and peak_memory (MB)
    are medians of the runs at that rate.
    """

    norm: str
    batch_size: int
    lr: float | None
    at_edge: bool
    top1: float | None
    std: float | None
    seeds: int
    failed: int
    failure: str | None
    step_seconds: float | None
    peak_memory: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADERS."""
        top1 = (
            "failed" if self.top1 is None else f"{self.top1:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")
        )
        return (
            self.norm, str(self.batch_size), top1, f"{self.seeds}" + (f", {self.failed} failed" if self.failed else ""),
            "-" if self.lr is None else f"{self.lr:.2g}" + (" (edge)" if self.at_edge else ""),
            "-" if self.step_seconds is None else f"{1000 * self.step_seconds:.0f}",
            "-" if self.peak_memory is None else f"{self.peak_memory:.0f}",
        )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Outcome of a comparison: its settings, a row for each column, and every finished cell."""

    config: ComparisonConfig
    rows: list[Row]
    results: Results
    split: str

    @classmethod
    def of(cls, config: ComparisonConfig, results: Results) -> Comparison:
        """Sums the cells up; accuracies are of the test split if all cells that ended have one, else of validation."""
        good = [r for r in results.values() if "error" not in r]
        split = "test" if good and all("test_top1" in r for r in good) else "validation"
        return cls(config, [_row(column, results, split) for column in columns(config)], results, split)

    @property
    def reference(self) -> Row | None:
        """The row of BN at the reference batch size."""
        return next((r for r in self.rows if (r.norm, r.batch_size) == ("bn", self.config.reference)), None)

    @property
    def compared(self) -> list[Row]:
        """The rows of the grid, without a reference that lies outside of it."""
        return [r for r in self.rows if r.norm in self.config.norms and r.batch_size in self.config.batch_sizes]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows as text; without the GPU memory where there was no GPU."""
        width = len(HEADERS) - all(row.peak_memory is None for row in self.rows)
        return list(HEADERS[:width]), [list(row.cells()[:width]) for row in self.rows]

    def best(self) -> dict[int, Row]:
        """The row with the highest accuracy for each batch size that is compared."""
        best: dict[int, Row] = {}
        for row in sorted((r for r in self.compared if r.top1 is not None), key=lambda r: r.top1 or 0):
            best[row.batch_size] = row
        return dict(sorted(best.items()))

    def sentences(self) -> list[str]:
        """What the table says, in words; a difference counts that is larger than twice its standard error."""
        said = []
        for size, row in self.best().items():
            text = f"At batch size {size} the best is {row.norm} with {row.cells()[2]} %"
            if row.failed:
                text += f", though {row.failed} of its {row.failed + row.seeds} runs failed"
            others = [r for r in self.compared if r.batch_size == size and r.top1 is not None and r is not row]
            if row.std is None or any(r.std is None for r in others):
                said.append(f"{text}; one seed tells nothing of the scatter.")
                continue
            equal = [r.norm for r in others if not exceeds(row, r)]
            said.append(text + (f"; within the error {' and '.join(equal)} is as good." if equal else "."))
        reference = self.reference
        if reference is not None and reference.top1 is not None and reference not in self.compared:
            said.append(f"BatchNorm at batch size {reference.batch_size} reaches {reference.cells()[2]} %.")
        return said

    def markdown(self) -> str:
        """The table, the best of each batch size in bold."""
        headers, rows = self.table()
        lines = [f"| {' | '.join(headers)} |", "|---|" + "---:|" * (len(headers) - 1)]
        for row, (norm, size, top1, *rest) in zip(self.rows, rows, strict=True):
            shown = f"**{top1}**" if row in self.best().values() else top1
            lines.append(f"| {' | '.join([norm, size, shown, *rest])} |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The rows with all their fields."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the curves."""
        return {
            "output": self.config.run.output, "split": self.split, "cells": len(self.results),
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip


def difference(one: Row, other: Row) -> tuple[float, float | None]:
    """By how much the mean of one is higher, and the standard error of that; None for it if one has one seed only."""
    assert one.top1 is not None
    assert other.top1 is not None
    if one.std is None or other.std is None:
        return one.top1 - other.top1, None
    return one.top1 - other.top1, math.sqrt(one.std**2 / one.seeds + other.std**2 / other.seeds)


def exceeds(one: Row, other: Row) -> bool:
    """Whether one mean is higher than the other by more than twice the standard error."""
    higher, error = difference(one, other)
    return error is not None and higher > 2 * error


def chosen(column: Column, results: Results) -> list[Cell]:
    """The finished cells of a column at its best rate."""
    lr = column.best(results)
    return [cell for cell in column.needed(results) if cell.lr == lr and cell in results]


def _row(column: Column, results: Results, split: str) -> Row:
    cells = chosen(column, results)
    tried = [results[cell] for cell in cells or column.needed(results) if cell in results]
    good = [r for r in tried if "error" not in r]
    tops = [r["test_top1" if split == "test" else "top1"] for r in good]
    memory = [r["peak_memory"] for r in good if r["peak_memory"] is not None]
    return Row(
        norm=column.norm, batch_size=column.batch_size, lr=column.best(results), at_edge=column.at_edge(results),
        top1=statistics.mean(tops) if tops else None, std=statistics.stdev(tops) if len(tops) > 1 else None,
        seeds=len(tops), failed=len(tried) - len(good),
        failure=next((r["error"] for r in tried if "error" in r), None),
        step_seconds=statistics.median(r["step_seconds"] for r in good) if good else None,
        peak_memory=statistics.median(memory) if memory else None,
    )  # fmt: skip
