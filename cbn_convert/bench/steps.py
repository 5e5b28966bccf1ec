"""Times training steps of one model with several norms, taking turns, so that a busy machine disturbs all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion import convert, warm_up
from ..deploy import fold
from ..errors import CbnError
from ..models import ModelSpec, create_model
from ..norm import CrossIterationMixin, Window
from ..norm.carried import FIRST_LOOKS
from ..training.alternatives import apply_norm
from ..training.faults import one_value


def _unfolded(model: nn.Module, example: Tensor) -> None:
    """CBN where nothing trains folded: the same function, applied to the convs' outputs."""
    convert(model, example_input=example)
    for module in model.modules():
        if isinstance(module, CrossIterationMixin) and module.trains_folded:
            module.bind(*module.producers)


COLUMNS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "bn": lambda model, example: None,
    "frozen": lambda model, example: apply_norm(model, "frozen"),
    "tune": lambda model, example: apply_norm(model, "tune", example_input=example),
    "cbn": lambda model, example: convert(model, example_input=example),
    "cbn-unfolded": _unfolded,
    "cbn-paper": lambda model, example: convert(model, example_input=example, window=Window.PAPER),
    "gn": lambda model, example: apply_norm(model, "gn"),
}


@dataclass(frozen=True)
class StepSettings:
    """What all norms of a benchmark have in common.

    Args:
        batch_size: images per step.
        img_size: height and width of the images in pixels.
        device: as torch.device takes it.
        dtype: float32, or what autocast is to compute in.
        channels_last: whether models and images are in that memory format.
        compile: whether models go through torch.compile.
    """

    batch_size: int = 2
    img_size: int = 224
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compile: bool = False

    def images(self) -> Tensor:
        """A batch of random images."""
        x = torch.randn(self.batch_size, 3, self.img_size, self.img_size, device=self.device)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


class BenchResult(NamedTuple):
    """Medians over the steps of one column; times in ms, memory in MB (10^6 bytes)."""

    column: str
    step: float
    forward: float
    backward: float
    optimizer: float
    over_bn: float  # median over rounds of the ratio to BN's step in the same round
    over_bn_quartiles: tuple[float, float]
    memory: float  # what lives between steps, and on CUDA the peak beside it, else what the graph holds
    history: float
    kept: float  # what the graph holds for the backward pass beside parameters and buffers
    kept_over_bn: float  # kept and history together, over BN's


class _Column:
    def __init__(self, name: str, arch: str, settings: StepSettings) -> None:
        torch.manual_seed(0)
        self.name, self.settings = name, settings
        example = torch.randn(2, 3, settings.img_size, settings.img_size)
        self.times: list[tuple[float, float, float]] = []
        self.model = _model(arch).train()
        COLUMNS[name](self.model, example)
        # what is timed is what goes on: not the first steps of the carried window, which all look at their batch
        if any(isinstance(m, CrossIterationMixin) and m.window.is_carried for m in self.model.modules()):
            side = min(64, example.shape[-1])
            warm_up(self.model, (torch.randn(2, 3, side, side) for _ in range(FIRST_LOOKS)))
        self.model.to(settings.device)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9)
        self.runner: Any = torch.compile(self.model) if settings.compile else self.model

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float, float]:
        """Seconds of the forward pass, the backward pass and the optimizer's step."""
        dtype = self.settings.dtype
        cast: AbstractContextManager[object] = (
            nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype)
        )
        marks = [_now(x.device)]
        with cast:
            loss = F.cross_entropy(self.runner(x), y)
        marks.append(_now(x.device))
        self.optimizer.zero_grad()
        loss.backward()
        marks.append(_now(x.device))
        self.optimizer.step()
        marks.append(_now(x.device))
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    def history(self) -> list[Tensor]:
        """The tensors of the window's past."""
        return [t for m in self.model.modules() if hasattr(m, "history_tensors") for t in m.history_tensors()]

    def memory(self, x: Tensor, y: Tensor) -> float:
        """MB of what lives between steps and of what a step adds to it; see BenchResult."""
        states = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        between = [*self.model.parameters(), *self.model.buffers(), *states, *self.history()]
        self.optimizer.zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(x, y)
            return (_bytes(between) + torch.cuda.max_memory_allocated() - before) / 1e6
        return _bytes(between) / 1e6 + self.kept(x)

    def kept(self, x: Tensor) -> float:
        """MB that the graph of a forward pass holds for the backward pass beside parameters and buffers."""
        return kept_bytes(self.model, x, self.history()) / 1e6


