"""python -m benchmarks.documents.results: writes the tables of docs/results.md and README.md from study/*.json."""

from __future__ import annotations

import json
import math
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.documents.readme import fill
from benchmarks.provenance import RESULTS, ROOT
from benchmarks.study.comparisons import COMPARISONS, STUDY, default_window
from cbn_convert.comparison.config import ComparisonConfig
from cbn_convert.comparison.plan import Cell, Results, score
from cbn_convert.comparison.summary import Comparison, Row, difference, exceeds

LABELS = {
    "bn": "BN", "frozen": "frozen BN", "tune": "frozen BN, trained folded", "gn": "GroupNorm", "brn": "Batch Renorm",
    "cbn": "**CBN**", "cbn:ring:window=2": "CBN, ring of 2",
}  # fmt: skip
NETWORKS = {
    "v2": "MobileNetV2-0.35", "v1": "MobileNetV1-0.25", "v2-100": "MobileNetV2-1.0", "lite0": "EfficientNet-Lite0",
    "resnet": "ResNet-10-T from clothing", "preact": "half as wide pre-activation ResNet-18 from clothing",
    "densenet": "a small DenseNet from clothing", "convmixer": "a small ConvMixer from clothing",
    "new": "a small ResNet from scratch",
}  # fmt: skip
NOT_YET = "*Not measured yet.*"
HEADLINE = ("hands-v1-short", "clothing-v1-short", "hands-lite0", "clothing-lite0")  # of networks that chose nothing


class Study(NamedTuple):
    """A finished comparison with what its JSON says of it."""

    report: dict[str, Any]
    comparison: Comparison
    results: Results

    @property
    def rows(self) -> dict[tuple[str, int], Row]:
        return {(row.norm, row.batch_size): row for row in self.comparison.rows}


def read() -> dict[str, Study]:
    """The comparisons that there are, in the order of comparisons.py."""
    studies = {}
    for name in COMPARISONS:
        if (STUDY / f"{name}.json").is_file():
            report = json.loads((STUDY / f"{name}.json").read_text())
            config, results = ComparisonConfig.from_dict(report["config"]), {}
            for entry in report["cells"]:
                cell = Cell(*(entry.pop(field) for field in Cell._fields))
                results[cell] = entry
            studies[name] = Study(report, Comparison.of(config, results), results)
    return studies


def shown(row: Row | None, best: bool) -> str:
    """A cell: top-1, scatter and rate, and what is to be said of them."""
    if row is None or row.top1 is None:
        return "" if row is None else "failed"
    text = f"{row.top1:.1f}" + ("" if row.std is None else f" ± {row.std:.1f}")
    marks = " (edge)" * row.at_edge + f" ({row.failed} of {row.failed + row.seeds} failed)" * (row.failed > 0)
    return (f"**{text}**" if best else text) + f" @ {row.lr:.2g}{marks}"


def every(studies: dict[str, Study]) -> str:
    """A row for each comparison and batch size, and a column for each norm."""
    norms = list(dict.fromkeys(norm for study in studies.values() for norm in study.comparison.config.norms))
    norms.sort(key=list(LABELS).index)
    lines = [f"| comparison | batch | {' | '.join(LABELS[norm].strip('*') for norm in norms)} | runs |"]
    lines.append("|---|---|" + "---|" * (len(norms) + 1))
    for name, study in studies.items():
        config = study.comparison.config
        best = {id(row) for row in study.comparison.best().values()}
        what, seeds = title(name, study), "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
        for size in dict.fromkeys((*config.batch_sizes, *([config.reference] if config.reference else []))):
            cells = [shown(row, id(row) in best) for row in (study.rows.get((norm, size)) for norm in norms)]
            runs = f"[{len(study.results)}](BASE/benchmarks/results/study/{name}.json), {seeds}" if what else ""
            lines.append(f"| {what} | {size} | {' | '.join(cells)} | {runs} |")
            what = ""
    (command,) = {study.report["command"] for study in studies.values()}
    return "\n".join([*lines, "", f"*test top-1 [%] @ rate; `{command} --work FOLDER --only NAME`*"])


class Verdict(NamedTuple):
    """CBN at one batch size of a comparison beside the best of the others there, and beside BN at the reference."""

    name: str
    size: int
    own: Row
    rival: Row
    reference: Row | None


def judged(studies: dict[str, Study]) -> list[Verdict]:
    """Every batch size at which CBN's default was compared with other norms."""
    verdicts = []
    for name, study in studies.items():
        for size in study.comparison.config.batch_sizes:
            own = study.rows.get(("cbn", size))
            others = [r for r in study.rows.values() if r.batch_size == size and not r.norm.startswith("cbn")]
            others = [r for r in others if r.top1 is not None]
            if own is not None and own.top1 is not None and others:
                rival = max(others, key=lambda r: r.top1 or 0)
                verdicts.append(Verdict(name, size, own, rival, study.comparison.reference))
    return verdicts


