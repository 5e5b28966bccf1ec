"""The tables of docs/experiments.md, which readme.py writes."""

from __future__ import annotations

import json
import math
from itertools import product
from statistics import mean, median, stdev
from typing import Any

from benchmarks.provenance import RESULTS
from benchmarks.study import carried_forms, head_rate, high_rates, mechanism
from benchmarks.study.estimation import ESTIMATES

NOT_YET = "*Not measured yet.*"
NETWORK = {"lite0": "Lite0", "v1": "V1"}
FORMER_AXES = "former/axes_accuracy.json"


def rates() -> str:
    """Top-1 at every learning rate of the grid, network by network."""
    if not high_rates.OUTPUT.is_file():
        return NOT_YET
    report, parts = json.loads(high_rates.OUTPUT.read_text()), []
    names = {
        "cbn": "CBN",
        "bn": "BN",
        "brn": "Batch Renorm",
        "frozen": "frozen BN",
        "tune": "frozen BN, trained folded",
    }
    for subject, (title, _, settings, norms, lrs) in high_rates.SUBJECTS.items():
        cells = [c for c in report["cells"] if c["subject"] == subject]
        if not cells:
            continue
        lines = [f"| {title}, at rate | {' | '.join(f'{lr:g}' for lr in lrs)} |"]
        lines.append("|---|" + "---|" * len(lrs))
        for norm in norms:
            row = []
            for lr in lrs:
                tops = [c.get("test_top1") for c in cells if (c["norm"], c["lr"]) == (norm, lr)]
                good = [top for top in tops if top is not None]
                shown = "failed" if not good else f"{mean(good):.1f}" + (f" ± {stdev(good):.1f}" if good[1:] else "")
                failed = f" ({len(tops) - len(good)} of {len(tops)} failed)" if good and len(good) < len(tops) else ""
                row.append(shown + failed if tops else "")
            lines.append(f"| {names[norm]} | {' | '.join(row)} |")
        seeds = len({c["seed"] for c in cells})
        lines += ["", f"*{settings['max_steps']} steps, {settings['img_size']} px, up to {seeds} seeds*"]
        parts.append("\n".join(lines))
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/high_rates.json), version {report['commit'][:7]}"
    return "\n\n".join([*parts, f"*test split, mean ± standard deviation; {source}*"])


def _ahead(one: list[float], other: list[float]) -> str:
    """The difference of two means with its standard error."""
    error = math.sqrt(sum(stdev(tops) ** 2 / len(tops) for tops in (one, other)))
    return f"{mean(one) - mean(other):+.1f} ± {error:.1f}"


