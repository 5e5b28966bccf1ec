"""Cross-Iteration Batch Normalization layers: drop-in subclasses of the BatchNorm that they stand for."""

from __future__ import annotations

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
    WindowNormalize,
    batch_statistics,
    by_group,
    per_channel,
    response,
    statistics_dtype,
    window_statistics,
)
from .history import HISTORIES, History, HistoryKind
from .moments import InputPatches, exact_is_possible
from .producers import Producer, is_producer, learns, out_channels, theta_and_bias


class _InputTap:
    """Forward hook on the producing module that hands its last input over to the norm layer.

    A plain object, so that the norm layer can refer to the producer without registering it as a submodule.
    """

    def __init__(self, module: Producer, norm: CrossIterationMixin) -> None:
        self.module = module
        self.norm = norm
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.version: int | None = None
        self.handles = [
            module.register_forward_hook(self, with_kwargs=True),
            module.register_load_state_dict_post_hook(self.weights_replaced),  # type: ignore[no-untyped-call]
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.norm.training and self.followed:
            self.input = (args[0] if args else kwargs["input"]).detach()
            self.output = output.detach()
            self.version = _version(output)

    def weights_replaced(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Weights that were loaded have no past."""
        self.norm.reset_history()

    @property
    def followed(self) -> bool:
        """Whether past statistics need compensation: θ or b may change, or could when the past was recorded."""
        return learns(self.module) or self.norm._history.compensated

    def take(self) -> Tensor | None:
        """The stored input, which is released here so that no activation outlives its step."""
        stored, self.input = self.input, None
        return stored

    def check_output(self, x: Tensor) -> None:
        """Raises RuntimeError unless x [N, C, ...] holds what the module made, its positions in the same order."""
        made, self.output = self.output, None
        if made is None:
            return
        rows = x.detach()
        if isinstance(self.module, nn.Linear):
            rows, made = rows.movedim(1, -1).flatten(0, -2), made.flatten(0, -2)
        if rows.shape == made.shape:
            same = (rows.data_ptr(), rows.stride()) == (made.data_ptr(), made.stride())
            if self.version in (None, _version(x)) if same else _nearly_equal(rows, made):
                return
        raise RuntimeError(
            f"{type(self.norm).__name__} is bound to a {type(self.module).__name__} whose output is changed before it "
            "arrives; leave the layer unbound, or exclude it from the conversion"
        )

    def remove(self) -> None:
        """Takes the hooks off the module."""
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "input": None, "output": None}


def _nearly_equal(copy: Tensor, original: Tensor) -> bool:
    """Whether a copy, perhaps in another dtype, has the original's values; the device is waited for."""
    original = original.to(copy.dtype)
    size = float(original.abs().mean().nan_to_num(0))
    return torch.allclose(copy, original, rtol=1e-2, atol=1e-2 * size, equal_nan=True)


def _version(t: Tensor) -> int | None:
    """How often the tensor, or what it is a view of, was written to; None where nobody counts."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def _as_it_is(t: Tensor) -> Tensor:
    return t


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
    sync: bool

    WINDOW_ATTRIBUTES = ("window", "compensation", "gradient", "burn_in", "sync", "iteration", "_history", "_tap")

    def __init__(
        self,
        *args: Any,
        window: int = 8,
        compensation: Compensation = "projection",
        gradient: Gradient = "full",
        history: HistoryKind = "ring",
        burn_in: int = 0,
        sync: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_window(window, compensation, gradient, history, burn_in, sync)

    def set_window(
        self,
        window: int,
        compensation: Compensation,
        gradient: Gradient,
        history: HistoryKind,
        burn_in: int,
        sync: bool,
    ) -> None:
        """Starts with an empty history and unbound."""
        check_window_options(window, compensation, gradient, history, burn_in)
        self.window = window
        self.compensation = compensation
        self.gradient = gradient
        self.burn_in = burn_in
        self.sync = sync
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
        self._tap = _InputTap(module, self)
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

    def normalize(self, x: Tensor) -> Tensor:
        """Normalises x [N, C, ...]: over the window in training, exactly as BatchNorm in evaluation."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if not self.training:
            return self._normalize_by_running_statistics(x)
        y: Tensor = self._normalize_by_window(x)
        return y

    def _normalize_by_running_statistics(self, x: Tensor) -> Tensor:
        by_batch = self.running_mean is None and self.running_var is None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, 0.0, self.eps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalize_by_window(self, x: Tensor) -> Tensor:
        source_input = None if self._tap is None else self._tap.take()
        source = None
        if self._tap is not None and self.compensation != "none" and self._tap.followed:
            source = self._tap.module
            self._tap.check_output(x)
        ranks = world_size() if self.sync else 1
        if x.numel() == 0 and ranks == 1:
            return self._normalize_by_running_statistics(x)
        # Inside a backward pass this is activation checkpointing at work: nothing may be counted a second time.
        recomputing = torch._C._current_graph_task_id() != -1
        # statistics, history and compensation are float32 whatever autocast does
        with torch.autocast(x.device.type, enabled=False):
            theta, bias = (None, None) if source is None else theta_and_bias(source, statistics_dtype(x))
            with torch.no_grad():
                xs = x.to(statistics_dtype(x))
                positions: float | Tensor = xs.numel() / xs.shape[1]
                if ranks == 1:
                    mean, var = batch_statistics(xs)
                else:
                    positions, mean, var = joined_statistics(xs)
                past = self._history.past(mean, source is not None, recomputing)
                if self.iteration - recomputing < self.burn_in:
                    past = None
                newest_weight = 1.0 if past is None else self._history.newest_weight
                count = positions / newest_weight
                # one rank alone can tell without waiting for the device
                single = ranks == 1 and count == 1
                window = window_statistics(
                    mean, var, past, newest_weight, theta, bias, self.compensation, self.gradient
                )
                if single and not self.track_running_stats:
                    raise ValueError(f"expected more than 1 value per channel in training, got input size {x.shape}")
                if not recomputing:
                    self.iteration += 1
                    if not single:
                        self._update_running_statistics(window.mean, window.var, count, mean, var)
                    if self.window > 1:
                        moments = Moments(mean, var)
                        if source is not None and theta is not None:
                            moments = self._with_patches(moments, source, source_input, xs, theta, bias, ranks)
                        self._history.stage(moments)
            if single:
                # one value per channel has no variance, but it counts for the window, which fills from here
                return self._normalize_by_running_statistics(x)
            y: Tensor = WindowNormalize.apply(
                x, theta, bias, self.weight, self.bias, window, self.eps, positions, total if ranks > 1 else None
            )
            return y

    def _with_patches(
        self,
        moments: Moments,
        source: Producer,
        y: Tensor | None,
        xs: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        ranks: int,
    ) -> Moments:
        """Adds what compensation will need: `source` made xs from y with θ [C, F] and bias [C]."""
        if y is None:
            raise RuntimeError(
                f"{type(self).__name__} is bound to a {type(source).__name__} that has not run since the last forward "
                "pass; bind it to the module that produces its input, or leave it unbound"
            )
        mean = moments.mean
        patches = InputPatches(source, y, xs.shape[2:], mean.dtype)
        joined = partial(joined_mean, count=patches.positions) if ranks > 1 else _as_it_is
        patch_mean = joined(patches.mean())
        moments = moments._replace(anchor=response(patch_mean[:, None], theta, bias).squeeze(1), patch_mean=patch_mean)
        if self.compensation == "exact":
            return moments._replace(patch_covariance=joined(patches.covariance(patch_mean)))
        xc = xs - per_channel(mean, xs)
        # what rounding left of the mean would be multiplied by a patch mean that may be large
        rest = by_group(joined(xc.mean([0, *range(2, xs.dim())])), len(patch_mean))
        covariance = joined(patches.covariance_with(xc))
        covariance -= (rest[:, :, None] * patch_mean[:, None]).flatten(0, 1)
        return moments._replace(covariance=covariance)

    def _update_running_statistics(
        self, mean: Tensor, var: Tensor, count: float | Tensor, batch_mean: Tensor, batch_var: Tensor
    ) -> None:
        """Moves the running statistics towards the window's, var with Bessel's correction for `count` values.

        With momentum None they become those of all batches together, each counted once and with the variance between
        them, as recalibration needs it. A batch with NaN or inf moves nothing.
        """
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        share: float | Tensor
        if self.momentum is None and self.window > 1:
            share = (self.num_batches_tracked + 1).to(batch_mean.dtype).reciprocal()
            step = batch_mean - self.running_mean.to(batch_mean.dtype)
            between = (1 - share) * step * step
            mean, var = batch_mean, batch_var + between
        else:
            var = var * (count / (count - 1))
            share = (
                (self.num_batches_tracked + 1).to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
            )
        finite = torch.isfinite(mean + var).all()
        self.num_batches_tracked.add_(finite)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            new = torch.where(finite, new.to(running.dtype), running)
            running.lerp_(new, share.to(running.dtype) if isinstance(share, Tensor) else share)

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