def beside_former(studies: dict[str, Study]) -> str:
    """The carried window beside the exponential one with C, which it replaced, cell by cell of the same seeds."""
    former = json.loads((RESULTS / "former" / "study.json").read_text())["comparisons"]
    more = json.loads((RESULTS / "former" / "more_seeds.json").read_text())["cells"]
    ahead: dict[str, list[float]] = {"top1": [], "test_top1": []}
    apart, most = [], 0
    for name, old in former.items():
        for size in sorted({cell["batch_size"] for cell in old["cells"]}):
            then = {cell["seed"]: cell for cell in old["cells"] if cell["batch_size"] == size}
            lr = studies[name].rows["cbn", size].lr
            at = {cell.seed: dict(r) for cell, r in studies[name].results.items() if cell[:3] == ("cbn", size, lr)}
            own = [cell for cell in more if (cell["comparison"], cell["batch_size"]) == (name, size)]
            for version, found in (("today", at), ("former", then)):
                found |= {cell["seed"]: cell for cell in own if cell["version"] == version}
            for split, means in ahead.items():
                pairs = [(at[seed][split], cell[split]) for seed, cell in then.items() if seed in at]
                now, before = zip(*pairs, strict=True)
                means.append(mean(now) - mean(before))
                most = max(most, len(pairs))
                if len(pairs) > 1:
                    error = math.sqrt((stdev(now) ** 2 + stdev(before) ** 2) / len(pairs))
                    if abs(means[-1]) > 2 * error:
                        which = f"{name} at batch size {size}, {'validation' if split == 'top1' else 'test'}"
                        apart.append(f"{which}: {means[-1]:+.1f} ± {error:.1f}")
    of = {split: f"{mean(means):+.2f} ± {stdev(means) / math.sqrt(len(means)):.2f}" for split, means in ahead.items()}
    count = len(ahead["top1"])
    return (
        f"In the mean of {count} cells with 2 to {most} seeds each: validation {of['top1']} points, test "
        f"{of['test_top1']}. Of {2 * count} "
        f"differences {len(apart)} exceed twice their standard error ({'; '.join(apart)}). "
        "*`python -m benchmarks.documents.results`, "
        "JSON: [three seeds](BASE/benchmarks/results/former/study.json) of the former window, on other machines, "
        "[more of both](BASE/benchmarks/results/former/more_seeds.json), on one.*"
    )