def kept_bytes(model: nn.Module, x: Tensor, beside: Iterable[Tensor] = ()) -> int:
    """What the graph of a forward pass holds for the backward pass beside parameters, buffers and other tensors."""
    own = (*model.parameters(), *model.buffers(), *beside)
    known = {t.untyped_storage().data_ptr() for t in own}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out  # the graph lives until here: no memory is counted that was given back and taken again
    return sum(held.values())


def bench_step(
    arch: str,
    columns: list[str],
    settings: StepSettings,
    *,
    steps: int = 10,
    untimed: int = 4,
    after_round: Callable[[int, int], None] = lambda done, rounds: None,
) -> list[BenchResult]:
    """Times a training step (SGD with momentum, cross-entropy, random images) of a timm model for each column.

    One round runs one step of every column. "bn" is always among the columns, as what `over_bn` refers to.

    Args:
        arch: timm's name of the model, which gets random weights.
        columns: names in `COLUMNS`.
        settings: of the step.
        steps: rounds that count.
        untimed: rounds before those that count.
        after_round: called with the number of rounds so far and that of all.

    Raises CbnError for an unknown column or architecture, or if a layer gets one value per channel.
    """
    unknown = [c for c in columns if c not in COLUMNS]
    if unknown:
        raise CbnError(f"unknown norm {unknown[0]!r} for the benchmark; choose from {', '.join(COLUMNS)}")
    gc.collect()  # a model and its hooks refer to each other: what benchmarks before this one used waits to be found
    x = settings.images()
    y = torch.arange(settings.batch_size, device=x.device) % 10
    order = ["bn", *(c for c in columns if c != "bn")]
    running = [_Column(name, arch, settings) for name in order]
    for i in range(untimed + steps):
        for column in running:
            try:
                times = column.step(x, y)
            except ValueError as error:
                if told := one_value(error, "use a larger --batch-size or --img-size"):
                    raise told from error
                raise
            if i >= untimed:
                column.times.append(times)
        after_round(i + 1, untimed + steps)
    base = [sum(t) for t in running[0].times]
    results: list[BenchResult] = []
    for column in running:
        totals = [sum(t) for t in column.times]
        forward, backward, optimizer = (1000 * median(part) for part in zip(*column.times, strict=True))
        ratios = [t / b for t, b in zip(totals, base, strict=True)]
        low, ratio, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        step, history = 1000 * median(totals), _bytes(column.history()) / 1e6
        most, kept = column.memory(x, y), column.kept(x)
        base_kept = kept if column.name == "bn" else results[0].kept
        results.append(
            BenchResult(
                column.name, step, forward, backward, optimizer, ratio, (low, high), most, history, kept,
                (kept + history) / base_kept,
            )
        )  # fmt: skip
    return results


@torch.no_grad()
def bench_inference(arch: str, settings: StepSettings, *, steps: int = 20) -> tuple[float, float]:
    """Median ms of timm's own model in eval, and the median ratio of the same model converted and folded into convs.

    `steps` forward passes of each count, after three that do not. Of the settings dtype and compile do not count.
    """
    plain, converted = _model(arch).eval(), _model(arch).eval()
    x = settings.images()
    convert(converted, example_input=x.cpu())
    folded = fold(converted, into="conv", example_input=x.cpu())
    plain, folded = plain.to(x.device), folded.to(x.device).eval()
    times: list[tuple[float, float]] = []
    for i in range(steps + 3):
        pair = []
        for model in (plain, folded):
            start = _now(x.device)
            model(x)
            pair.append(_now(x.device) - start)
        if i >= 3:
            times.append((pair[0], pair[1]))
    return 1000 * median(a for a, _ in times), median(b / a for a, b in times)


def _model(arch: str) -> Any:
    """With random weights, but statistics that have been measured: `convert` then does what it does for fine-tuning."""
    model = create_model(ModelSpec(arch, pretrained=False), num_classes=10)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the statistics of the one batch
    with torch.no_grad():
        model.train()(torch.randn(2, *model.pretrained_cfg["input_size"]))
    for norm, kept in zip(norms, momentum, strict=True):
        norm.momentum = kept
    return model


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
