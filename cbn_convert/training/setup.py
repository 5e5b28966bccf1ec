"""Everything that a run needs before its first step: settings, images, model, run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import set_seed
from timm.data import resolve_model_data_config

from .. import __version__
from ..classifier import reset_head
from ..conversion import norm_layers
from ..errors import ModelError, RunError
from ..files import check_output, check_replaceable, clean_up, remove_directory, write_json, writing
from ..models import create_model
from .alternatives import apply_norm
from .checkpoint import checkpoints
from .config import FinetuneConfig
from .description import build_described, describe, stored_description
from .environment import stored_environment
from .loading import StepSampler
from .optimization import freeze, frozen_modules
from .splits import Split, read_splits, refuse_among_images


@dataclass
class Setup:
    """What a run works with. `spec` is what `describe` says of the model, without the weights that it started from."""

    model: Any
    training: Split
    validation: Split
    data_config: dict[str, Any]
    spec: dict[str, Any]
    frozen: list[str]

    @property
    def images(self) -> dict[str, int]:
        """Images for training and for validation."""
        return {"train": len(self.training.samples), "val": len(self.validation.samples)}


def build(config: FinetuneConfig, resumed: bool = False) -> Setup:
    """The model with its norm layers and a new head, both splits, and timm's data config.

    A resumed run with a checkpoint is built without the weights that it started from, which need not be there any more.
    """
    training, validation = read_splits(config.data, config.val_fraction, config.seed)
    stored = stored_description(config.output) if resumed else None
    spec = config.model_spec()
    if config.drop_path:
        spec = replace(spec, model_kwargs={**spec.model_kwargs, "drop_path_rate": config.drop_path})
    set_seed(config.seed)
    count = len(training.classes)
    model = create_model(spec, count) if stored is None else build_described(stored, count)
    described = describe(model)
    reset_head(model)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ModelError(
                f"{config.model} has no activation checkpointing; leave out --grad-checkpointing"
            ) from error
    data_config = resolve_model_data_config(model)
    still = frozen_modules(model, config.freeze)
    freeze(model, still, config.head_lr_scale)
    apply_norm(
        model, config.norm, set(still) & set(norm_layers(model)),
        window=config.normalization_window(), example_input=torch.zeros(1, *data_config["input_size"]),
    )  # fmt: skip
    return Setup(model, training, validation, data_config, described, still)


def total_steps(config: FinetuneConfig, sampler: StepSampler) -> int:
    """Updates of the weights in the whole run."""
    return min(config.epochs * sampler.updates, config.max_steps or math.inf)  # type: ignore[return-value]


def prepare_folder(run: Path, config: FinetuneConfig, setup: Setup, ranks: int) -> None:
    """Writes the run's config.json, after deleting what an overwritten run has left.

    Raises RunError if either fails.

    Args:
        run: the run folder.
        config, setup: what is stored of the run.
        ranks: its processes.
    """
    try:
        for name in ("config.json", "metrics.jsonl", "curves.png", "results.json"):
            (run / name).unlink(missing_ok=True)
        for folder in [run / "best", *checkpoints(run), *(run / "checkpoints").glob("damaged-step-*")]:
            if folder.is_dir():
                remove_directory(folder)
    except OSError as error:
        raise RunError(f"cannot delete what is in {run}: {error.strerror}; choose another output folder") from error
    write_json(
        run / "config.json",
        {
            "config": config.to_dict(),
            "classes": setup.training.classes,
            "images": setup.images,
            "data_config": setup.data_config,
            "model": setup.spec,
            "lr": config.peak_lr(ranks),
            "processes": ranks,
            "environment": stored_environment(),
            "versions": {"cbn_convert": __version__, "torch": torch.__version__, "timm": timm.__version__},
        },
    )


def check_new(run: Path, data: str, overwrite: bool) -> None:
    """Raises RunError or DataError if a new run on these data must not be written there."""
    refuse_among_images(run, data)
    check_output(run, overwrite)
    for folder in [run / "best", *checkpoints(run)]:
        check_replaceable(folder)


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder, and cleans up what a killed one has left in it.

    Raises RunError if another process writes to it now.
    """
    import fcntl

    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    with file as lock:
        try:
            # unlike with flock, the processes that load images do not inherit it, and live on without their parent
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is writing to the run in {run}; wait for it or stop it") from None
        with writing(run):
            for folder in (run, run / "checkpoints"):
                clean_up(folder)
        yield