def verdicts(studies: dict[str, Study]) -> str:
    """A table of them."""
    lines = [
        "| data, network, budget | batch | CBN | best other | CBN ahead by | BN at 32 | CBN ahead by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size, own, rival, reference in judged(studies):
        over = ["", ""] if reference is None else [_shown(reference), _difference(own, reference)]
        lines.append(
            f"| {title(name, studies[name])} | {size} | {_shown(own)} | {_shown(rival)} ({LABELS[rival.norm]}) | "
            f"{_difference(own, rival)} | {' | '.join(over)} |"
        )
    return "\n".join(lines)


def headline(studies: dict[str, Study]) -> str:
    """Their accuracies alone, a row for each comparison; for README, whose words are counted."""
    found = {(verdict.name, verdict.size): verdict for verdict in judged(studies)}
    sizes = sorted({size for _, size in found})
    lines = [f"| photos of | {' | '.join(f'CBN, best other at {size}' for size in sizes)} | BN at 32 |"]
    lines.append("|---|" + "---|" * (len(sizes) + 1))
    for name, study in studies.items():
        images, network, _ = COMPARISONS[name]
        reference = study.comparison.reference
        cells = [_beside(found.get((name, size))) for size in sizes] + ["" if reference is None else _shown(reference)]
        lines.append(f"| {images}, {network.capitalize()} | {' | '.join(cells)} |".replace(" ± ", "±"))
    return "\n".join(lines)


def _beside(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not measured"
    own = f"**{_shown(verdict.own)}**" if exceeds(verdict.own, verdict.rival) else _shown(verdict.own)
    return f"{own}, {_shown(verdict.rival)} ({LABELS[verdict.rival.norm]})"


def outcome(studies: dict[str, Study], starts: tuple[str, ...] = ("pretrained", "random")) -> str:
    """How often CBN is ahead, in words; runs that are done over with recalibration and single seeds do not count."""
    settings = {name: COMPARISONS[name][2] for name in studies}
    every = [v for v in judged(studies) if "recalibrate" not in settings[v.name] and settings[v.name]["seeds"] > 1]
    said = []
    for weights in starts:
        own = [v for v in every if (COMPARISONS[v.name][1] == "new") == (weights == "random")]
        large = [(v.own, v.reference) for v in own if v.reference is not None]
        equal = [(v.own, v.rival) for v in own]
        said.append(
            f"Classifying from {weights} weights CBN is ahead of the best other norm at its batch size\n"
            f"{_count(equal)}, and of BN at batch size 32 {_count(large)}."
        )
    return "\n".join([*said, '"Clearly": by more than twice the standard error of the difference.'])


def _count(pairs: list[tuple[Row, Row]]) -> str:
    ahead = sum((own.top1 or 0) > (other.top1 or 0) for own, other in pairs)
    clearly = sum(exceeds(own, other) for own, other in pairs)
    behind = sum(exceeds(other, own) for own, other in pairs)
    return f"in {ahead} of {len(pairs)} cases (clearly in {clearly}; clearly behind in {behind})"


def _shown(row: Row) -> str:
    return "failed" if row.top1 is None else row.cells()[2]


def _difference(own: Row, other: Row) -> str:
    """With the standard error of the difference of two means; in bold where it is more than twice that."""
    higher, error = difference(own, other)
    text = f"{higher:+.1f}" + ("" if error is None else f" ± {error:.1f}")
    return f"**{text}**" if exceeds(own, other) or exceeds(other, own) else text


def title(name: str, study: Study) -> str:
    """What a comparison is called."""
    data, network, settings = COMPARISONS[name]
    more = ", statistics recalibrated" if "recalibrate" in settings else ""
    more += ", batch size 8" if settings["batch-sizes"] == "8" else ""
    more += f", {settings['img-size']} px" if "img-size" in settings else ""
    more += "" if study.report["window"] == default_window(network) else ", CBN: former default"
    return f"{data}, {NETWORKS[network]}, {settings['images']} images, {settings.get('opt', 'sgd')}{more}"


def rates(studies: dict[str, Study]) -> str:
    """Validation top-1 of the first seed at every rate of the searches at batch size 2, hands before clothing."""
    both = [studies[name].results for name in ("hands-v2-short", "clothing-v2-short")]
    tops = [
        {(c.norm, c.lr): score(r) for c, r in results.items() if (c.batch_size, c.seed) == (2, 0)} for results in both
    ]
    every = sorted({lr for top in tops for _, lr in top})
    lines = [
        f"| hands / clothing, at rate | {' | '.join(f'{lr:.2g}' for lr in every)} |",
        "|---|" + "---|" * len(every),
    ]
    for norm in ("bn", "frozen", "brn", "cbn"):
        cells = [[_percent(top.get((norm, lr))) for top in tops] for lr in every]
        row = ["" if set(cell) == {"-"} else " / ".join(cell) for cell in cells]
        lines.append(f"| {LABELS[norm]} | {' | '.join(row)} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else "failed" if value < 0 else f"{value:.1f}"


def gap(studies: dict[str, Study]) -> str:
    """What recalibrated statistics change, at batch size 2."""
    pairs = [
        (name, studies[f"{name}-short"], studies[f"{name}-recalibrated"])
        for name in ("hands-v2", "clothing-v2")
        if f"{name}-recalibrated" in studies
    ]
    if not pairs:
        return NOT_YET
    heads = [f"{name.partition('-')[0]}: as trained | recalibrated | difference" for name, _, _ in pairs]
    lines = [f"| top-1 [%] | {' | '.join(heads)} |", "|---|" + "---|---|---|" * len(pairs)]
    for norm in ("bn", "frozen", "brn", "cbn"):
        row = []
        for _, plain, anew in pairs:
            before, after = plain.rows[norm, 2], anew.rows[norm, 2]
            failed = before.top1 is None or after.top1 is None
            row += [_shown(before), _shown(after), "" if failed else _difference(after, before)]
        lines.append(f"| {LABELS[norm]} | {' | '.join(row)} |")
    return "\n".join(lines)


def times() -> str:
    """Images and seconds until a validation top-1, means over seeds."""
    if not (RESULTS / "time_to_accuracy.json").is_file():
        return NOT_YET
    report = json.loads((RESULTS / "time_to_accuracy.json").read_text())
    lines = ["| images (seconds) until | " + " | ".join(f"{level} %" for level in report["levels"]) + " |"]
    lines.append("|---|" + "---|" * len(report["levels"]))
    for norm, size in dict.fromkeys((run["norm"], run["batch_size"]) for run in report["runs"]):
        runs = [r["evaluations"] for r in report["runs"] if (r["norm"], r["batch_size"]) == (norm, size)]
        row = []
        for level in report["levels"]:
            reached = [next((e for e in run if e["top1"] >= level), None) for run in runs]
            done = [e for e in reached if e is not None]
            row.append(
                f"{mean(e['images'] for e in done):.0f} ({mean(e['seconds'] for e in done):.0f})"
                if len(done) == len(runs)
                else f"{len(done)} of {len(runs)} runs"
            )
        lines.append(f"| {LABELS[norm]}, batch {size} | {' | '.join(row)} |")
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    source = f"{seeds}; `{report['command']}`, [JSON](BASE/benchmarks/results/time_to_accuracy.json)"
    return "\n".join([*lines, "", f"*{source}*"])


def main() -> None:
    studies = read()
    runs = sum(len(study.results) for study in studies.values())
    shown = {name: studies[name] for name in HEADLINE}
    readme = {"headline": headline(shown), "outcome": outcome(studies, ("pretrained",))}
    results = {
        "runs": f"{runs} runs in {len(studies)} comparisons.",
        "verdicts": verdicts(studies),
        "former": beside_former(studies),
        "outcome": outcome(studies),
        "rates": rates(studies),
        "gap": gap(studies),
        "times": times(),
        "study": every(studies),
    }
    fill(ROOT / "README.md", readme)
    fill(ROOT / "docs" / "results.md", results)


if __name__ == "__main__":
    main()
