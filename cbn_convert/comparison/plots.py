"""The plots of a comparison, each as PNG and as SVG whose text and axes take the colour of the page."""

from __future__ import annotations

import io
import re
from typing import Any

from .plan import Cell, columns, score
from .summary import Comparison, chosen

# Okabe and Ito's colours, told apart with colour blindness and on light and dark ground, but for black
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
MARKERS = "osD^vPX"
_INK = "#010203"  # stands for the colour of the page's text
_STYLE: dict[str, Any] = {
    "figure.figsize": (4.4, 3.9), "font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "cbn",
    "font.family": "sans-serif",
    **{f"{thing}.color": _INK for thing in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{thing}color": _INK for thing in ("edge", "label")},
}  # fmt: skip


class Plot:
    """A figure; `name` is that of its files, `title` says what it shows."""

    def __init__(self, name: str, title: str, png: bytes, svg: str) -> None:
        self.name, self.title, self.png, self.svg = name, title, png, svg


def draw(comparison: Comparison) -> list[Plot]:
    """Accuracy against batch size; then, for each batch size, accuracy against learning rate and the training loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wanted: list[tuple[str, str, Any]] = [("accuracy", f"Top-1 of the {comparison.split} images", _accuracy)]
    for size in sorted(comparison.config.batch_sizes):
        wanted.append((f"rates_batch{size}", f"Learning rates at batch size {size}", _rates(size)))
        wanted.append((f"loss_batch{size}", f"Training loss at batch size {size}", _losses(size)))
    plots = []
    with plt.rc_context(_STYLE):
        for name, title, fill in wanted:
            figure, axis = plt.subplots(layout="constrained")
            try:
                fill(comparison, axis)
                if axis.get_legend_handles_labels()[0]:
                    figure.legend(loc="outside lower center", ncols=2)
                png, svg = io.BytesIO(), io.StringIO()
                figure.savefig(png, dpi=160, format="png")
                figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            finally:
                plt.close(figure)
            plots.append(Plot(name, title, png.getvalue(), _for_pages(svg.getvalue())))
    return plots


def _for_pages(svg: str) -> str:
    """Without the XML header, and with the page's colour for text and axes."""
    return re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL).replace(_INK, "currentColor")


def _look(comparison: Comparison, norm: str) -> dict[str, Any]:
    number = comparison.config.norms.index(norm)
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def _accuracy(comparison: Comparison, axis: Any) -> None:
    for norm in comparison.config.norms:
        rows = sorted(
            (r for r in comparison.compared if r.norm == norm and r.top1 is not None),
            key=lambda r: r.batch_size,
        )
        axis.errorbar(
            [r.batch_size for r in rows], [r.top1 for r in rows], [r.std or 0 for r in rows], label=norm, capsize=3,
            **_look(comparison, norm),
        )  # fmt: skip
    reference = comparison.reference
    if reference is not None and reference.top1 is not None:
        label = f"bn, batch {reference.batch_size}"
        axis.axhline(reference.top1, linestyle="--", color="#8a8a8a", label=label, zorder=0)
        if reference.std is not None:
            low, high = reference.top1 - reference.std, reference.top1 + reference.std
            axis.axhspan(low, high, color="#8a8a8a", alpha=0.15, linewidth=0, zorder=0)
    sizes = sorted(comparison.config.batch_sizes)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set(xlabel="batch size", ylabel=f"{comparison.split} top-1 [%]")


def _rates(size: int) -> Any:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    def fill(comparison: Comparison, axis: Any) -> None:
        first = comparison.config.run.seed
        for norm in comparison.config.norms:
            cells = sorted(c for c in comparison.results if c[:2] == (norm, size) and c.seed == first)
            good = [c for c in cells if score(comparison.results[c]) >= 0]
            tops = [comparison.results[c]["top1"] for c in good]
            axis.plot([c.lr for c in good], tops, label=norm, **_look(comparison, norm))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.set(xlabel="peak learning rate", ylabel="validation top-1 [%]")

    return fill


def _losses(size: int) -> Any:
    def fill(comparison: Comparison, axis: Any) -> None:
        per_update = size * comparison.config.run.accumulate
        for column in columns(comparison.config):
            if column.batch_size != size or column.norm not in comparison.config.norms:
                continue
            for cell in chosen(column, comparison.results)[:1]:
                points = comparison.results[cell].get("loss_curve", [])
                look = {**_look(comparison, cell.norm), "marker": "o" if len(points) == 1 else None}
                images = [step * per_update for step, _ in points]
                axis.plot(images, [loss for _, loss in points], label=_label(cell), linewidth=1.2, **look)
        axis.set(xlabel="training images seen", ylabel="training loss")

    return fill


def _label(cell: Cell) -> str:
    return f"{cell.norm}, lr {cell.lr:.2g}"
