"""python -m benchmarks.documents.method_figure: draws docs/method.svg, a layer with its window."""

from __future__ import annotations

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.provenance import ROOT

OUTPUT = ROOT / "docs" / "method.svg"
DATA, WEIGHTS, IMAGES = "#444444", "#1f5fa8", "#c05a00"
PALE = {DATA: "#f2f2f2", WEIGHTS: "#e3edf8", IMAGES: "#fbeadb"}


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str = DATA) -> None:
    """A labelled box, by its left lower corner."""
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=PALE[color], edgecolor=color, linewidth=1.3)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="black", linespacing=1.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = DATA, bent: float = 0) -> None:
    """An arrow; what takes in images is dashed."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=color, linewidth=1.5, shrinkA=2, shrinkB=2,
            linestyle=(0, (4, 2)) if color == IMAGES else "-", connectionstyle=f"arc3,rad={bent}",
        )
    )  # fmt: skip


def note(ax: Axes, x: float, y: float, text: str, color: str = DATA, place: str = "center") -> None:
    ax.text(x, y, text, ha=place, va="center", color=color, fontsize=9, linespacing=1.4)


def step(ax: Axes) -> None:
    """Every step: the weights moved, so M and S move, and the conv is the norm."""
    ax.set_title("every step: statistics follow the weights", loc="left", fontsize=11)
    box(ax, 0, 2.6, 1.1, 0.8, "input\npatches $p$")
    box(ax, 2.3, 2.6, 3.0, 0.8, "conv with weight $s\\theta$\nand bias $\\beta + s\\,(b - M)$")
    box(ax, 6.5, 2.6, 0.9, 0.8, "output\n$y$")
    note(ax, 3.8, 3.58, "in seven steps of eight")
    arrow(ax, (1.1, 3.0), (2.3, 3.0))
    arrow(ax, (5.3, 3.0), (6.5, 3.0))
    box(ax, 0, 0.5, 2.0, 1.0, "$M,\\ S$\nat weights $\\theta_0$", WEIGHTS)
    box(ax, 5.4, 0.5, 2.0, 1.0, "$M,\\ S$\nat weights $\\theta$", WEIGHTS)
    arrow(ax, (2.0, 1.0), (5.4, 1.0), WEIGHTS)
    note(ax, 3.7, 1.22, "by $\\bar p,\\ d$ and $u$, which rest", WEIGHTS)
    note(ax, 3.7, 0.76, "$\\theta_0 \\rightarrow \\theta$", WEIGHTS)
    arrow(ax, (5.9, 1.5), (4.6, 2.6), WEIGHTS)
    note(ax, 5.5, 2.12, "$s = \\gamma\\,/\\sqrt{S + \\epsilon}$", WEIGHTS, "left")


def look(ax: Axes) -> None:
    """Some steps: the batch joins the window, behind the step."""
    ax.set_title("one step in eight, a look: they also follow the images", loc="left", fontsize=11)
    box(ax, 0, 2.6, 1.1, 0.8, "input\npatches $p$")
    box(ax, 1.95, 2.6, 1.5, 0.8, "conv with\n$\\theta,\\ b$")
    box(ax, 4.2, 2.6, 0.6, 0.8, "$x$")
    box(ax, 5.55, 2.6, 1.0, 0.8, "scale\nand shift")
    box(ax, 7.3, 2.6, 0.9, 0.8, "output\n$y$")
    for start, end in ((1.1, 1.95), (3.45, 4.2), (4.8, 5.55), (6.55, 7.3)):
        arrow(ax, (start, 3.0), (end, 3.0))
    box(ax, 0, 0.5, 2.0, 1.0, "$\\bar p,\\ d,\\ u$\nof patches", IMAGES)
    box(ax, 3.5, 0.5, 2.0, 1.0, "$M,\\ S$\nat weights $\\theta$", IMAGES)
    arrow(ax, (0.55, 2.6), (0.55, 1.5), IMAGES)
    note(ax, 0.7, 2.05, "in one look of four\nmean, covariance of\nabout 512 positions", IMAGES, "left")
    arrow(ax, (4.5, 2.6), (4.5, 1.5), IMAGES)
    note(ax, 4.65, 2.05, "mean, variance of $x$,\nbehind the step", IMAGES, "left")
    note(ax, 5.65, 1.0, "share of the batch:\n$1 - (1 - 1/8192)^n$\nfor $n$ images", IMAGES, "left")


def main() -> None:
    plt.switch_backend("svg")
    plt.rcParams.update({"svg.hashsalt": "cbn", "font.size": 10, "mathtext.fontset": "dejavusans"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 3.6))
    for ax, draw, width in ((left, step, 7.5), (right, look, 8.3)):
        ax.set_xlim(-0.1, width)
        ax.set_ylim(0.3, 3.8)
        ax.axis("off")
        draw(ax)
    figure.tight_layout(w_pad=3)
    figure.savefig(OUTPUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
