"""The settings of a fine-tuning run in parts, each as much as some of its readers need: default, help, limits.

The command line makes its flags from these tables, and `config` one object of all parts. They need no torch, so that
--help answers at once.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import RunError

if TYPE_CHECKING:
    from ..norm import Window

NORMS = ("cbn", "bn", "frozen", "tune", "gn", "brn")
SCHEDULES = ("cosine", "linear", "constant")
CLASS_BALANCES = ("none", "sample", "weight")
PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
ON_NAN = ("stop", "skip")


def _setting(default: Any, help: str, **rules: Any) -> Any:
    """A field with what the command line and `check` need: least, below, choices, flags, metavar."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass
class ModelSettings:
    """What is fine-tuned, and from which weights."""

    PANEL: ClassVar[str] = "Model and weights"

    arch: str | None = _setting(None, "timm name, for a .safetensors file.")
    checkpoint: str | None = _setting(
        None, "Weights: .safetensors or of torch.save, also of other tools.", metavar="FILE"
    )
    pretrained: bool = _setting(True, "Pretrained or random weights.", flags=("--pretrained/--no-pretrained",))
    model_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "For timm.create_model: k=v,k=v, e.g. pad_type=same.",
            "metavar": "K=V,..",
            "type": str,
        },
    )
    mean: tuple[float, ...] | None = _setting(
        None, "Channel means, e.g. 0.5,0.5,0.5, or one for all.", type=str, metavar="M,M,M"
    )
    std: tuple[float, ...] | None = _setting(None, "Channel standard deviations.", type=str, metavar="S,S,S")
    in_chans: int | None = _setting(
        None, "Channels of the images, e.g. 1 for greyscale; default: as the model has.", least=1
    )
    img_size: int | None = _setting(None, "Height and width of the input.", least=1)
    drop_path: float = _setting(0.0, "Stochastic depth rate.", least=0, below=1)
    freeze: str | None = _setting(
        None,
        "Parts whose weights and statistics stay: stem, stage1, .., or a pattern of names.",
        metavar="PART,..",
    )


@dataclass
class MethodSettings:
    """What the norm layers become; window to burn_in are those of CrossIterationBatchNorm2d."""

    PANEL: ClassVar[str] = "Method"

    norm: str = _setting(
        "cbn",
        "cbn; or, to compare: bn, frozen (fixed statistics), tune (frozen, trained through the folded conv), "
        "gn (GroupNorm), brn (Batch Renormalization).",
        choices=NORMS,
    )
    window: int | None = _setting(
        None, "Iterations of a ring, 1 is BN; with --history ema images; default: ema of 8192 images.", least=1
    )
    compensation: str = _setting("projection", "projection, taylor (the paper's), none.")
    gradient: str = _setting("full", "full, or current (the paper's code).")
    history: str | None = _setting(
        None,
        "ema (running statistics that follow) or ring (the paper's); default: ring with --window, else ema.",
    )
    start: str | None = _setting(
        None, "With ema: running (from the statistics; the default) or empty (as new layers do)."
    )
    burn_in: int = _setting(0, "Iterations at the start of a ring that use their own batch only.", least=0)
    sync_cbn: bool = _setting(False, "Share each batch's statistics among processes.")
    ema: float | None = _setting(
        None,
        "Evaluate an average of weights and statistics with this decay, e.g. 0.999.",
        least=0,
        below=1,
        metavar="DECAY",
    )
    recalibrate: int | None = _setting(
        None,
        "Before evaluating, measure the statistics anew on so many batches; default: 0; 32 for bn and brn with --ema.",
        least=0,
        metavar="BATCHES",
    )

    def normalization_window(self) -> Window:
        """What layers normalise by with norm "cbn". Raises ValueError for settings that do not go together."""
        from ..norm import window_of

        names = ("compensation", "gradient", "history", "start", "burn_in")
        return window_of(self.window, {**{name: getattr(self, name) for name in names}, "sync": self.sync_cbn})  # type: ignore[typeddict-item]

    @property
    def recalibration_batches(self) -> int:
        """Batches on which the statistics are measured anew before an evaluation."""
        if self.recalibrate is not None:
            return self.recalibrate
        # frozen BN and CBN are trained with the statistics that they have
        return 32 if self.ema is not None and self.norm in ("bn", "brn") else 0


