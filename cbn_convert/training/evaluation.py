"""Accuracy of a model, a run or an exported folder on a folder of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import DataError, RunError
from ..files import read_json
from ..models import ModelSpec, create_model, load_weights
from .config import read_run
from .data import batches, evaluation_split, make_loader
from .norms import apply_norm


@dataclass(frozen=True)
class Evaluation:
    """Loss (cross-entropy) and accuracies in percent over `images` images."""

    images: int
    loss: float
    top1: float
    top5: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Evaluation:
    """Evaluates the model, put into eval mode, on all batches of the loader."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    images = 0
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        logits = model(x).float()
        k = min(5, logits.shape[1])
        hits = logits.topk(k).indices == y[:, None]
        sums += torch.stack([F.cross_entropy(logits, y, reduction="sum"), hits[:, 0].sum(), hits.any(1).sum()])
        images += len(y)
    loss, top1, top5 = (sums / images).tolist()
    return Evaluation(images, loss, 100 * top1, 100 * top5)


def load_run(run: str | Path) -> tuple[Any, list[str]]:
    """The best model of a run, with plain BatchNorm (GroupNorm for a "gn" run), and its class names.

    Raises RunError if `run` is no run folder or has no best model yet, ModelError if the weights are damaged.
    """
    stored = read_run(run)
    best = Path(run) / "best"
    if not (best / "model.safetensors").is_file():
        raise RunError(f"{run} has no best model yet; let the run finish an epoch")
    if stored["config"].get("norm") == "gn":
        model = _group_norm_model(best)
    else:
        model = create_model(ModelSpec(f"local-dir:{best}"))
    return model.eval(), list(stored["classes"])


def _group_norm_model(best: Path) -> Any:
    """timm's loader knows nothing of the GroupNorm layers, so they are put in before the weights are read."""
    about = read_json(best / "config.json", "model settings")
    model = create_model(ModelSpec(about["architecture"], pretrained=False, model_kwargs=about.get("model_args", {})))
    apply_norm(model, "gn")
    load_weights(model, best / "model.safetensors")
    model.pretrained_cfg = {**model.pretrained_cfg, **about["pretrained_cfg"]}
    return model


def load_trained(path: str | Path) -> tuple[Any, list[str]]:
    """Model and class names of a run folder or of an exported folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder} does not exist; give a run folder or an exported folder")
    if (folder / "metrics.jsonl").is_file():
        return load_run(folder)
    model = create_model(ModelSpec(f"local-dir:{folder}"))
    labels = read_json(folder / "config.json", "model settings").get("label_names")
    if not labels:
        raise RunError(f"{folder}/config.json has no label_names, so its outputs are of unknown classes; export a run")
    return model.eval(), list(labels)


def evaluate(
    trained: str | Path,
    data: str,
    *,
    split: str | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
) -> Evaluation:
    """Evaluates a run's best model, or an exported folder, on data/`split` (default: val/ if there, else `data`).

    Raises RunError, ModelError or DataError, each naming the folder or file.
    """
    if batch_size < 1:
        raise RunError(f"batch_size must be at least 1, got {batch_size}")
    model, classes = load_trained(trained)
    images = evaluation_split(data, classes, split)
    if not images.samples:
        raise DataError(f"{data} holds no images to evaluate on")
    where = resolve_device(device)
    loader = make_loader(images, resolve_model_data_config(model), batch_size, workers)
    return accuracy(model.to(where), batches(loader), where)


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises RunError if it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next((name for name in ("cuda", "mps") if available[name]), "cpu"))
    if not available.get(device):
        raise RunError(f"device {device} is not available on this machine; use --device cpu or auto")
    return torch.device(device)