def heads() -> str:
    """Top-1 with the head at a rate of its own, at the best rate of the rest."""
    cells = head_rate.read()
    if not cells:
        return NOT_YET
    report = json.loads(head_rate.OUTPUT.read_text())
    columns = " | ".join(f"{factor:g} times" for factor in head_rate.FACTORS)
    head = f"| photos, network | norm | head at {columns} | best by validation | CBN ahead by |"
    lines = [head, "|---|---|" + "---|" * 5]
    for subject, (photos, network, _) in head_rate.SUBJECTS.items():
        best = {}  # test top-1 of each norm
        for norm in head_rate.NORMS:
            found = {f: head_rate.at_best_rate(cells, subject, norm, f) for f in head_rate.FACTORS}
            if any(len(own) < head_rate.SEEDS for own in found.values()):
                break
            tops = {factor: [cell["test_top1"] for cell in own] for factor, own in found.items()}
            texts = {factor: f"{mean(own):.1f} ± {stdev(own):.1f}" for factor, own in tops.items()}
            chosen = head_rate.best_factor(cells, subject, norm)
            best[norm] = tops[chosen]
            row = [f"{photos}, {NETWORK[network]}", "CBN" if norm == "cbn" else "frozen BN"]
            row += [f"{texts[factor]} @ {own[0]['lr']:.2g}" for factor, own in found.items()] + [texts[chosen]]
            lines.append(f"| {' | '.join(row)} | {_ahead(best['cbn'], best['frozen']) if norm == 'cbn' else ''} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/head_rate.json)"
    said = f"{head_rate.STEPS} steps of two images of 128 px (Lite0) or 96 px (V1), {head_rate.SEEDS} seeds"
    return "\n".join([*lines, "", f"*test top-1 @ rate of the rest; {said}; {source}, version {report['commit'][:7]}*"])


def parts() -> str:
    """Top-1 of CBN and of what it is made of, by data and rate."""
    if not mechanism.OUTPUT.is_file():
        return NOT_YET
    report = json.loads(mechanism.OUTPUT.read_text())
    columns = [(images, lr) for images in ("clothing", "hands") for lr in mechanism.RATES]
    lines = [f"| test top-1 [%] | {' | '.join(f'{images}, {lr:.2g}' for images, lr in columns)} |"]
    lines.append("|---|" + "---|" * len(columns))
    most = 1
    for form, (label, _, _) in mechanism.FORMS.items():
        row = []
        for images, lr in columns:
            tops = mechanism.of(form, images, lr)
            most = max(most, len(tops))
            row.append("" if not tops else f"{mean(tops):.1f}" + (f" ± {stdev(tops):.1f}" if tops[1:] else ""))
        lines.append(f"| {label} | {' | '.join(row)} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/mechanism.json), version {report['commit'][:7]}"
    return "\n".join([*lines, "", f"*500 steps of two images, up to {most} seeds; {source}*"])


def steepness() -> str:
    """By how much the mean patch makes a conv steeper, behind rectifiers and elsewhere."""
    if not mechanism.TRACED.is_file():
        return NOT_YET
    report = json.loads(mechanism.TRACED.read_text())
    lines = [
        "| convs | largest eigenvalue of E[p pᵀ] over that of Σ | shift of a channel through θ over that through β |",
        "|---|---|---|",
    ]
    for rectified, where in ((True, "input not negative"), (False, "input of both signs")):
        rows = [row for row in report["steepness"] if row["rectified"] == rectified]
        cells = [f"{len(rows)}, {where}"]
        for key in ("ratio", "shift"):
            values = [row[key] for row in rows]
            three = median(values), min(values), max(values)
            middle, least, most = (f"{v:,.0f}" if v >= 100 else f"{v:.2g}" for v in three)
            cells.append(f"{middle} ({least} to {most})")
        lines.append(f"| {' | '.join(cells)} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/mechanism_traces.json)"
    return "\n".join([*lines, "", f"*median and range of the layers; {source}*"])


def traces() -> str:
    """What runs away first in frozen BN, and how little filters grow."""
    if not mechanism.TRACED.is_file():
        return NOT_YET
    rows = {(t["form"], t["lr"]): t["rows"] for t in json.loads(mechanism.TRACED.read_text())["traces"]}

    def at(form: str, step: int, key: str) -> str:
        return f"{next(r[key] for r in rows[form, 3e-3] if r['step'] == step):.2f}"

    longest = max(row["length"][1] for own in rows.values() for row in own)
    return (
        f"At 0.003 the means of frozen BN's layers are off by {at('frozen', 10, 'shift')} σ after 10 steps and by "
        f"{at('frozen', 40, 'shift')} after 40, those of CBN by {at('cbn', 40, 'shift')}, as at the start; its loss "
        f"after 160 steps is {at('frozen', 160, 'loss')}, where CBN has {at('cbn', 160, 'loss')}. 95 % of all filters "
        f"have grown by at most {100 * (longest - 1):.2f} % in every one of these runs: it is not their growth that "
        "fails."
    )


def from_scratch() -> str:
    """New layers' average and rings from random weights, beside statistics that are never out of date."""
    report = json.loads((RESULTS / "from_scratch.json").read_text())
    labels = {
        "bn": "BN", "cbn": "CBN: the newest batch half (default for new layers)",
        "quarter": "CBN: the newest batch a quarter", "none": "CBN, not following the weights",
        **{f"ring-{k}": f"CBN, ring of {k}" for k in (2, 8)},
        **{f"window-{k}": f"exponential window of {k} (gone)" for k in (2, 8, 32)},
        "fresh-all": "BN's statistics of these and 14 more images, never out of date",
        "fresh-own": "the same, the gradient of the 14 for the layer's own weights only",
    }  # fmt: skip
    lrs = sorted({c["lr"] for c in report["cells"]})
    head = " | ".join(f"{lr:g}" for lr in lrs)
    lines = [f"| top-1 [%] of each seed, at rate | {head} |", "|---|" + "---|" * len(lrs)]
    for row, label in labels.items():
        cells = sorted((c for c in report["cells"] if c["row"] == row), key=lambda c: c["seed"])
        values = [[c["top1"] for c in cells if c["lr"] == lr] for lr in lrs]
        shown = [", ".join("failed" if v is None else f"{v:.1f}" for v in of_rate) for of_rate in values]
        if cells:
            lines.append(f"| {label} | {' | '.join(shown)} |")
    source = f"*validation; `{report['command']}`, [JSON](BASE/benchmarks/results/from_scratch.json)*"
    return "\n".join([*lines, "", source])


def carried() -> str:
    """Top-1 of the carried window with length, gradient, looks, positions and d of other kinds."""
    if not carried_forms.OUTPUT.is_file():
        return NOT_YET
    report = json.loads(carried_forms.OUTPUT.read_text())
    labels = {
        "default": "default: 8,192 images, looks in the first 32 steps and every 8th, about 512 positions",
        "late": "looks in turns from the second step on",
        **{f"window-{size}": f"{size:,} images" for size in (1024, 4096, 16384, 65536)},
        "current": "no gradient through M and S", "every-2": "a look every 2 steps",
        "every-32": "a look every 32 steps", "positions-128": "about 128 positions", "positions-all": "all positions",
        "diagonal": "no axes", "even": "no axes, d = 1: S grows with the square of the filter's length",
    }  # fmt: skip
    lines = [f"| top-1 [%] | {' | '.join(carried_forms.DATA)} |", "|---|" + "---|" * len(carried_forms.DATA)]
    for form, label in labels.items():
        row = []
        for images in carried_forms.DATA:
            values = [cell["test_top1"] for cell in carried_forms.results(form, images) if "test_top1" in cell]
            shown = f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) == carried_forms.SEEDS else "-"
            row.append(shown)
        lines.append(f"| {label} | {' | '.join(row)} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/carried_forms.json)"
    budget = (
        f"test split; {carried_forms.IMAGES} images per run, batch {carried_forms.BATCH_SIZE}, lr {carried_forms.LR:g}"
    )
    seeds = f"mean ± standard deviation of {carried_forms.SEEDS} seeds"
    return "\n".join([*lines, "", f"*{budget}, {seeds}; {source}, version {report['commit'][:7]}*"])


def estimates() -> str:
    """Mean error of each estimate of a layer's statistics, by rate."""
    report = json.loads((RESULTS / "estimation.json").read_text())
    rates = sorted({row["rate"] for row in report["rows"]})
    lines = [f"| mean over the run, μ [σ] / log σ² | {' | '.join(f'rate {rate:g}' for rate in rates)} |"]
    lines.append("|---|" + "---|" * len(rates))
    for estimate, label in ESTIMATES.items():
        row = []
        for rate in rates:
            errors = [row["errors"][estimate] for row in report["rows"] if row["rate"] == rate]
            row.append(" / ".join(f"{mean(e[of] for e in errors):.3f}" for of in ("mean", "var")))
        lines.append(f"| {label} | {' | '.join(row)} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/estimation.json), version {report['commit'][:7]}"
    what = "mean absolute error over all channels and layers; gradient norm clipped at 5"
    return "\n".join([*lines, "", f"*{what}; {source}*"])


def covariance() -> str:
    """How much of the covariance of patches a diagonal and axes know, by network."""
    report = json.loads((RESULTS / "patch_covariance.json").read_text())
    labels = {
        "0": "diagonal alone", **{str(k): f"and {k} principal ax{'i' if k == 1 else 'e'}s" for k in (1, 2, 4, 8, 16)},
        "found": f"and the {report['axes']} axes that 32 looks have found",
    }  # fmt: skip
    networks = report["networks"]
    lines = [f"| | {' | '.join(f'{n}, {len(rows)} convs' for n, rows in networks.items())} |"]
    lines.append("|---|" + "---|" * len(networks))
    for key, label in labels.items():
        row = [" / ".join(f"{median(r[key][i] for r in rows):.2f}" for i in (0, 1)) for rows in networks.values()]
        lines.append(f"| {label} | {' | '.join(row)} |")
    source = f"`{report['command']}`, [JSON](BASE/benchmarks/results/patch_covariance.json)"
    return "\n".join([*lines, "", f"*cosine / relative error, medians over convs of medians over filters; {source}*"])


def axes() -> str:
    """Top-1 of a network with dense convs, with axes, with a diagonal alone and with the exponential window."""
    report, former = (json.loads((RESULTS / name).read_text()) for name in ("axes_accuracy.json", FORMER_AXES))
    labels = {
        "default": "eight axes (default)", "axes-2": "two axes", "diagonal": "diagonal alone",
        "mean": "only M follows the weights", "variance": "only S follows the weights",
    }  # fmt: skip
    own = [{**cell, "lr": 0.00949, "form": former["form"]} for cell in former["cells"]]
    labels[former["form"]] = f"{former['form']}, gone, version {former['commit']}"
    by_cell = {(c["form"], c["lr"], c["seed"]): c for c in [*report["cells"], *own]}
    lines = ["| top-1 [%] | rate | seeds | validation | beside the default, median | test | beside the default |"]
    lines.append("|---|---|---|---|---|---|---|")
    for lr, form in product(sorted({lr for _, lr, _ in by_cell}), labels):
        seeds = [seed for f, rate, seed in by_cell if (f, rate) == (form, lr)]
        if len(seeds) < 2:
            continue
        row = [labels[form], f"{lr:.2g}", str(len(seeds))]
        for split in ("top1", "test_top1"):
            pairs = [[by_cell[f, lr, seed].get(split) for f in (form, "default")] for seed in seeds]
            if None in (value for pair in pairs for value in pair):
                row += ["", ""]
                continue
            apart = [a - b for a, b in pairs]
            row.append(f"{mean(a for a, _ in pairs):.1f} ± {stdev(a for a, _ in pairs):.1f}")
            error = f"{mean(apart):+.1f} ± {stdev(apart) / len(apart) ** 0.5:.1f}"
            middle = f", {median(apart):+.1f}" if split == "top1" else ""
            row.append("" if form == "default" else error + middle)
        lines.append(f"| {' | '.join(row)} |")
    source = (
        f"`{report['command']}`, [JSON](BASE/benchmarks/results/axes_accuracy.json), version {report['commit'][:7]}"
    )
    what = "mean ± standard deviation; mean of the differences by seed ± its standard error"
    return "\n".join([*lines, "", f"*{what}; {source}; [JSON](BASE/benchmarks/results/{FORMER_AXES}) of the former*"])


def without_axes() -> str:
    """CBN at the best rate of each cell of MobileNetV2-0.35, as it is and by a diagonal alone."""
    former = json.loads((RESULTS / "former" / "without_axes.json").read_text())
    lines = [
        "| top-1 [%] | batch | with axes, validation | diagonal | with axes, test | diagonal |",
        "|---|---|---|---|---|---|",
    ]
    apart: dict[str, list[float]] = {"top1": [], "test_top1": []}
    for name in ("hands-v2-short", "clothing-v2-short"):
        now = json.loads((RESULTS / "study" / f"{name}.json").read_text())["cells"]
        sides = [[c for c in now if c["norm"] == "cbn"], [c for c in former["cells"] if c["comparison"] == name]]
        for size in (1, 2, 4):
            row = [name.split("-")[0], str(size)]
            best = [_chosen([c for c in cells if c["batch_size"] == size]) for cells in sides]
            for split, found in apart.items():
                values = [[c[split] for c in cells] for cells in best]
                row += [f"{mean(v):.1f} ± {stdev(v):.1f}" for v in values]
                found.append(mean(values[0]) - mean(values[1]))
            lines.append(f"| {' | '.join(row)} |")
    errors = {split: f"{mean(v):+.1f} ± {stdev(v) / len(v) ** 0.5:.1f}" for split, v in apart.items()}
    what = f"with axes ahead by {errors['top1']} in validation, {errors['test_top1']} on test, means over cells"
    source = f"[JSON](BASE/benchmarks/results/former/without_axes.json) of version {former['commit'][:7]}"
    return "\n".join([*lines, "", f"*{what}; diagonal: {source}*"])


def _chosen(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells at the rate that ran with several seeds."""
    rates = [c["lr"] for c in cells]
    return [c for c in cells if rates.count(c["lr"]) > 1]


def resume() -> str:
    """What is lost in a resume without history, by the carried window and the one before."""
    report = json.loads((RESULTS / "resume_without_history.json").read_text())
    names = {"carried": "carried window", "former": "exponential window with C (gone)"}
    kinds = {"without history": "without history", "last bit": "with it, weights rounded otherwise"}
    columns = {
        "outputs": "outputs", "loss": "training loss", "mean": "mean [σ], median layer", "mean_worst": "worst",
        "var": "variance, median layer", "var_worst": "worst",
    }  # fmt: skip
    lines = [f"| difference [%] in | lr | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    lrs = sorted({row["lr"] for row in report["carried"]["rows"]})
    for lr, label, kind in product(lrs, names, kinds):
        rows = [row for row in report[label]["rows"] if (row["lr"], row["resume"]) == (lr, kind)]
        cells = []
        for column in columns:
            values = [100 * row[column] for row in rows]
            cells.append(f"{sum(values) / len(values):.2g} ({min(values):.2g} to {max(values):.2g})")
        lines.append(f"| {names[label]}, {kinds[kind]} | {lr:g} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} of version {report[label]['commit'][:7]}" for label, name in names.items())
    source = f"`{report['carried']['command']}`, [JSON](BASE/benchmarks/results/resume_without_history.json)"
    return "\n".join([*lines, "", f"*mean (lowest to highest) of {len(rows)} seeds; {source}; {versions}*"])


def tables() -> dict[str, str]:
    """All of them, by name."""
    return {
        "rates": rates(), "heads": heads(), "from-scratch": from_scratch(), "carried": carried(), "resume": resume(),
        "covariance": covariance(), "estimates": estimates(), "axes": axes(), "without-axes": without_axes(),
    }  # fmt: skip
