"""Layers without a weight of their own, from pretrained statistics: windows and gradients of them alone.

    python benchmarks/unbound.py --data ../shared/data --work FOLDER

A pre-activation ResNet-18 of half the width from clothing to hands, 1,000 images, SGD: the comparison hands-preact of
study.py, whose first network it shares in FOLDER. The other layers have CBN's defaults. Writes
benchmarks/results/unbound.json after every cell; cells that are there already are not run again.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from patched import last_top1, measure
from report import RESULTS
from study import DATA, FOLDERS, NETWORKS, weights

OUTPUT = RESULTS / "unbound.json"
# images in the window of these layers, None for two iterations; gradient
ROWS: list[tuple[int | None, str]] = [
    (None, "straight_through"), (16, "straight_through"), (64, "straight_through"),
    (64, "full"), (512, "full"), (8192, "full"), (None, "frozen"),
]  # fmt: skip
IMAGES, BATCH_SIZE = 1000, 2
RATES = (9.5e-4, 3e-3, 9.5e-3, 3e-2)


def set_unbound(images: int | None, gradient: str) -> None:
    """Makes fine-tuning in this process give the layers without a weight this window and gradient."""
    from cbn_convert.norm import CrossIterationMixin
    from cbn_convert.training import setup

    convert = setup.apply_norm

    def apply_norm(model: Any, norm: str, *args: Any, **kwargs: Any) -> None:
        convert(model, norm, *args, **kwargs)
        for layer in model.modules():
            if isinstance(layer, CrossIterationMixin) and not layer.producers:
                window = 2 if images is None else images // BATCH_SIZE
                layer.set_window(window, layer.compensation, gradient, "ema", 0, False, start=layer.start)  # type: ignore[arg-type]

    setup.apply_norm = apply_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and sign_digits/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the network that is trained first")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    data = given.data.resolve()
    checkpoint = str(weights("preact", data, given.work.resolve(), given.jobs))

    def run(cell: dict[str, Any]) -> float | None:
        images, gradient = cell["images"], cell["gradient"]
        frozen = gradient == "frozen"
        config = {
            "data": str(data / FOLDERS["hands"]), "model": NETWORKS["preact"]["model"], "checkpoint": checkpoint,
            "model_kwargs": {"width_factor": 0.5}, "norm": "frozen" if frozen else "cbn",
            "img_size": DATA["hands"]["img-size"], "hflip": 0.0, "min_scale": DATA["hands"]["min-scale"],
            "batch_size": BATCH_SIZE, "epochs": 2, "max_steps": IMAGES // BATCH_SIZE, "lr": cell["lr"],
        }  # fmt: skip
        return last_top1(config, None if frozen else ["unbound", "set_unbound", images, gradient])

    todo = [{"images": images, "gradient": gradient, "lr": lr} for (images, gradient), lr in product(ROWS, RATES)]
    measure(OUTPUT, "python benchmarks/unbound.py --data ../shared/data --work study", todo, run, given.jobs)


if __name__ == "__main__":
    main()
