"""python -m benchmarks.dense.report: writes the tables of docs/results.md from results/dense/*.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.dense.norms import ENCODER_RATE, parsed
from benchmarks.dense.plan import SEEDS, DenseColumn, results
from benchmarks.documents.readme import NOT_YET, fill
from benchmarks.provenance import RESULTS, ROOT
from cbn_convert.comparison.plan import score
from cbn_convert.comparison.summary import Row, difference, exceeds

TITLES = {
    "camvid-unet": "Street scenes, Unet",
    "camvid-deeplab": "Street scenes, DeepLabV3+",
    "bccd-fcos": "Blood cells, FCOS",
    "bccd-fcos-long": "Blood cells, FCOS, three times as long",
    "neu-fcos": "Steel defects, FCOS",
    "bccd-faster-rcnn": "Blood cells, Faster R-CNN",
    "bccd-faster-rcnn-long": "Blood cells, Faster R-CNN, three times as long",
}
METRICS = {"miou": "mIoU", "map": "mAP (AP50)"}
ENCODER = {"bn": "BN", "frozen": "frozen BN", "tune": "frozen BN, trained folded", "cbn": "CBN"}
NEW = {
    "bn": "BN", "gn": "GroupNorm", "cbn": "CBN",
    "new": "CBN, ring of {} iterations", "images": "CBN, carried window of {} images",
}  # fmt: skip


class Entry(NamedTuple):
    """A treatment at a batch size: the chosen rate's test metric over seeds, and means of others."""

    row: Row
    second: float | None
    validation: float  # of the seeds at the chosen rate
    searched: dict[float, float]  # validation metric of the first seed by rate, below zero if it failed
    complete: bool


class Dense(NamedTuple):
    """A task's report and what it says."""

    name: str
    report: dict[str, Any]
    entries: dict[tuple[str, int], Entry]

    @property
    def treatments(self) -> list[str]:
        return list(dict.fromkeys(treatment for treatment, _ in self.entries))

    @property
    def sizes(self) -> list[int]:
        return sorted({size for _, size in self.entries})

    def at(self, size: int) -> list[tuple[str, Entry]]:
        """The treatments at a batch size that have not failed."""
        return [(t, e) for (t, batch), e in self.entries.items() if batch == size and e.row.top1 is not None]


def has_cbn(treatment: str) -> bool:
    of = parsed(treatment)
    return of.encoder == "cbn" or of.new not in ("bn", "gn")


def read(folder: Path = RESULTS / "dense") -> list[Dense]:
    """The tasks of which a treatment at least is finished."""
    files = [(name, folder / f"{name}.json") for name in TITLES]
    found = [interpreted(name, json.loads(file.read_text())) for name, file in files if file.is_file()]
    return [study for study in found if study.entries]


def interpreted(name: str, report: dict[str, Any]) -> Dense:
    """The report by treatments and batch sizes, in the order in which they were begun."""
    settings = report["settings"]
    found = results(report["runs"], settings["metric"])
    seeds = max(SEEDS, 1 + max(run["seed"] for run in report["runs"]))
    entries = {}
    for treatment, size in dict.fromkeys((run["treatment"], run["batch"]) for run in report["runs"]):
        column = DenseColumn(settings["rate"], treatment, size, seeds)
        rate = column.best(found)
        searched = {c.lr: score(r) for c, r in found.items() if (c.norm, c.batch_size, c.seed) == (treatment, size, 0)}
        chosen = [r for c, r in found.items() if (c.norm, c.batch_size, c.lr) == (treatment, size, rate)]
        good = [r for r in chosen if "error" not in r]
        tests = [r["test"][settings["metric"]] for r in good]
        seconds = [r["test"]["ap50"] for r in good if "ap50" in r["test"]]
        failed = len(chosen) - len(good) if chosen else len(searched)
        row = Row(
            norm=treatment, batch_size=size, lr=rate, at_edge=column.at_edge(found),
            top1=statistics.mean(tests) if tests else None, std=statistics.stdev(tests) if len(tests) > 1 else None,
            seeds=len(tests), failed=failed,
            failure=next((r["error"] for r in chosen or found.values() if "error" in r), None),
            step_seconds=None, peak_memory=None,
        )  # fmt: skip
        complete = all(cell in found for cell in column.needed(found))
        second = statistics.mean(seconds) if seconds else None
        entries[treatment, size] = Entry(
            row, second, statistics.mean(map(score, good)) if good else -1.0, searched, complete
        )
    # a treatment that time did not suffice for says nothing
    return Dense(name, report, {key: entry for key, entry in entries.items() if entry.complete})


def parts(treatment: str) -> tuple[str, str]:
    """What encoder and new layers have, in words."""
    of = parsed(treatment)
    faster = "" if of.encoder_rate == ENCODER_RATE else f", rate × {of.encoder_rate:g}"
    return ENCODER[of.encoder] + faster, NEW[of.new].format(of.size)


