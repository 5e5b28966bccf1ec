"""Cross-Iteration Batch Normalization layers: drop-in subclasses of the BatchNorm that they stand for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from .functional import (
    COMPENSATIONS,
    GRADIENTS,
    Compensation,
    CrossIterationNormalize,
    Gradient,
    Moments,
    response,
    statistics_dtype,
)
from .history import HISTORIES, History, HistoryKind
from .moments import Producer, is_producer, patch_covariances, patch_moments


class _InputTap:
    """Forward hook on the producing module that hands its last input over to the norm layer.

    A plain object, so that the norm layer can refer to the producer without registering it as a submodule.
    """

    def __init__(self, module: Producer, norm: nn.Module) -> None:
        self.module = module
        self.norm = norm
        self.input: Tensor | None = None
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.norm.training and self.learns:
            self.input = (args[0] if args else kwargs["input"]).detach()

    @property
    def learns(self) -> bool:
        """Whether weight or bias may change; without that past statistics need no compensation."""
        return any(p.requires_grad for p in (self.module.weight, self.module.bias) if p is not None)

    def take(self) -> Tensor | None:
        """The stored input, which is released here so that no activation outlives its step."""
        stored, self.input = self.input, None
        return stored

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "input": None}


def check_window_options(window: int, compensation: str, gradient: str, history: str, burn_in: int) -> None:
    """Raises ValueError, naming the argument and what it may be, unless all are valid."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer of at least 1, got {window!r}")
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"burn_in must be an integer of at least 0, got {burn_in!r}")
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

    WINDOW_ATTRIBUTES = ("window", "compensation", "gradient", "burn_in", "iteration", "_history", "_tap")

    def __init__(
        self,
        *args: Any,
        window: int = 8,
        compensation: Compensation = "projection",
        gradient: Gradient = "full",
        history: HistoryKind = "ring",
        burn_in: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_window(window, compensation, gradient, history, burn_in)

    def set_window(
        self,
        window: int,
        compensation: Compensation,
        gradient: Gradient,
        history: HistoryKind,
        burn_in: int,
    ) -> None:
        """Starts with an empty history and unbound."""
        check_window_options(window, compensation, gradient, history, burn_in)
        self.window = window
        self.compensation = compensation
        self.gradient = gradient
        self.burn_in = burn_in
        self.iteration = 0
        self._history = History(window, history)
        self._tap: _InputTap | None = None

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
    def producer(self) -> Producer | None:
        """The module whose weight produces this layer's input, None if not bound."""
        return None if self._tap is None else self._tap.module

    def bind(self, module: nn.Module) -> Self:
        """Names the conv or linear layer whose output is this layer's input; returns self.

        Raises TypeError for a module whose output is not weight · patch + bias, ValueError if the channels differ.
        """
        if not is_producer(module):
            raise TypeError(
                f"cannot bind to {type(module).__name__}: its output is not known to be weight * patch + bias; "
                "bind to nn.Conv1d/2d/3d, nn.Linear or timm's Conv2dSame, or leave the layer unbound"
            )
        channels = module.weight.shape[0]
        if channels != self.num_features:
            raise ValueError(f"cannot bind: the module has {channels} output channels, the norm {self.num_features}")
        self._unbind()
        self._tap = _InputTap(module, self)
        self._history.clear()
        return self

    def _unbind(self) -> None:
        if self._tap is not None:
            self._tap.handle.remove()
        self._tap = None

    def reset_history(self) -> None:
        """Forgets the past iterations; the next forward pass uses its own batch alone."""
        self._history.clear()

    def history_state(self) -> dict[str, Any]:
        """What a bit-identical resume needs beside the state_dict; tensors and numbers only."""
        return {"iteration": self.iteration, **self._history.state_dict()}

    def load_history_state(self, state: dict[str, Any]) -> None:
        """Restores `history_state`. Raises ValueError if it was taken with another window or kind of history."""
        self._history.load_state_dict(state)
        self.iteration = int(state["iteration"])

    def normalize(self, x: Tensor) -> Tensor:
        """Normalises x [N, C, ...]: over the window in training, exactly as BatchNorm in evaluation."""
        self._check_input_dim(x)
        source_input = None if self._tap is None else self._tap.take()
        if not self.training:
            return self._normalize_by_running_statistics(x)
        # statistics, history and compensation are float32 whatever autocast does
        with torch.autocast(x.device.type, enabled=False):
            return self._normalize_by_window(x, source_input)

    def _normalize_by_running_statistics(self, x: Tensor) -> Tensor:
        by_batch = self.running_mean is None and self.running_var is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps)

    def _normalize_by_window(self, x: Tensor, source_input: Tensor | None) -> Tensor:
        tap = self._tap
        compensated = tap is not None and self.compensation != "none" and tap.learns
        source = tap.module if tap is not None and compensated else None
        past = None
        if self.iteration >= self.burn_in:
            past = self._history.past(x.device, statistics_dtype(x), compensated)
        newest_weight = 1.0 if past is None else self._history.newest_weight
        count = x.numel() / x.shape[1] / newest_weight
        if count == 1:
            # One value per channel has no variance. It still counts for the window, which fills from here.
            with torch.no_grad():
                mean = x.to(statistics_dtype(x)).flatten()
                self._record(source, source_input, x, mean, torch.zeros_like(mean))
            return self._normalize_by_running_statistics(x)
        y, window_mean, window_var, mean, var = CrossIterationNormalize.apply(
            x,
            None if source is None else source.weight,
            None if source is None else source.bias,
            self.weight,
            self.bias,
            past,
            newest_weight,
            self.compensation,
            self.gradient,
            self.eps,
        )
        with torch.no_grad():
            self._update_running_statistics(window_mean, window_var, count)
            self._record(source, source_input, x, mean, var)
        return y

    def _record(self, source: Producer | None, y: Tensor | None, x: Tensor, mean: Tensor, var: Tensor) -> None:
        if self.window > 1:
            self._history.push(self._moments(source, y, x, mean, var))
        self.iteration += 1

    def _moments(self, source: Producer | None, y: Tensor | None, x: Tensor, mean: Tensor, var: Tensor) -> Moments:
        """What this iteration leaves behind: `source` made x from y."""
        if source is None:
            return Moments(mean, var)
        if y is None:
            raise RuntimeError(
                f"{type(self).__name__} is bound to a {type(source).__name__} that has not run since the last forward "
                "pass; bind it to the module that produces its input, or leave it unbound"
            )
        covariance = patch_covariance = None
        if self.compensation == "exact":
            patch_mean, patch_covariance = patch_covariances(source, y, mean.dtype)
        else:
            patch_mean, covariance = patch_moments(source, y, x, mean)
        weight = source.weight.to(mean.dtype).flatten(1)
        bias = None if source.bias is None else source.bias.to(mean.dtype)
        anchor = response(patch_mean[:, None], weight, bias).squeeze(1)
        return Moments(mean, var, anchor, patch_mean, covariance, patch_covariance)

    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Moves the running statistics towards the window's, var with Bessel's correction for `count` values."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            if self.momentum is None:
                running.lerp_(new.to(running.dtype), self.num_batches_tracked.to(running.dtype).reciprocal())
            else:
                running.lerp_(new.to(running.dtype), self.momentum)

    def forward(self, input: Tensor) -> Tensor:
        """Shape: [N, C] or [N, C, ...], as the BatchNorm it stands for; output like input in shape and dtype."""
        return self.normalize(input)

    def extra_repr(self) -> str:
        """BatchNorm's arguments and the window's."""
        bound = "" if self._tap is None else f", bound to {type(self._tap.module).__name__}"
        return (
            f"{super().extra_repr()}, window={self.window}, compensation={self.compensation}, "
            f"gradient={self.gradient}, history={self.history}{bound}"
        )


class CrossIterationBatchNorm1d(CrossIterationMixin, nn.BatchNorm1d):
    """`CrossIterationBatchNorm2d` for input [N, C] or [N, C, L]."""


class CrossIterationBatchNorm2d(CrossIterationMixin, nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the last `window` iterations (arXiv 2002.05712).

    CrossIterationBatchNorm2d(num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, window=8,
    compensation="projection", gradient="full", history="ring", burn_in=0), the first five as in nn.BatchNorm2d:

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
