"""From a run to a folder for plain timm, checked by loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from ..deploy import FOLD_TARGETS, export
from ..errors import ExportError
from ..files import check_output
from .config import read_run
from .evaluation import load_trained

TOLERANCE = 1e-4  # relative, in float32; a fold into the conv weights rounds differently, nothing else does


def export_run(
    trained: str | Path, output: str | Path, fold: Any = "bn", *, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Exports the best model of a run, or an exported folder again with another fold.

    Returns output, fold, classes and relative_difference: of the outputs of plain timm with the written folder to
    those of the trained model, on random images. Raises ExportError for an unknown fold, for a GroupNorm run, or if the
    difference is above TOLERANCE, and what `load_trained` and `export` raise.
    """
    if fold not in FOLD_TARGETS:
        raise ExportError(f"fold must be one of {', '.join(FOLD_TARGETS)}, got {fold!r}")
    check_output(Path(output), overwrite)
    model, classes = load_trained(trained)
    if (Path(trained) / "metrics.jsonl").is_file() and read_run(trained)["config"].get("norm") == "gn":
        raise ExportError(
            f"{trained} was trained with GroupNorm, which plain timm does not build for this architecture; "
            "export a run with another --norm"
        )
    result: dict[str, Any] = {"output": str(output), "fold": fold, "classes": classes}
    if dry_run:
        return result
    export(model, output, fold=fold, class_names=classes, overwrite=overwrite)
    plain = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model(images).double(), plain(images).double()
    difference = float((got - expected).norm() / expected.norm().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{output}: plain timm's outputs differ by {difference:.1e} from the trained model's; "
            "do not use this folder, export with --fold bn"
        )
    return {**result, "relative_difference": difference}