def shown(entry: Entry) -> str:
    """The metric, the rate and what is to be said of them."""
    row = entry.row
    if row.top1 is None:
        return "failed"
    text = f"{row.top1:.1f}" + ("" if row.std is None else f" ± {row.std:.1f}")
    text += "" if entry.second is None else f" ({entry.second:.1f})"
    marks = " (edge)" * row.at_edge + f" ({row.failed} of {row.failed + row.seeds} failed)" * (row.failed > 0)
    return f"{text} @ {row.lr:.2g}, validation {entry.validation:.1f}{marks}"


def table(study: Dense) -> str:
    """Treatments in rows, batch sizes in columns."""
    settings = study.report["settings"]
    lines = [
        f"| encoder | new layers | {' | '.join(f'batch {size}' for size in study.sizes)} |",
        "|---|---|" + "---|" * len(study.sizes),
    ]
    best = {size: max(study.at(size), key=_test, default=("",))[0] for size in study.sizes}
    for treatment in study.treatments:
        cells = []
        for size in study.sizes:
            entry = study.entries.get((treatment, size))
            text = "" if entry is None else shown(entry)
            value, at, rest = text.partition(" @ ")
            cells.append(f"**{value}**{at}{rest}" if at and best[size] == treatment else text)
        lines.append(f"| {' | '.join([*parts(treatment), *cells])} |")
    most = max(entry.row.seeds for entry in study.entries.values())
    height, width = settings["size"]
    source = (
        f"{METRICS[settings['metric']]} [%] of the test split @ rate, validation at that rate, {width} × {height} px, "
        f"{settings['images']} images per run, {len(study.report['runs'])} runs, {most} seeds; "
        f"`{study.report['command']}`, "
        f"[JSON](BASE/benchmarks/results/dense/{study.name}.json)"
    )
    return "\n".join([*lines, "", f"*{source}*"])


def rates(study: Dense) -> str:
    """The searches: validation metric of the first seed at every rate."""
    every = sorted({rate for entry in study.entries.values() for rate in entry.searched})
    lines = [
        f"| validation, at rate | batch | {' | '.join(f'{rate:.2g}' for rate in every)} |",
        "|---|---|" + "---|" * len(every),
    ]
    for size in study.sizes:
        for treatment in study.treatments:
            if (treatment, size) in study.entries:
                values = [study.entries[treatment, size].searched.get(rate) for rate in every]
                texts = ["" if v is None else "failed" if v < 0 else f"{v:.1f}" for v in values]
                lines.append(f"| {' + '.join(parts(treatment))} | {size} | {' | '.join(texts)} |")
    return "\n".join(lines)


def verdicts(studies: list[Dense]) -> str:
    """CBN everywhere and one with CBN, as validation chooses, beside the best without, which the test split does."""
    heads = ("task", "batch", "best without CBN", "CBN everywhere", "ahead by", "with CBN", "ahead by")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    for study in studies:
        for size in study.sizes:
            without = [one for one in study.at(size) if not has_cbn(one[0])]
            having = [one for one in study.at(size) if has_cbn(one[0])]
            if not having or not without:
                continue
            rival, chosen, everywhere = max(without, key=_test), _chosen(having), ["not finished", ""]
            if found := _everywhere(having):
                own = _chosen(found)[1].row
                everywhere = [_value(own), _ahead(own, rival[1].row)]
            cells = [_named(*rival), *everywhere, _named(*chosen), _ahead(chosen[1].row, rival[1].row)]
            lines.append(f"| {TITLES[study.name]} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def _everywhere(having: list[tuple[str, Entry]]) -> list[tuple[str, Entry]]:
    return [one for one in having if parsed(one[0])[:2] == ("cbn", "cbn")]


def _chosen(having: list[tuple[str, Entry]]) -> tuple[str, Entry]:
    """What validation chooses."""
    return max(having, key=lambda one: one[1].validation)


def best_of_cbn(study: Dense, size: int) -> tuple[str, Entry] | None:
    """Of CBN everywhere, or where that was not finished of the treatments with CBN, what validation chooses."""
    having = [(t, e) for t, e in study.at(size) if has_cbn(t)]
    return _chosen(_everywhere(having) or having) if having else None


def _test(one: tuple[str, Entry]) -> float:
    return one[1].row.top1 or 0.0


def _value(row: Row) -> str:
    return f"{row.top1:.1f}" + ("" if row.std is None else f" ± {row.std:.1f}")


def _named(treatment: str, entry: Entry) -> str:
    return f"{_value(entry.row)} ({' + '.join(parts(treatment))})"


def _ahead(own: Row, other: Row) -> str:
    """In bold where it is more than twice the standard error of the difference."""
    higher, error = difference(own, other)
    text = f"{higher:+.1f}" + ("" if error is None else f" ± {error:.1f}")
    return f"**{text}**" if exceeds(own, other) or exceeds(other, own) else text


def tables(studies: list[Dense]) -> dict[str, str]:
    """By their names in the document."""
    sections = [f"### {TITLES[s.name]}\n\n{table(s)}\n\n{rates(s)}" for s in studies]
    return {"dense-verdicts": verdicts(studies), "dense": "\n\n".join(sections) or NOT_YET}


if __name__ == "__main__":
    fill(ROOT / "docs" / "results.md", tables(read()))
