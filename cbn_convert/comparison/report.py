"""Files of a finished comparison."""

from __future__ import annotations

from pathlib import Path

from ..files import replaced_file
from .summary import Comparison


def write_report(comparison: Comparison, output: Path) -> None:
    """Writes the table."""
    for name, text in (("table.md", comparison.markdown()), ("table.csv", comparison.csv())):
        with replaced_file(output / name) as file:
            file.write(text)
