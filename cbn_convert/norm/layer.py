"""Cross-Iteration Batch Normalization layers: drop-in subclasses of the BatchNorm that they stand for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from .distributed import joined_mean, joined_statistics, total, world_size
from .functional import (
    COMPENSATIONS,
    GRADIENTS,
    Compensation,
    Gradient,
    Moments,
    Reader,
    Running,
    WindowNormalize,
    by_group,
    per_channel,
    response,
    statistics_dtype,
)
from .history import HISTORIES, History, HistoryKind
from .kernels import Kernels, select
from .moments import InputPatches, exact_is_possible
from .producers import Producer, is_producer, out_channels, theta_and_bias
from .tap import InputTap


def name_of_activation(act: nn.Module | None, known: frozenset[str]) -> str:
    """The name under which kernels apply an activation module; empty if they cannot, or if somebody watches it."""
    name = _ACTIVATIONS.get(type(act), "")
    watched = act is not None and any(
        (act._forward_hooks, act._forward_pre_hooks, act._backward_hooks, act._backward_pre_hooks)
    )
    return name if name in known and not watched else ""


_ACTIVATIONS: dict[type | None, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _as_it_is(t: Tensor) -> Tensor:
    return t


def check_window_options(
    window: int,
    compensation: str,
    gradient: str,
    history: str,
    burn_in: int,
    moments_every: int = 1,
    moments_positions: int | None = None,
) -> None:
    """Raises ValueError, naming the argument and what it may be, unless all are valid."""
    numbers: list[tuple[str, int, int]] = [
        ("window", window, 1), ("burn_in", burn_in, 0), ("moments_every", moments_every, 1),
    ]  # fmt: skip
    if moments_positions is not None:
        numbers.append(("moments_positions", moments_positions, 1))
    for name, number, least in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if moments_every > 1 and history == "ring":
        raise ValueError(f'moments_every={moments_every} needs history="ema"; a ring keeps every iteration as it was')
    for name, value, allowed in (
        ("compensation", compensation, COMPENSATIONS),
        ("gradient", gradient, GRADIENTS),
        ("history", history, HISTORIES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


class CrossIterationMixin(_BatchNorm):
    """Turns the BatchNorm class that follows it into a cross-iteration one.

    All that it adds to an instance are `WINDOW_ATTRIBUTES`, so that a conversion can give them to an existing layer
    (`set_window`) and take them away again (`remove_window`).
    """

    window: int
    compensation: Compensation
    gradient: Gradient
    burn_in: int
    sync: bool
    moments_positions: int | None

    WINDOW_ATTRIBUTES = (
        "window", "compensation", "gradient", "burn_in", "sync", "moments_positions", "iteration", "_history", "_tap",
    )  # fmt: skip

    def __init__(
        self,
        *args: Any,
        window: int = 8,
        compensation: Compensation = "projection",
        gradient: Gradient = "full",
        history: HistoryKind = "ring",
        burn_in: int = 0,
        sync: bool = False,
        moments_every: int = 1,
        moments_positions: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_window(window, compensation, gradient, history, burn_in, sync, moments_every, moments_positions)

    def set_window(
        self,
        window: int,
        compensation: Compensation,
        gradient: Gradient,
        history: HistoryKind,
        burn_in: int,
        sync: bool,
        moments_every: int = 1,
        moments_positions: int | None = None,
        phase: int = 0,
    ) -> None:
        """Starts with an empty history and unbound; `phase` shifts the iterations that bring moments (`History`)."""
        check_window_options(window, compensation, gradient, history, burn_in, moments_every, moments_positions)
        self.window = window
        self.compensation = compensation
        self.gradient = gradient
        self.burn_in = burn_in
        self.sync = sync
        self.moments_positions = moments_positions
        self.iteration = 0
        self._history = History(window, history, moments_every, phase)
        self._tap: InputTap | None = None

    def remove_window(self) -> None:
        """Removes every trace of the window from the instance and the hook from its producer."""
        self._unbind()
        for name in self.WINDOW_ATTRIBUTES:
            delattr(self, name)

    @property
    def history(self) -> HistoryKind:
        """The kind of history, "ring" or "ema"."""
        return self._history.kind

    @property
    def moments_every(self) -> int:
        """How many iterations share one estimate of how the statistics respond to the weights."""
        return self._history.every

    @property
    def producer(self) -> Producer | None:
        """The module whose weight produces this layer's input, None if not bound."""
        return None if self._tap is None else self._tap.module

    def bind(self, module: nn.Module) -> Self:
        """Names the conv or linear layer whose output is this layer's input; returns self.

        Raises TypeError for a module whose output is not weight · patch + bias, or for which compensation "exact" is
        not to be had; ValueError if the channels differ.
        """
        if not is_producer(module):
            raise TypeError(
                f"cannot bind to {type(module).__name__}: its output is not known to be weight * patch + bias; bind "
                "to a conv, transposed conv, linear or weight-standardised conv of torch or timm, or leave it unbound"
            )
        if self.compensation == "exact" and not exact_is_possible(module):
            raise TypeError(f'compensation "exact" is not known for {type(module).__name__}; use "projection"')
        channels = out_channels(module)
        if channels != self.num_features:
            raise ValueError(f"cannot bind: the module has {channels} output channels, the norm {self.num_features}")
        self._unbind()
        self._tap = InputTap(module, self)
        self._history.clear()
        return self

    def _unbind(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = None

    def reset_history(self) -> None:
        """Forgets the past iterations; the next forward pass uses its own batch alone."""
        self._history.clear()

    def reset_running_stats(self) -> None:
        """Resets the running statistics as BatchNorm does, and the history: both are to be estimated anew."""
        super().reset_running_stats()
        if "_history" in self.__dict__:
            self.reset_history()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_history()

    def history_tensors(self) -> list[Tensor]:
        """The tensors that hold the past, to account for their memory."""
        return self._history.tensors()

    def history_state(self) -> dict[str, Any]:
        """What a bit-identical resume needs beside the state_dict; tensors and numbers only."""
        return {"iteration": self.iteration, **self._history.state_dict()}

    def load_history_state(self, state: dict[str, Any]) -> None:
        """Restores `history_state`; load weights first, since that empties the history.

        Raises ValueError if it was taken with another window, kind of history or number of channels.
        """
        channels = {len(t) for name, t in state["slots"].items() if name in ("mean", "var")}
        if channels - {self.num_features}:
            raise ValueError(f"history is of a layer with {channels.pop()} channels, this one has {self.num_features}")
        self._history.load_state_dict(state)
        self.iteration = int(state["iteration"])

    def normalize(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """Normalises x [N, C, ...]: over the window in training, exactly as BatchNorm in evaluation; then `act`."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected input with {self.num_features} channels, got {tuple(x.shape)}")
        if self.training:
            if torch.compiler.is_compiling():
                compiled: Tensor = torch.compiler.disable(self._normalize_by_window)(x, act)
                return compiled
            return self._normalize_by_window(x, act)
        y = self._normalize_by_running_statistics(x)
        return y if act is None else act(y)

    def _normalize_by_running_statistics(self, x: Tensor) -> Tensor:
        by_batch = self.running_mean is None and self.running_var is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps)

    def _normalize_by_window(self, x: Tensor, act: nn.Module | None) -> Tensor:
        source, source_input = None, None
        if self._tap is not None:
            source_input = self._tap.take()
            if self._tap.followed:
                source = self._tap.module
                self._tap.check_output(x)
        kernels = select(x)
        fused = name_of_activation(act, kernels.ACTIVATIONS)
        # statistics, history and compensation are float32 whatever autocast does
        with _without_autocast(x):
            y = self._window_over(x, source, source_input, kernels, fused)
        return y if act is None or fused else act(y)

    def _window_over(
        self, x: Tensor, source: Producer | None, source_input: Tensor | None, kernels: Kernels, act: str
    ) -> Tensor:
        ranks = world_size() if self.sync else 1
        if x.numel() == 0 and ranks == 1:
            return self._normalize_by_running_statistics(x)
        # Inside a backward pass this is activation checkpointing at work: nothing may be counted a second time.
        recomputing = torch._C._current_graph_task_id() != -1
        theta, bias = (None, None) if source is None else theta_and_bias(source, statistics_dtype(x))
        with torch.no_grad():
            positions: float | Tensor = x.numel() / x.shape[1]
            spare = None
            if ranks == 1:
                mean, var, spare = kernels.statistics(x)
            else:
                positions, mean, var = joined_statistics(x)
            past = self._history.past(mean, source is not None, recomputing)
            if self.iteration - recomputing < self.burn_in:
                past = None
            newest_weight = 1.0 if past is None else self._history.newest_weight
            count = positions / newest_weight
            # one rank alone can tell without waiting for the device
            single = ranks == 1 and count == 1
            if single and not self.track_running_stats:
                raise ValueError(f"expected more than 1 value per channel in training, got input size {x.shape}")
            pooled = self.momentum is None and self.window > 1
            buffers = None if recomputing or single else self._running_statistics
            window, finite = kernels.window(
                mean, var, past, newest_weight, theta, bias, self.compensation, self.gradient,
                None if pooled or buffers is None else self._running(buffers, count),
            )  # fmt: skip
            if not recomputing:
                self.iteration += 1
                if buffers is not None:
                    if pooled:
                        _pool_running_statistics(buffers, mean, var, finite)
                    buffers[2].add_(finite)
                if self.window > 1:
                    moments = Moments(mean, var)
                    if source is not None and theta is not None and self._history.due:
                        moments = self._with_patches(moments, source, source_input, x, theta, bias, ranks)
                    self._history.stage(moments, finite)
        if single:
            # one value per channel has no variance, but it counts for the window, which fills from here
            return self._normalize_by_running_statistics(x)
        reader = Reader()
        y: Tensor = WindowNormalize.apply(
            x, theta, bias, self.weight, self.bias, window, self.eps, positions, total if ranks > 1 else None,
            kernels, (spare,), reader, act,
        )  # fmt: skip
        if y.requires_grad and window.covariance is not None:
            self._history.read_by(reader)
        return y

    def _with_patches(
        self,
        moments: Moments,
        source: Producer,
        y: Tensor | None,
        x: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        ranks: int,
    ) -> Moments:
        """Adds what compensation will need: `source` made x from y with θ [C, F] and bias [C]."""
        if y is None:
            raise RuntimeError(
                f"{type(self).__name__} is bound to a {type(source).__name__} that has not run since the last forward "
                "pass; bind it to the module that produces its input, or leave it unbound"
            )
        dtype, turn = moments.mean.dtype, self.iteration // self.moments_every
        patches = InputPatches(source, y, x.shape[2:], dtype, self.moments_positions, turn)
        joined = partial(joined_mean, count=patches.positions) if ranks > 1 else _as_it_is
        patch_mean = joined(patches.mean())
        anchor = response(patch_mean[:, None], theta, bias).squeeze(1)
        moments = moments._replace(anchor=anchor, patch_mean=patch_mean)
        if self.compensation == "exact":
            patch_covariance = joined(patches.covariance(patch_mean))
            rows = by_group(theta, len(patch_mean))
            explained = torch.linalg.vecdot(rows @ patch_covariance, rows).flatten()
            return moments._replace(patch_covariance=patch_covariance, explained=explained)
        xs = patches.outputs(x).to(dtype)
        xc = xs - (anchor[:, None] if isinstance(source, nn.Linear) else per_channel(anchor, xs))
        # what rounding left of the mean would be multiplied by a patch mean that may be large
        axes = [1] if isinstance(source, nn.Linear) else [0, *range(2, xc.dim())]
        rest = by_group(joined(xc.mean(axes)), len(patch_mean))
        covariance = joined(patches.covariance_with(xc))
        by_group(covariance, len(patch_mean)).baddbmm_(rest[:, :, None], patch_mean[:, None], alpha=-1)
        return moments._replace(covariance=covariance, explained=torch.linalg.vecdot(covariance, theta))

    @property
    def _running_statistics(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """running_mean, running_var and num_batches_tracked, where there are any to be updated."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return None
        assert self.num_batches_tracked is not None
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _running(self, buffers: tuple[Tensor, Tensor, Tensor], count: float | Tensor) -> Running:
        """The running statistics, to move towards the window's with Bessel's correction for `count` values."""
        mean, var, batches = buffers
        share = (batches + 1).to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        return Running(mean, var, share, count / (count - 1))

    def forward(self, input: Tensor) -> Tensor:
        """Shape: [N, C] or [N, C, ...], as the BatchNorm it stands for; output like input in shape and dtype."""
        return self.normalize(input)

    def extra_repr(self) -> str:
        """BatchNorm's arguments and the window's."""
        bound = "" if self._tap is None else f", bound to {type(self._tap.module).__name__}"
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return (
            f"{plain}, window={self.window}, compensation={self.compensation}, "
            f"gradient={self.gradient}, history={self.history}{bound}"
        )


def _pool_running_statistics(buffers: tuple[Tensor, Tensor, Tensor], mean: Tensor, var: Tensor, finite: Tensor) -> None:
    """Makes the running statistics those of all batches together, as recalibration with momentum None needs them.

    Each batch counts once, and the variance between them counts as well.
    """
    running_mean, running_var, batches = buffers
    share = (batches + 1).to(mean.dtype).reciprocal()
    step = mean - running_mean.to(mean.dtype)
    Running(running_mean, running_var, share, 1.0).update(mean, var + (1 - share) * step * step, finite)


class CrossIterationBatchNorm1d(CrossIterationMixin, nn.BatchNorm1d):
    """`CrossIterationBatchNorm2d` for input [N, C] or [N, C, L]."""


class CrossIterationBatchNorm2d(CrossIterationMixin, nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the last `window` iterations (arXiv 2002.05712).

    CrossIterationBatchNorm2d(num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, window=8,
    compensation="projection", gradient="full", history="ring", burn_in=0, sync=False), the first five as in
    nn.BatchNorm2d:

        norm = CrossIterationBatchNorm2d(64, window=8).bind(conv)
        y = norm(conv(x))

    window: iterations averaged over, the current one included; 1 is nn.BatchNorm2d.
    compensation: how past statistics follow the weights of the bound layer: "projection", "taylor" (the paper's),
        "exact" (keeps the covariance of the input patches; for depthwise and narrow layers) or "none". An unbound
        layer, or one bound to frozen weights, averages without.
    gradient: "full" backpropagates through the compensation as well, "current" (the paper's code) only through the
        current batch, "straight_through" gives the current batch the whole window's gradient.
    history: "ring" stores window - 1 iterations, "ema" one exponential average.
    burn_in: iterations at the start that use their own batch only.
    sync: statistics of the joined batch of all ranks of torch.distributed's default group, as in SyncBatchNorm.

    Input and output [N, C, H, W]; statistics and history in float32 (float64 for float64 input). state_dict keys,
    evaluation and the meaning of momentum are nn.BatchNorm2d's; the history is in no state_dict, see `history_state`.
    Raises ValueError for an argument out of range.
    """


class CrossIterationBatchNorm3d(CrossIterationMixin, nn.BatchNorm3d):
    """`CrossIterationBatchNorm2d` for input [N, C, D, H, W]."""


class CrossIterationBatchNormAct2d(CrossIterationMixin, BatchNormAct2d):
    """timm's BatchNormAct2d, normalising like `CrossIterationBatchNorm2d`, then its drop and act."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N, C, H, W], output like input in shape and dtype."""
        if isinstance(self.drop, nn.Identity):
            return self.normalize(x, self.act)
        y: Tensor = self.act(self.drop(self.normalize(x)))
        return y


def history_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`history_state()` of every cross-iteration layer of the model, by name; for training checkpoints."""
    return {name: m.history_state() for name, m in model.named_modules() if isinstance(m, CrossIterationMixin)}


def load_history_state(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Restores `history_state(model)`. Raises ValueError if the layers or their windows are not the same."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CrossIterationMixin)}
    if layers.keys() != state.keys():
        odd = sorted(layers.keys() ^ state.keys())
        raise ValueError(f"history is of other layers than the model's: {', '.join(odd[:5])} in one of them only")
    for name, layer in layers.items():
        layer.load_history_state(state[name])
