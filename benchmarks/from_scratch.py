"""Why long windows do not train from scratch: lengths of a ring, beside statistics that are never out of date.

    python benchmarks/from_scratch.py --data ../shared/data

A small ResNet from random weights on the hands, 2,000 updates of two images, SGD at one rate. In the rows "fresh" the
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

import torch
from patched import measure, outcome
from report import RESULTS
from study import DATA, FOLDERS, NETWORKS
from torch import Tensor, nn

OUTPUT = RESULTS / "from_scratch.json"
LR, STEPS, BATCH_SIZE, SEEDS = 0.03, 2000, 2, 2
# settings of FinetuneConfig, or images of the statistics and who gets their gradient
ROWS: dict[str, dict[str, Any]] = {
    "bn": {"norm": "bn"},
    **{f"ring-{k}": {"window": k} for k in (2, 8, 32)},  # the default is the first
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
        if gradient:
            settings["norm"] = "bn"
        config = {
            "data": str(folder), "model": NETWORKS["new"]["model"], "pretrained": False,
            "img_size": DATA["hands"]["img-size"], "hflip": 0.0, "min_scale": DATA["hands"]["min-scale"],
            "batch_size": images, "epochs": 100, "max_steps": STEPS, "eval_every": 500, "lr": cell["lr"],
            "seed": cell["seed"],
            **settings,
        }  # fmt: skip
        found = outcome(config, ["from_scratch", "first_two", gradient] if gradient else None)
        return {"top1": None if "error" in found else round(found["last_top1"], 2)}

    todo = [
        {"row": row, "lr": LR, "seed": seed}
        for seed, row in product(range(SEEDS), ROWS)
        if seed == 0 or "fresh" not in ROWS[row]  # whose steps take four times as long
    ]
    measure(OUTPUT, "python benchmarks/from_scratch.py --data ../shared/data", todo, run, given.jobs)


if __name__ == "__main__":
    main()