@dataclass
class TrainingSettings:
    """How long, in which steps, towards which target."""

    PANEL: ClassVar[str] = "Training"

    epochs: int = _setting(10, "Passes over the data.", least=1)
    max_steps: int | None = _setting(None, "End after so many updates.", least=1)
    batch_size: int = _setting(2, "Images per step and process.", least=1, flags=("--batch-size", "-b"))
    accumulate: int = _setting(1, "Steps per update of the weights.", least=1)
    label_smoothing: float = _setting(0.1, "Part of the target spread over all classes.", least=0, below=1)
    class_balance: str = _setting(
        "none",
        "For unequal classes: none, sample (each equally often), weight (in the loss).",
        choices=CLASS_BALANCES,
    )
    eval_every: int | None = _setting(None, "Updates between evaluations; default: an epoch.", least=1)
    patience: int | None = _setting(None, "Stop after so many evaluations without a new best.", least=1)
    seed: int = _setting(0, "Of everything random.", least=0, below=2**31)


@dataclass
class OptimizerSettings:
    """How the weights learn. lr: None is a rule, see `FinetuneConfig.peak_lr`."""

    PANEL: ClassVar[str] = "Optimizer and schedule"

    lr: float | None = _setting(
        None,
        "Peak learning rate, or auto: 3e-3 (sgd) or 3e-4 (adamw) x sqrt(images per update / 2); frozen: a third.",
        type=str,
        metavar="RATE|auto",
    )
    opt: str = _setting("sgd", "sgd (Nesterov), adamw; with --lr any of timm's.")
    momentum: float = _setting(0.9, "Of sgd.", least=0, below=1)
    weight_decay: float = _setting(1e-4, "Not applied to norms and biases.", least=0)
    clip_grad: float = _setting(5.0, "Largest norm of the gradient; 0 for no limit.", least=0)
    layer_decay: float | None = _setting(
        None, "Factor of the rate from a block to the one below, e.g. 0.75.", above=0, most=1
    )
    head_lr_scale: float = _setting(
        1.0, "Factor of the classifier's rate over that of the rest, e.g. 10.", above=0, below=math.inf
    )
    sched: str = _setting("cosine", "cosine, linear or constant, after the warm-up.", choices=SCHEDULES)
    warmup_ratio: float = _setting(0.05, "Part of the updates in which the rate rises.", least=0, below=1)


@dataclass
class DataSettings:
    """Which images, and what is done to them."""

    PANEL: ClassVar[str] = "Data and augmentation"

    val_fraction: float | None = _setting(
        None, "Hold out this part of each class; for a folder without val/.", above=0, below=1
    )
    no_aug: bool = _setting(False, "Resize and crop only, no random changes.")
    min_scale: float = _setting(0.08, "Smallest part of the image that a random crop shows.", above=0, most=1)
    hflip: float = _setting(0.5, "Probability of a left-right flip.", least=0, most=1)
    vflip: float = _setting(0.0, "Probability of an upside-down flip.", least=0, most=1)
    color_jitter: float = _setting(0.4, "Strength of colour changes.", least=0)
    auto_augment: str | None = _setting(
        None,
        "timm's policy, e.g. rand-m9-mstd0.5 (RandAugment).",
        flags=("--auto-augment", "--aa"),
        metavar="POLICY",
    )
    random_erasing: float = _setting(0.0, "Probability of erasing a rectangle.", least=0, most=1)
    mixup: float = _setting(0.0, "Mixup alpha; needs an even batch size.", least=0)
    cutmix: float = _setting(0.0, "CutMix alpha; needs an even batch size.", least=0)
    workers: int = _setting(2, "Processes that load images.", least=0)
    skip_bad_images: bool = _setting(False, "Leave out unreadable images, and list them.")


@dataclass
class SpeedSettings:
    """Where and how a run computes."""

    PANEL: ClassVar[str] = "Speed and memory"

    device: str = _setting("auto", "auto, cpu, cuda or mps.", choices=DEVICES)
    mixed_precision: str = _setting("no", "no, bf16, or fp16 (with loss scaling).", choices=PRECISIONS)
    channels_last: bool = _setting(False, "Memory format of images and weights.")
    compile: bool = _setting(False, "torch.compile.")
    grad_checkpointing: bool = _setting(False, "Recompute activations instead of keeping them.")


@dataclass
class RunSettings:
    """What a run writes, and when it stops."""

    PANEL: ClassVar[str] = "Run and checkpoints"

    save_every: int | None = _setting(None, "Updates between checkpoints, beside each evaluation.", least=1)
    keep: int = _setting(2, "Checkpoints to keep.", least=1)
    on_nan: str = _setting("stop", "When a gradient is not finite: stop, or skip that update.", choices=ON_NAN)
    tracker: str | None = _setting(None, "tensorboard, wandb or another of accelerate's trackers.")


PARTS = (
    ModelSettings, MethodSettings, TrainingSettings, OptimizerSettings, DataSettings, SpeedSettings, RunSettings,
)  # fmt: skip


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "dict": (dict,), "tuple": (tuple, list),
}  # fmt: skip
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def check_setting(name: str, value: Any, setting: Field[Any]) -> None:
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
