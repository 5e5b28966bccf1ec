"""All settings of a fine-tuning run as one object, what is stored with the run, and its outcome."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..files import read_json
from .settings import (
    PARTS,
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    SpeedSettings,
    TrainingSettings,
    check_setting,
)

if TYPE_CHECKING:
    from ..models import ModelSpec

DEFAULT_LR = {"sgd": 3e-3, "adamw": 3e-4}
DEFAULT_LR_IMAGES = 2  # images per update that these are for
FROZEN_LR = 10**-0.5  # what frozen BN can bear of it (docs/results.md)


@dataclass
class Places:
    """What every run is given."""

    data: str
    model: str
    output: str


# dataclasses take the fields of the last base first
@dataclass
class FinetuneConfig(
    RunSettings, SpeedSettings, DataSettings, OptimizerSettings, TrainingSettings, MethodSettings, ModelSettings, Places
):
    """Arguments of `finetune`: those of all parts; `cbn finetune --help` describes each.

    Args:
        data: folder with train/ and val/, one subfolder per class in each; or, with `val_fraction`, a folder without
            val/; or "hfds/NAME", a data set of Hugging Face with images of one label; or "wds/FOLDER", tar files of
            WebDataset.
        model: timm name, hf-hub:OWNER/NAME, local-dir:DIR, or a .safetensors file.
        output: run folder.
        lr: None is a rule, see `peak_lr`.
        window: this to burn_in are as in CrossIterationBatchNorm2d.
    """

    def check(self) -> None:
        """Raises RunError for the first argument that is of another type or out of range."""
        for f in fields(self):
            check_setting(f.name, getattr(self, f.name), f)
        if self.lr is None and self.opt not in DEFAULT_LR:
            raise RunError(f"lr has no automatic value for opt {self.opt!r}, only for sgd and adamw; give a rate")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise RunError(f"lr must be above 0, got {self.lr}")
        if self.in_chans is not None and "in_chans" in self.model_kwargs:
            raise RunError("in_chans is in model_kwargs, too; leave it out there")
        if self.norm == "gn" and self.freeze:
            raise RunError("freeze keeps BatchNorm's statistics, and a GroupNorm run has none; leave out norm 'gn'")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise RunError(f"mixup and cutmix mix pairs of images, so batch_size must be even, got {self.batch_size}")
        try:
            self.normalization_window()
        except ValueError as error:
            raise RunError(str(error)) from None

    def peak_lr(self, ranks: int = 1) -> float:
        """`lr`; or, where it is None, 3e-3 ("sgd") or 3e-4 ("adamw") for 2 images per update of all `ranks` processes.

        For other numbers it grows with their square root (docs/training.md has the evidence). Frozen BN gets 0.32 of
        it, since it diverges at such rates.
        """
        if self.lr is not None:
            return self.lr
        rate = DEFAULT_LR[self.opt] * math.sqrt(self.batch_size * self.accumulate * ranks / DEFAULT_LR_IMAGES)
        return rate * FROZEN_LR if self.norm in ("frozen", "tune") else rate

    def model_spec(self) -> ModelSpec:
        """The part that describes the model."""
        from ..models import ModelSpec

        channels = {} if self.in_chans is None else {"in_chans": self.in_chans}
        settings = {f.name: getattr(self, f.name) for f in fields(ModelSpec)}
        return ModelSpec(**{**settings, "model_kwargs": {**self.model_kwargs, **channels}})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def summary(self, ranks: int) -> dict[str, Any]:
        """What a reader of the exported model wants to know of a run of so many processes, without paths."""
        names = ["epochs", "batch_size", "opt"]
        if self.norm == "cbn":
            window = self.normalization_window()
            described = {
                "window": window.size,
                **{n: getattr(window, n) for n in ("compensation", "gradient", "history")},
            }
        else:
            described = {}
        factors = {n: getattr(self, n) for n in ("layer_decay", "head_lr_scale") if getattr(self, n) not in (None, 1)}
        return {
            "data": Path(self.data).resolve().name, "norm": self.norm, **described,
            **{name: getattr(self, name) for name in names}, "lr": self.peak_lr(ranks), **factors,
        }  # fmt: skip

    @classmethod
    def of_run(cls, run: str | Path) -> FinetuneConfig:
        """The settings stored in a run folder. Raises RunError if it is none."""
        stored = read_run(run)["config"]
        known = {f.name for f in fields(cls)}
        odd = sorted(set(stored) - known)
        if odd:
            raise RunError(
                f"{run}/config.json has settings unknown here ({', '.join(odd)}); use the version that wrote it"
            )
        for name in ("mean", "std"):
            if isinstance(stored.get(name), list):
                stored[name] = tuple(stored[name])
        try:
            config = cls(**stored)
            config.check()
        except (TypeError, RunError) as error:
            raise RunError(
                f"{run}/config.json has a setting that does not fit ({error}); the file is damaged"
            ) from error
        return config


def panel(name: str) -> str:
    """The heading in --help of the part that a setting belongs to."""
    return next(part.PANEL for part in PARTS if name in part.__dataclass_fields__)


def read_run(run: str | Path) -> dict[str, Any]:
    """The content of a run's config.json: config, classes, data_config. Raises RunError if `run` is no run folder."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise RunError(f"{run} is not a run folder: it has no config.json")
    stored = read_json(path, "run settings")
    keys = {"config": dict, "classes": list, "images": dict, "data_config": dict}
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), kind) for k, kind in keys.items()):
        raise RunError(f"{path} is not the config.json of a run; give the folder that `cbn finetune -o` wrote")
    return stored


@dataclass(frozen=True)
class FinetuneResult:
    """Outcome of a run.

    top-1 and top-5 in percent on the validation images. Times in seconds of training without evaluation, by the last
    process; loader_wait is the part of them spent waiting for images. peak_memory: largest GPU memory in MB. skipped:
    updates left out because a gradient was not finite; bad_images: files that could not be read. statistics_shift: how
    far the images' statistics are from the pretrained ones in nats, None for random weights; advice: what the study
    says of the norm on such images.
    """

    output: str
    norm: str
    steps: int
    best_top1: float
    best_top5: float
    best_epoch: int
    best_step: int
    last_top1: float
    train_seconds: float
    median_step_seconds: float
    images_per_second: float
    loader_wait: float
    peak_memory: float | None
    skipped: int
    bad_images: list[str]
    stopped_early: bool
    statistics_shift: float | None
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
