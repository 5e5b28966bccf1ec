"""What new layers normalise by, from scratch: their own average, rings, and statistics that are never out of date.

    python -m benchmarks.study.from_scratch --data ../shared/data

A small ResNet from random weights on the hands, 2,000 updates of two images, SGD at two rates. In the rows "fresh" the
loss is that of two images, and BatchNorm's statistics are those of the same two and 14 others under today's weights:
what a window of 8 batches would be if nothing in it went out of date. With "own" the others give their gradient to the
layer's own weights only, as the compensation does, and with "all" to earlier layers as well. Writes
benchmarks/results/from_scratch.json after every cell; cells that are there already are not run again.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.provenance import RESULTS
from benchmarks.study.comparisons import DATA, FOLDERS, NETWORKS
from benchmarks.study.patched import measure, outcome
from cbn_convert.norm import new_layer

OUTPUT = RESULTS / "from_scratch.json"
LRS, STEPS, BATCH_SIZE, SEEDS = (0.03, 0.00949), 2000, 2, 2
# settings of FinetuneConfig; the share of the newest batch; or images of the statistics and who gets their gradient
ROWS: dict[str, dict[str, Any]] = {
    "bn": {"norm": "bn"},
    "cbn": {},
    "quarter": {"newest": 0.25},
    "none": {"compensation": "none"},
    **{f"ring-{k}": {"window": k} for k in (2, 8)},
    "fresh-all": {"fresh": (16, "all")},
    "fresh-own": {"fresh": (16, "own")},
}


def first_two(gradient: str) -> None:
    """Makes fine-tuning in this process learn from the first images of each batch; the rest is for the statistics."""
    from cbn_convert.training import learner

    loss = learner.Learner._loss

    def of_first(self: learner.Learner) -> Any:
        if gradient == "own":
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(rest_detached)
        mixup, full = loss(self)
        return mixup, lambda logits, labels: full(logits[:BATCH_SIZE], labels[:BATCH_SIZE])

    learner.Learner._loss = of_first  # type: ignore[method-assign]


def newest(share: float) -> None:
    """Makes new layers of this process give the newest batch such a share."""
    mock.patch.object(new_layer, "NEWEST", share).start()


def rest_detached(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The conv's input, of which only the images that count for the loss reach earlier layers."""
    return torch.cat([inputs[0][:BATCH_SIZE], inputs[0][BATCH_SIZE:].detach()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sign_digits/")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    folder = given.data.resolve() / FOLDERS["hands"]

    def run(cell: dict[str, Any]) -> dict[str, Any]:
        settings = dict(ROWS[cell["row"]])
        images, gradient = settings.pop("fresh", (BATCH_SIZE, ""))
        change: list[Any] | None = ["from_scratch", "first_two", gradient] if gradient else None
        if gradient:
            settings["norm"] = "bn"
        if "newest" in settings:
            change = ["from_scratch", "newest", settings.pop("newest")]
        config = {
            "data": str(folder), "model": NETWORKS["new"]["model"], "pretrained": False,
            "img_size": DATA["hands"]["img-size"], "hflip": 0.0, "min_scale": DATA["hands"]["min-scale"],
            "batch_size": images, "epochs": 100, "max_steps": STEPS, "eval_every": 500, "lr": cell["lr"],
            "seed": cell["seed"],
            **settings,
        }  # fmt: skip
        found = outcome(config, change)
        return {"top1": None if "error" in found else round(found["last_top1"], 2)}

    todo = [
        {"row": row, "lr": lr, "seed": seed}
        for seed, lr, row in product(range(SEEDS), LRS, ROWS)
        if (seed == 0 and lr == LRS[0]) or "fresh" not in ROWS[row]  # whose steps take four times as long
    ]
    measure(OUTPUT, "python -m benchmarks.study.from_scratch --data ../shared/data", todo, run, given.jobs)


if __name__ == "__main__":
    main()
