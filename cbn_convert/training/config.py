"""Settings of a fine-tuning run: defaults, validation, and what is stored with the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..conversion import DEFAULT_HISTORY, DEFAULT_WINDOW
from ..errors import RunError
from ..files import read_json
from ..models import ModelSpec
from ..norm import check_window_options
from .norms import NORMS

DEFAULT_LR = {"sgd": 3e-3, "adamw": 3e-4}
OPTIMIZERS = tuple(DEFAULT_LR)
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass
class FinetuneConfig:
    """Arguments of `finetune`; the ones of the model are those of `ModelSpec`.

    data: folder with train/ and val/, one subfolder per class in each; or, with `val_fraction`, a folder without val/.
    output: run folder. norm: "cbn", "bn", "frozen" (running statistics fixed), "gn" (GroupNorm), "brn" (Batch
    Renormalization). window to burn_in: as in CrossIterationBatchNorm2d. lr: peak of a cosine schedule that warms up
    over `warmup_ratio` of the steps; by default 3e-3 with "sgd" and 3e-4 with "adamw". clip_grad: largest norm of the
    gradient, longer ones are shortened to it; 0 lets every length pass. max_steps: ends earlier, the schedule included.
    no_aug: resize and crop only.
    device: "auto" takes a GPU where there is one.
    """

    data: str
    model: str
    output: str
    arch: str | None = None
    checkpoint: str | None = None
    pretrained: bool = True
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int | None = None
    norm: str = "cbn"
    window: int = DEFAULT_WINDOW
    compensation: str = "projection"
    gradient: str = "full"
    history: str = DEFAULT_HISTORY
    burn_in: int = 0
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 2
    lr: float | None = None
    clip_grad: float = 5.0
    opt: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    label_smoothing: float = 0.1
    val_fraction: float | None = None
    no_aug: bool = False
    seed: int = 0
    workers: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.lr is None:
            self.lr = DEFAULT_LR.get(self.opt)

    def check(self) -> None:
        """Raises RunError for the first argument that is out of range."""
        for name, allowed in (("norm", NORMS), ("opt", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise RunError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, low in (("epochs", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < low:
                raise RunError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name, low in (("max_steps", 1), ("img_size", 1)):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise RunError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise RunError(f"seed must be at least 0 and below 2147483648, got {self.seed}")
        if self.lr is None or not self.lr > 0:
            raise RunError(f"lr must be above 0, got {self.lr}")
        for name in ("warmup_ratio", "label_smoothing", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("weight_decay", "clip_grad"):
            if not getattr(self, name) >= 0:
                raise RunError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise RunError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        try:
            check_window_options(self.window, self.compensation, self.gradient, self.history, self.burn_in)
        except ValueError as error:
            raise RunError(str(error)) from None

    def model_spec(self) -> ModelSpec:
        """The part that describes the model."""
        return ModelSpec(**{f.name: getattr(self, f.name) for f in fields(ModelSpec)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What a reader of the exported model wants to know, without the paths of this machine."""
        names = ["norm", "epochs", "batch_size", "opt", "lr"]
        if self.norm == "cbn":
            names[1:1] = ["window", "compensation", "gradient", "history"]
        return {"data": Path(self.data).resolve().name, **{name: getattr(self, name) for name in names}}

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
        try:
            for name in ("mean", "std"):
                if stored.get(name) is not None:
                    stored[name] = tuple(stored[name])
            config = cls(**stored)
            config.check()
        except TypeError as error:
            raise RunError(
                f"{run}/config.json has a setting of the wrong type ({error}); the file is damaged"
            ) from error
        return config


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
    """Outcome of a run. top-1 in percent on the validation images, times in seconds of training without evaluation."""

    output: str
    norm: str
    steps: int
    best_top1: float
    best_epoch: int
    last_top1: float
    train_seconds: float
    median_step_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
