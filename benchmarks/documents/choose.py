"""python -m benchmarks.documents.choose: writes the table and the figure that docs/results.md begins with."""

from __future__ import annotations

from itertools import groupby
from statistics import mean
from typing import NamedTuple

import matplotlib

from benchmarks.dense import report as dense
from benchmarks.documents.readme import fill
from benchmarks.documents.results import LABELS, judged, read
from benchmarks.provenance import ROOT
from benchmarks.study.comparisons import COMPARISONS
from cbn_convert.comparison.summary import Row, difference, exceeds

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIGURE = ROOT / "docs" / "choose.png"
# networks by which nothing of CBN was chosen, and the batch sizes of one that chose at another
UNTOUCHED = {"v1": (1, 2, 4), "v2-100": (2,), "lite0": (1, 2, 4, 8), "convmixer": (1,)}
UNTOUCHED_TASKS = ("bccd-fcos", "bccd-fcos-long", "neu-fcos")
NETWORKS = {"v2": "MobileNetV2-0.35", "v1": "MobileNetV1-0.25", "v2-100": "MobileNetV2-1.0",
            "lite0": "EfficientNet-Lite0", "resnet": "ResNet-10-T",
            "preact": "pre-activation ResNet", "convmixer": "ConvMixer", "new": "small ResNet"}  # fmt: skip


class Case(NamedTuple):
    """CBN at one batch size of a task beside the others there."""

    task: str
    size: int
    name: str
    untouched: bool
    own: Row
    rival: Row
    rival_name: str
    frozen: Row | None


def cases() -> list[Case]:
    """All of them; without those of statistics measured anew, and of single seeds."""
    found, studies = [], read()
    for verdict in judged(studies):
        data, network, settings = COMPARISONS[verdict.name]
        if "recalibrate" in settings or settings["seeds"] == 1:
            continue
        task = "classification, random weights" if network == "new" else "classification"
        more = [settings["opt"]] if settings.get("opt") else []
        more += [f"{settings['images']} images"] if settings["images"] > 1000 and network != "new" else []
        more += [f"{settings['img-size']} px"] if "img-size" in settings else []
        frozen = studies[verdict.name].rows.get(("frozen", verdict.size))
        untouched = verdict.size in UNTOUCHED.get(network, ())
        name = ", ".join([f"{data}, {NETWORKS[network]}", *more])
        rival = LABELS[verdict.rival.norm]
        found.append(Case(task, verdict.size, name, untouched, verdict.own, verdict.rival, rival, frozen))
    for study in dense.read():
        task = "segmentation" if "camvid" in study.name else "detection"
        for size in study.sizes:
            entries = dict(study.at(size))
            others = {t: e.row for t, e in entries.items() if not dense.has_cbn(t)}
            of_cbn = dense.best_of_cbn(study, size)
            if of_cbn is not None and others:
                rival = max(others, key=lambda t: others[t].top1 or 0.0)
                name, own = dense.TITLES[study.name], of_cbn[1].row
                words = " + ".join(dense.parts(rival))
                untouched = study.name in UNTOUCHED_TASKS
                frozen = max(
                    (r for t, r in others.items() if t.startswith("frozen")), key=lambda r: r.top1 or 0.0, default=None
                )
                found.append(Case(task, size, name, untouched, own, others[rival], words, frozen))
    order = ("classification", "segmentation", "detection", "classification, random weights")
    return sorted(found, key=lambda case: (order.index(case.task), case.size))


def ahead(own: list[Case], frozen: bool) -> str:
    """Mean and range of the differences, to frozen BN or to the best other norm."""
    pairs = [(c.own, c.frozen if frozen else c.rival) for c in own]
    apart = [difference(one, other)[0] for one, other in pairs if other is not None and other.top1 is not None]
    if len(apart) < 2:
        return "".join(f"{d:+.1f}" for d in apart)
    return f"{mean(apart):+.1f} ({min(apart):+.1f} to {max(apart):+.1f}, {len(apart)} cases)"


def advice(own: list[Case]) -> str:
    """What to take: what is clearly ahead more often, and in the mean; else both, the better in the mean first."""
    clearly = sum(exceeds(c.own, c.rival) for c in own) - sum(exceeds(c.rival, c.own) for c in own)
    is_ahead = mean(difference(c.own, c.rival)[0] for c in own) > 0
    names = [c.rival_name for c in own]
    rival = max(dict.fromkeys(names), key=names.count)
    if is_ahead:
        return "CBN" if clearly > 0 else f"CBN or {rival}"
    return rival if clearly < 0 else f"{rival} or CBN"


def table(every: list[Case]) -> str:
    """One row for each task and number of images per step."""
    lines = [
        "| task, pretrained unless said | images per step | take | CBN over the best other norm | over frozen BN "
        "| over the best other, networks that chose nothing |",
        "|---|---|---|---|---|---|",
    ]
    for (task, size), group in groupby(every, key=lambda c: (c.task, c.size)):
        own = list(group)
        untouched = [c for c in own if c.untouched]
        cells = [task, str(size), f"**{advice(own)}**", ahead(own, False), ahead(own, True), ahead(untouched, False)]
        lines.append(f"| {' | '.join(cells)} |")
    said = "Points of test top-1, mIoU or mAP, each norm at its own best rate, three seeds: mean and range over cases"
    return "\n".join([*lines, "", f"*{said}; `python -m benchmarks.documents.choose`*"])


def draw(every: list[Case]) -> None:
    """All cases in rows: by how much CBN is ahead of the best other norm, with twice its standard error."""
    colours = dict(
        zip(dict.fromkeys(c.task for c in every), ("tab:blue", "tab:green", "tab:purple", "tab:orange"), strict=False)
    )
    figure, axis = plt.subplots(figsize=(8, 0.21 * len(every) + 1.1), layout="constrained")
    for y, case in enumerate(reversed(every)):
        higher, error = difference(case.own, case.rival)
        colour = colours[case.task]
        axis.errorbar(higher, y, xerr=2 * (error or 0), fmt="o", color=colour, ecolor=colour, elinewidth=1,
                      markersize=5, markerfacecolor=colour if case.untouched else "white")  # fmt: skip
    axis.set_yticks(range(len(every)), [f"{c.name} · {c.size}" for c in reversed(every)], fontsize=7)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xlim(-25, 25)
    axis.margins(y=0.02)
    axis.set_xlabel("CBN over the best other norm at so many images per step [points, ± 2 standard errors]", fontsize=8)
    for task, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=task)
    axis.legend(fontsize=7, loc="lower right")
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    found = cases()
    draw(found)
    fill(ROOT / "docs" / "results.md", {"choose": table(found)})
