"""Settings of a fine-tuning run: defaults, help, limits, and what is stored with the run.

The table below is the only one: the command line makes its flags from it. It needs no torch, so that --help answers at
once.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..files import read_json

if TYPE_CHECKING:
    from ..models import ModelSpec
    from ..norm import Window

NORMS = ("cbn", "bn", "frozen", "tune", "gn", "brn")
DEFAULT_LR = {"sgd": 3e-3, "adamw": 3e-4}
DEFAULT_LR_IMAGES = 2  # images per update that these are for
FROZEN_LR = 10**-0.5  # what frozen BN can bear of it (docs/results.md)
SCHEDULES = ("cosine", "linear", "constant")
CLASS_BALANCES = ("none", "sample", "weight")
PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
ON_NAN = ("stop", "skip")

MODEL, METHOD, TRAINING = "Model and weights", "Method", "Training"
OPTIMIZER, DATA, SPEED, RUN = (
    "Optimizer and schedule",
    "Data and augmentation",
    "Speed and memory",
    "Run and checkpoints",
)
PANELS = (MODEL, METHOD, TRAINING, OPTIMIZER, DATA, SPEED, RUN)


def _setting(default: Any, panel: str, help: str, **rules: Any) -> Any:
    """A field with what the command line and `check` need: least, below, choices, flags, metavar."""
    metadata = {"panel": panel, "help": help, **rules}
    return field(default=default, metadata=metadata)


@dataclass
class FinetuneConfig:
    """Arguments of `finetune`; `cbn finetune --help` describes each, the model's are those of `ModelSpec`.

    data: folder with train/ and val/, one subfolder per class in each; or, with `val_fraction`, a folder without val/;
    or "hfds/NAME", a data set of Hugging Face with images of one label; or "wds/FOLDER", tar files of WebDataset.
    output: run folder. lr: None is a rule, see `peak_lr`. window to burn_in: as in CrossIterationBatchNorm2d.
    """

    data: str
    model: str
    output: str

    arch: str | None = _setting(None, MODEL, "timm name, for a .safetensors file.")
    checkpoint: str | None = _setting(
        None, MODEL, "Weights: .safetensors or of torch.save, also of other tools.", metavar="FILE"
    )
    pretrained: bool = _setting(True, MODEL, "Pretrained or random weights.", flags=("--pretrained/--no-pretrained",))
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "panel": MODEL, "help": "For timm.create_model, e.g. pad_type=same.", "metavar": "K=V,..", "type": str,
        },
    )  # fmt: skip
    mean: tuple[float, ...] | None = _setting(
        None, MODEL, "Channel means, e.g. 0.5,0.5,0.5, or one for all.", type=str, metavar="M,M,M"
    )
    std: tuple[float, ...] | None = _setting(None, MODEL, "Channel standard deviations.", type=str, metavar="S,S,S")
    in_chans: int | None = _setting(
        None, MODEL, "Channels of the images, e.g. 1 for greyscale; default: as the model has.", least=1
    )
    img_size: int | None = _setting(None, MODEL, "Height and width of the input.", least=1)
    drop_path: float = _setting(0.0, MODEL, "Stochastic depth rate.", least=0, below=1)
    freeze: str | None = _setting(
        None, MODEL, "Parts whose weights and statistics stay: stem, stage1, .., or a pattern of names.",
        metavar="PART,..",
    )  # fmt: skip

    norm: str = _setting(
        "cbn", METHOD,
        "cbn; or, to compare: bn, frozen (fixed statistics), tune (frozen, trained through the folded conv), "
        "gn (GroupNorm), brn (Batch Renormalization).",
        choices=NORMS,
    )  # fmt: skip
    window: int | None = _setting(
        None, METHOD, "Iterations of a ring, 1 is BN; with --history ema images; default: ema of 8192 images.", least=1
    )
    compensation: str = _setting("projection", METHOD, "projection, taylor (the paper's), none.")
    gradient: str = _setting("full", METHOD, "full, or current (the paper's code).")
    history: str | None = _setting(
        None,
        METHOD,
        "ema (running statistics that follow) or ring (the paper's); default: ring with --window, else ema.",
    )
    start: str | None = _setting(
        None, METHOD, "With ema: running (from the statistics; the default) or empty (as new layers do)."
    )
    burn_in: int = _setting(0, METHOD, "Iterations at the start of a ring that use their own batch only.", least=0)
    sync_cbn: bool = _setting(False, METHOD, "Share each batch's statistics among processes.")
    ema: float | None = _setting(
        None, METHOD, "Evaluate an average of weights and statistics with this decay, e.g. 0.999.", least=0, below=1,
        metavar="DECAY",
    )  # fmt: skip
    recalibrate: int | None = _setting(
        None, METHOD,
        "Before evaluating, measure the statistics anew on so many batches; default: 0; 32 for bn and brn with --ema.",
        least=0, metavar="BATCHES",
    )  # fmt: skip

    epochs: int = _setting(10, TRAINING, "Passes over the data.", least=1)
    max_steps: int | None = _setting(None, TRAINING, "End after so many updates.", least=1)
    batch_size: int = _setting(2, TRAINING, "Images per step and process.", least=1, flags=("--batch-size", "-b"))
    accumulate: int = _setting(1, TRAINING, "Steps per update of the weights.", least=1)
    label_smoothing: float = _setting(0.1, TRAINING, "Part of the target spread over all classes.", least=0, below=1)
    class_balance: str = _setting(
        "none", TRAINING, "For unequal classes: none, sample (each equally often), weight (in the loss).",
        choices=CLASS_BALANCES,
    )  # fmt: skip
    eval_every: int | None = _setting(None, TRAINING, "Updates between evaluations; default: an epoch.", least=1)
    patience: int | None = _setting(None, TRAINING, "Stop after so many evaluations without a new best.", least=1)
    seed: int = _setting(0, TRAINING, "Of everything random.", least=0, below=2**31)

    lr: float | None = _setting(
        None, OPTIMIZER,
        "Peak learning rate, or auto: 3e-3 (sgd) or 3e-4 (adamw) x sqrt(images per update / 2); frozen: a third.",
        type=str, metavar="RATE|auto",
    )  # fmt: skip
    opt: str = _setting("sgd", OPTIMIZER, "sgd (Nesterov), adamw; with --lr any of timm's.")
    momentum: float = _setting(0.9, OPTIMIZER, "Of sgd.", least=0, below=1)
    weight_decay: float = _setting(1e-4, OPTIMIZER, "Not applied to norms and biases.", least=0)
    clip_grad: float = _setting(5.0, OPTIMIZER, "Largest norm of the gradient; 0 for no limit.", least=0)
    layer_decay: float | None = _setting(
        None, OPTIMIZER, "Factor of the rate from a block to the one below, e.g. 0.75.", above=0, most=1
    )
    sched: str = _setting("cosine", OPTIMIZER, "cosine, linear or constant, after the warm-up.", choices=SCHEDULES)
    warmup_ratio: float = _setting(0.05, OPTIMIZER, "Part of the updates in which the rate rises.", least=0, below=1)

    val_fraction: float | None = _setting(
        None, DATA, "Hold out this part of each class; for a folder without val/.", above=0, below=1
    )
    no_aug: bool = _setting(False, DATA, "Resize and crop only, no random changes.")
    min_scale: float = _setting(0.08, DATA, "Smallest part of the image that a random crop shows.", above=0, most=1)
    hflip: float = _setting(0.5, DATA, "Probability of a left-right flip.", least=0, most=1)
    vflip: float = _setting(0.0, DATA, "Probability of an upside-down flip.", least=0, most=1)
    color_jitter: float = _setting(0.4, DATA, "Strength of colour changes.", least=0)
    auto_augment: str | None = _setting(
        None, DATA, "timm's policy, e.g. rand-m9-mstd0.5 (RandAugment).", flags=("--auto-augment", "--aa"),
        metavar="POLICY",
    )  # fmt: skip
    random_erasing: float = _setting(0.0, DATA, "Probability of erasing a rectangle.", least=0, most=1)
    mixup: float = _setting(0.0, DATA, "Mixup alpha; needs an even batch size.", least=0)
    cutmix: float = _setting(0.0, DATA, "CutMix alpha; needs an even batch size.", least=0)
    workers: int = _setting(2, DATA, "Processes that load images.", least=0)
    skip_bad_images: bool = _setting(False, DATA, "Leave out unreadable images, and list them.")

    device: str = _setting("auto", SPEED, "auto, cpu, cuda or mps.", choices=DEVICES)
    mixed_precision: str = _setting("no", SPEED, "no, bf16, or fp16 (with loss scaling).", choices=PRECISIONS)
    channels_last: bool = _setting(False, SPEED, "Memory format of images and weights.")
    compile: bool = _setting(False, SPEED, "torch.compile.")
    grad_checkpointing: bool = _setting(False, SPEED, "Recompute activations instead of keeping them.")

    save_every: int | None = _setting(None, RUN, "Updates between checkpoints, beside each evaluation.", least=1)
    keep: int = _setting(2, RUN, "Checkpoints to keep.", least=1)
    on_nan: str = _setting("stop", RUN, "When a gradient is not finite: stop, or skip that update.", choices=ON_NAN)
    tracker: str | None = _setting(None, RUN, "tensorboard, wandb or another of accelerate's trackers.")

    def check(self) -> None:
        """Raises RunError for the first argument that is of another type or out of range."""
        for f in fields(self):
            _check(f.name, getattr(self, f.name), f)
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

    def normalization_window(self) -> Window:
        """What layers normalise by with norm "cbn". Raises ValueError for settings that do not go together."""
        from ..norm import window_of

        names = ("compensation", "gradient", "history", "start", "burn_in")
        return window_of(self.window, {**{name: getattr(self, name) for name in names}, "sync": self.sync_cbn})  # type: ignore[typeddict-item]

    def peak_lr(self, ranks: int = 1) -> float:
        """`lr`; or, where it is None, 3e-3 ("sgd") or 3e-4 ("adamw") for 2 images per update of all `ranks` processes.

        For other numbers it grows with their square root (docs/training.md has the evidence). Frozen BN gets 0.32 of
        it, since it diverges at such rates.
        """
        if self.lr is not None:
            return self.lr
        rate = DEFAULT_LR[self.opt] * math.sqrt(self.batch_size * self.accumulate * ranks / DEFAULT_LR_IMAGES)
        return rate * FROZEN_LR if self.norm in ("frozen", "tune") else rate

    @property
    def recalibration_batches(self) -> int:
        """Batches on which the statistics are measured anew before an evaluation."""
        if self.recalibrate is not None:
            return self.recalibrate
        # frozen BN and CBN are trained with the statistics that they have
        return 32 if self.ema is not None and self.norm in ("bn", "brn") else 0

    def model_spec(self) -> ModelSpec:
        """The part that describes the model."""
        from ..models import ModelSpec

        channels = {} if self.in_chans is None else {"in_chans": self.in_chans}
        settings = {f.name: getattr(self, f.name) for f in fields(ModelSpec)}
        return ModelSpec(**{**settings, "model_kwargs": {**self.model_kwargs, **channels}})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What a reader of the exported model wants to know, without the paths of this machine."""
        names = ["epochs", "batch_size", "opt"]
        if self.norm == "cbn":
            window = self.normalization_window()
            described = {
                "window": window.size,
                **{n: getattr(window, n) for n in ("compensation", "gradient", "history")},
            }
        else:
            described = {}
        return {
            "data": Path(self.data).resolve().name, "norm": self.norm, **described,
            **{name: getattr(self, name) for name in names}, "lr": self.peak_lr(),
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


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "dict": (dict,), "tuple": (tuple, list),
}  # fmt: skip
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def _check(name: str, value: Any, setting: Field[Any]) -> None:
    """Raises RunError if the value is not of the field's type, none of its choices or outside its limits."""
    if value is None and setting.default is None:
        return
    kind = re.match(r"\w+", str(setting.type)).group()  # type: ignore[union-attr]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise RunError(f"{name} must be of type {kind}, got {value!r}")
    choices = setting.metadata.get("choices")
    if choices and value not in choices:
        raise RunError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    limits = {
        words: (holds, setting.metadata[rule]) for rule, (words, holds) in _LIMITS.items() if rule in setting.metadata
    }
    if not all(holds(value, limit) for holds, limit in limits.values()):
        wanted = " and ".join(f"{words} {limit}" for words, (_, limit) in limits.items())
        raise RunError(f"{name} must be {wanted}, got {value}")


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
