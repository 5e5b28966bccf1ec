"""From a run to a folder for plain timm, checked by loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open

from ..deploy import FOLD_TARGETS, export
from ..deploy.class_map import CLASS_MAP, unwritable_class
from ..deploy.graphs import TOLERANCE, check_onnx_installed, random_images, relative_difference
from ..errors import ExportError
from ..files import check_output
from .config import read_run
from .trained import load_trained


def export_run(
    trained: str | Path,
    output: str | Path,
    fold: Any = "bn",
    *,
    onnx: bool = False,
    torch_export: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Exports the best model of a run, or an exported folder again with another fold; `onnx` etc. as in `export`.

    Returns output, files, fold, classes and relative_difference: of the outputs of plain timm with the written folder
    to those of the trained model, on random images.

    Args:
        trained: a run folder or an exported folder.
        output: the folder to write.
        fold, onnx, torch_export, overwrite: as in `export`.
        dry_run: writes nothing, so that there is no relative_difference.

    Raises ExportError for an unknown fold, for a GroupNorm run, or if the difference is above TOLERANCE, and what
    `load_trained` and `export` raise.
    """
    if fold not in FOLD_TARGETS:
        raise ExportError(f"fold must be one of {', '.join(FOLD_TARGETS)}, got {fold!r}")
    if onnx:
        check_onnx_installed()
    check_output(Path(output), overwrite)
    model, classes = load_trained(trained)
    run = read_run(trained) if (Path(trained) / "metrics.jsonl").is_file() else None
    if run and run["config"].get("norm") == "gn":
        raise ExportError(
            f"{trained} was trained with GroupNorm, which plain timm does not build for this architecture; "
            "export a run with another --norm"
        )
    files = ["model.safetensors", "config.json", "README.md", *[CLASS_MAP] * (unwritable_class(classes) is None)]
    files += ["model.onnx"] * onnx + ["model.pt2"] * torch_export
    result: dict[str, Any] = {"output": str(output), "files": files, "fold": fold, "classes": classes}
    if dry_run:
        return result
    export(
        model, output, fold=fold, class_names=classes, data_config=run and run["data_config"],
        metadata=_metadata(Path(trained, "best" if run else "")), onnx=onnx, torch_export=torch_export,
        overwrite=overwrite,
    )  # fmt: skip
    plain = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    images = random_images(2, model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        difference = relative_difference(plain(images), model(images))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{output}: plain timm's outputs differ by {difference:.1e} from the trained model's; "
            "do not use this folder, export with --fold bn"
        )
    return {**result, "relative_difference": difference}


def _metadata(folder: Path) -> dict[str, Any]:
    """What `export` was told when it wrote the folder; empty for a folder that timm wrote."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads((file.metadata() or {}).get("cbn_convert", "{}"))
