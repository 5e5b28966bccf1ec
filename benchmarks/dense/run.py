"""Trains detectors and segmentation networks with every treatment of `dense.norms`; a run that is stopped goes on.

    python -m benchmarks.dense.run --data ../shared/data --task camvid-unet [--budget-minutes 60]

SGD with momentum 0.9 and weight decay 1e-4, warm-up over 5 % of the steps, cosine decay, gradients clipped to a norm
of 5; the encoder learns at 0.3 of the rate, or as the treatment says. Images are flipped at random, and every run
sees as many. Writes benchmarks/results/dense/TASK.json after every run; a kill loses the one in progress. Rates are
chosen on the validation split. The test split is looked at in the runs that may be the chosen ones when they end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dense import norms
from benchmarks.dense.data import Pairs, batches
from benchmarks.dense.plan import SEEDS, DenseColumn, results, runs
from benchmarks.dense.tasks import TASKS, WEIGHTS, Task, pretrained, scaled
from benchmarks.provenance import RESULTS, provenance
from cbn_convert.comparison.plan import Cell, score
from cbn_convert.files import replaced_file

OUTPUT = RESULTS / "dense"
TREATMENTS = {
    "segmentation": (
        "bn", "frozen+bn", "frozen+gn", "tune+gn", "cbn", "cbn+gn", "cbn+new:8", "cbn+new:32", "cbn+images:64",
    ),
    "detection": ("bn", "frozen+bn", "frozen+gn", "tune+gn", "cbn", "cbn+gn"),
}  # fmt: skip
PROTOCOL = {
    "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "clip": 5.0, "encoder_rate": norms.ENCODER_RATE,
    "warm_up": 0.05, "schedule": "cosine",
}  # fmt: skip


class Study:
    """A task, its images and its records, which lie in a JSON file."""

    def __init__(self, name: str, task: Task, root: Path, output: Path, weights: dict[str, Tensor]) -> None:
        self.name, self.task, self.root, self.output, self.weights = name, task, root, output, weights
        self.settings = {**task.settings(), **PROTOCOL}
        self.splits: dict[str, Pairs] = {}
        self.records: list[dict[str, Any]] = []
        if output.is_file():
            report = json.loads(output.read_text())
            if report["settings"] != self.settings:
                raise SystemExit(f"{output} is of other settings; move it away or choose another --output")
            self.records = report["runs"]

    def pairs(self, split: str) -> Pairs:
        """The images of a split, read once."""
        if split not in self.splits:
            self.splits[split] = self.task.pairs(self.root, split)
        return self.splits[split]

    def go_on(self, columns: Sequence[DenseColumn], seconds: float = math.inf) -> bool:
        """Runs what is missing of some columns, as far as the time goes; returns whether all is there."""
        started = time.monotonic()
        found = results(self.records, self.task.metric)
        for cell in runs(columns, found):
            typical = statistics.median([r["seconds"] for r in self.records] or [0.0])
            if time.monotonic() - started + typical > seconds:
                return False
            same = [score(r) for c, r in found.items() if (c.norm, c.batch_size) == (cell.norm, cell.batch_size)]
            record = self.run(cell, at_least=-1.0 if cell.seed else max(same, default=-1.0))
            self.records.append(record)
            self.write()
            found.update(results([record], self.task.metric))
            print(json.dumps(record), file=sys.stderr, flush=True)
        return True

    def run(self, cell: Cell, at_least: float) -> dict[str, Any]:
        """One training and its metrics; those of the test split if that of validation is no less than `at_least`."""
        started = time.perf_counter()
        record: dict[str, Any] = {
            "task": self.name, "treatment": cell.norm, "batch": cell.batch_size, "lr": cell.lr, "seed": cell.seed,
        }  # fmt: skip
        record |= self.trained(cell)
        model = record.pop("model")
        if not record["diverged"]:
            record["val"] = self.measured(model, "val")
            if record["val"][self.task.metric] >= at_least:
                record["test"] = self.measured(model, "test")
        made = provenance("")
        return {
            **record, "seconds": round(time.perf_counter() - started, 1), "commit": made["commit"],
            "versions": made["versions"], "machine": made["machine"],
        }  # fmt: skip

    def measured(self, model: nn.Module, split: str) -> dict[str, float]:
        """The metrics of a split, rounded."""
        return {k: round(v, 3) for k, v in self.task.evaluate(model, self.pairs(split)).items()}

    def prepared(self, cell: Cell) -> nn.Module:
        """The network with its treatment; the same new weights for every treatment."""
        torch.manual_seed(cell.seed)
        model = self.task.build(self.weights)
        root = self.task.root(model)
        example = scaled(image for image, _ in self.pairs("train")[:2])

        def prime() -> None:
            images, _ = next(batches(self.pairs("train"), min(16, len(self.pairs("train"))), cell.seed))
            root(scaled(images))

        norms.apply(root, self.task.encoder, cell.norm, example, prime)
        return model

    def trained(self, cell: Cell) -> dict[str, Any]:
        """The network after its images, with what is to be said of the training."""
        task, batch = self.task, cell.batch_size
        model = self.prepared(cell)
        of_encoder = {id(p) for p in task.root(model).get_submodule(task.encoder).parameters()}
        groups = [
            {"params": [p for p in model.parameters() if (id(p) in of_encoder) == inner], "lr": cell.lr * factor}
            for inner, factor in ((True, norms.parsed(cell.norm).encoder_rate), (False, 1.0))
        ]
        steps = max(1, task.images // batch)
        warm = max(1, round(steps * PROTOCOL["warm_up"]))
        optimizer = torch.optim.SGD(groups, momentum=PROTOCOL["momentum"], weight_decay=PROTOCOL["weight_decay"])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
        )
        torch.manual_seed(cell.seed)  # of dropout and of the boxes that are sampled
        losses: list[float] = []
        model.train()
        started = time.perf_counter()
        error = None
        try:
            for images, targets in self.batches(cell, steps):
                loss = task.loss(model, images, targets)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    error = f"the loss is {losses[-1]} in step {len(losses)} of {steps}"
                    break
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), PROTOCOL["clip"])
                optimizer.step()
                schedule.step()
        except ValueError as refused:
            if "more than 1 value per channel" not in str(refused):  # BatchNorm after a global pooling, at batch size 1
                raise
            error = str(refused)
        tail = losses[-max(1, steps // 10) :]
        finite = error is None and all(bool(t.isfinite().all()) for t in model.state_dict().values())
        return {
            "model": model, "steps": len(losses), "loss": round(sum(tail) / len(tail), 4) if finite else None,
            "train_seconds": round(time.perf_counter() - started, 1), "diverged": not finite,
            **({} if error is None else {"error": error}),
        }  # fmt: skip

    def batches(self, cell: Cell, steps: int) -> Iterator[tuple[list[Tensor], list[Any]]]:
        """Those of a run."""
        return islice(batches(self.pairs("train"), cell.batch_size, cell.seed), steps)

    def write(self) -> None:
        """Replaces the file at once, one run per line."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        sizes = ",".join(str(size) for size in dict.fromkeys(r["batch"] for r in self.records))
        command = f"python -m benchmarks.dense.run --data ../shared/data --task {self.name} --batch-sizes {sizes}"
        treatments = list(dict.fromkeys(r["treatment"] for r in self.records))
        if set(treatments) != set(default_treatments(self.task)):
            command += f" --treatments {','.join(treatments)}"
        report = {**provenance(command), "task": self.name, "settings": self.settings, "runs": self.records}
        text = json.dumps(report).replace('"runs": [{', '"runs": [\n{').replace('}, {"task"', '},\n{"task"')
        with replaced_file(self.output) as file:
            file.write(text + "\n")


