"""metrics.jsonl: one JSON object per line, written as training goes; and curves.png, drawn from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import replaced_file, writing


class MetricsLog:
    """Appends records to run/metrics.jsonl, and passes their numbers to a tracker.

    A resumed run first drops what came after its checkpoint, of which the number of records is known.
    """

    def __init__(self, run: Path, keep: int = 0, track: Callable[[dict[str, float], int], None] | None = None) -> None:
        self.path, self.track = run / "metrics.jsonl", track
        kept = read_metrics(run)[:keep] if keep else []
        self.records = len(kept)
        with replaced_file(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def write(self, **record: Any) -> None:
        """Appends one record. Raises RunError if it cannot be written."""
        line = json.dumps(record) + "\n"
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self.records += 1
        if self.track:
            event = record["event"]
            numbers = {f"{event}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
            self.track(numbers, record["step"])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run; a last line cut off by a crash is left out. Raises RunError for other damage."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("event"), str):
                raise ValueError("no record")
            if not all(isinstance(record.get(name), (int, float)) for name in ("step", "loss", "top1")):
                raise ValueError("no numbers")
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path} is damaged in line {number}; remove the line to go on") from error
    return records


def draw_curves(runs: dict[str, Path], output: Path) -> None:
    """Draws training loss and validation top-1 over steps, one line per run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (loss_axis, accuracy_axis) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for label, run in runs.items():
        records = read_metrics(run)
        train = [r for r in records if r["event"] == "train"]
        val = [r for r in records if r["event"] == "eval"]
        loss_axis.plot([r["step"] for r in train], [r["loss"] for r in train], label=label, linewidth=1.4)
        accuracy_axis.plot([r["step"] for r in val], [r["top1"] for r in val], label=label, marker="o", markersize=3.5)
    loss_axis.set(xlabel="training step", ylabel="training loss")
    accuracy_axis.set(xlabel="training step", ylabel="validation top-1 [%]")
    for axis in (loss_axis, accuracy_axis):
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    try:
        with replaced_file(output, binary=True) as file:
            figure.savefig(file, dpi=150, format="png")
    finally:
        plt.close(figure)
