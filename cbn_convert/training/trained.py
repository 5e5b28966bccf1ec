"""What a run or an export has left: the model, its classes, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config

from ..deploy.class_map import known_classes
from ..errors import DataError, RunError
from ..models import ModelSpec, create_model, load_weights
from .alternatives import apply_norm
from .config import read_run
from .description import build_described, stored_description
from .evaluation import Evaluation, accuracy, resolve_device
from .loading import batches, plain_loader
from .splits import evaluation_split


def load_run(run: str | Path) -> tuple[Any, list[str]]:
    """The best model of a run, with plain BatchNorm (GroupNorm for a "gn" run), and its class names.

    Raises RunError if `run` is no run folder or has no best model yet, ModelError if the weights are damaged.
    """
    stored = read_run(run)
    best = Path(run) / "best"
    if not (best / "model.safetensors").is_file():
        raise RunError(f"{run} has no best model yet; let the run finish an epoch")
    if stored["config"].get("norm") == "gn":
        model = build_described(stored_description(run), len(stored["classes"]))
        apply_norm(model, "gn")  # which timm's loader knows nothing of, so it comes before the weights
        load_weights(model, best / "model.safetensors")
    else:
        model = create_model(ModelSpec(f"local-dir:{best}"))
    return model.eval(), list(stored["classes"])


def load_trained(path: str | Path) -> tuple[Any, list[str]]:
    """Model and class names of a run folder or of an exported folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder} does not exist; give a run folder or an exported folder")
    if (folder / "metrics.jsonl").is_file():
        return load_run(folder)
    if not (folder / "config.json").is_file():
        raise RunError(
            f"{folder} is neither a run folder nor an exported one: it has no config.json; give one of these"
        )
    model = create_model(ModelSpec(f"local-dir:{folder}"))
    if not (labels := known_classes(model)):
        raise RunError(f"{folder}/config.json has no label_names, so its outputs are of unknown classes; export a run")
    return model.eval(), labels


def evaluate(
    trained: str | Path,
    data: str,
    *,
    split: str | None = None,
    batch_size: int = 32,
    workers: int = 2,
    device: str = "auto",
    skip_bad_images: bool = False,
) -> Evaluation:
    """Evaluates a run's best model, or an exported folder, on data/`split`.

    Args:
        trained: a run folder or an exported folder.
        data: a folder of images, or a name, as in `FinetuneConfig`.
        split: by default the first of val/, valid/, validation/ and test/ that is there, else `data` itself, unless it
            has train/.
        batch_size: images per batch.
        workers: processes that load images.
        device: "cpu", "cuda", "mps", or "auto" for a GPU where there is one.
        skip_bad_images: whether files that cannot be read are left out, and named in the outcome.

    Raises RunError, ModelError or DataError, each naming the folder, file or argument.
    """
    if batch_size < 1:
        raise RunError(f"batch_size must be at least 1, got {batch_size}")
    model, classes = load_trained(trained)
    images = evaluation_split(data, classes, split)
    if not images.samples:
        raise DataError(f"{data} holds no images to evaluate on")
    where = resolve_device(device)
    data_config = resolve_model_data_config(model)
    loader = plain_loader(images, data_config, batch_size, workers, skip_bad=skip_bad_images)
    result = accuracy(model.to(where), batches(loader), where)
    assert result is not None
    return result