def columns(task: Task, treatments: Sequence[str], sizes: Sequence[int], seeds: int) -> list[DenseColumn]:
    """Treatments at batch sizes; raises ValueError for a treatment that there is not."""
    for treatment in treatments:
        norms.parsed(treatment)
    return [DenseColumn(task.rate, treatment, size, seeds) for size in sizes for treatment in treatments]


def default_treatments(task: Task) -> tuple[str, ...]:
    """What is compared where --treatments says nothing."""
    return TREATMENTS["segmentation" if task.metric == "miou" else "detection"]


def main(arguments: Sequence[str] | None = None, tasks: Mapping[str, Task] = TASKS) -> int:
    """Returns 0 if all is there, 3 if the budget ended first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with bccd/, neu_det/, camvid/ and weights/")
    parser.add_argument("--task", choices=list(tasks), required=True)
    parser.add_argument("--treatments", help="see benchmarks/dense/norms.py, separated by commas")
    parser.add_argument("--batch-sizes", default="2", help="separated by commas, one after the other")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/dense/TASK.json")
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = tasks[given.task]
    chosen = given.treatments.split(",") if given.treatments else default_treatments(task)
    try:
        wanted = columns(task, chosen, [int(size) for size in given.batch_sizes.split(",")], given.seeds)
    except ValueError as error:
        parser.error(str(error))
    if missing := [name for name in (task.folder, WEIGHTS) if not (given.data / name).exists()]:
        parser.error(f"--data {given.data} has no {missing[0]}; benchmarks/data/fetch.py gets it")
    output = given.output or OUTPUT / f"{given.task}.json"
    study = Study(given.task, task, given.data, output, pretrained(given.data))
    complete = study.go_on(wanted, 60 * given.budget_minutes)
    print(f"{output}: {len(study.records)} runs, {'all' if complete else 'not all'} that were asked for")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
