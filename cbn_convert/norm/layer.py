"""Cross-Iteration Batch Normalization as a mixin for the BatchNorm classes that it stands for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from .distributed import joined_statistics, total, world_size
from .functional import (
    Compensation,
    Gradient,
    Moments,
    Reader,
    Running,
    WindowNormalize,
    carry_over,
    explaining,
    is_measured,
    statistics_dtype,
)
from .history import History, HistoryKind, Start
from .kernels import select
from .moments import exact_is_possible
from .options import check_window_options
from .producers import OutputChannels, Producer, groups_of, is_producer, is_transposed, out_channels
from .source import Source
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


class CrossIterationMixin(_BatchNorm):
    """Turns the BatchNorm class that follows it into a cross-iteration one.

    All that it adds to an instance are `WINDOW_ATTRIBUTES`, so that a conversion can give them to an existing layer
    (`set_window`) and take them away again (`restore`).
    """

    window: int
    compensation: Compensation
    gradient: Gradient
    burn_in: int
    sync: bool
    moments_positions: int | None
    start: Start

    PLAIN: ClassVar[type[nn.Module]]
    FROZEN: ClassVar[bool] = False  # stands for one whose statistics are part of the function, whatever they are
    WINDOW_ATTRIBUTES = (
        "window", "compensation", "gradient", "burn_in", "sync", "moments_positions", "start", "iteration",
        "_new_history", "_sources",
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
        start: Start = "empty",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_window(window, compensation, gradient, history, burn_in, sync, moments_every, moments_positions, start)

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
        start: Start = "empty",
        phase: int = 0,
    ) -> None:
        """Starts with an empty history and unbound; `phase` shifts the iterations that bring moments (`History`)."""
        check_window_options(window, compensation, gradient, history, burn_in, moments_every, moments_positions, start)
        self.window = window
        self.compensation = compensation
        self.gradient = gradient
        self.burn_in = burn_in
        self.sync = sync
        self.moments_positions = moments_positions
        self.start = start
        self.iteration = 0
        self._new_history = partial(History, window, history, moments_every, phase)
        self._sources = [Source(self._new_history())]

    def restore(self) -> nn.Module:
        """Turns this layer, in place, into the BatchNorm that it stands for; returns it."""
        self._unbind()
        for name in self.WINDOW_ATTRIBUTES:
            delattr(self, name)
        self.__class__ = self.PLAIN  # type: ignore[assignment]
        return self

    def fuse(self) -> nn.Module:
        """`restore`, under the name that timm's reparameterize_model calls."""
        return self.restore()

    @property
    def history(self) -> HistoryKind:
        """The kind of history, "ring" or "ema"."""
        return self._sources[0].history.kind

    @property
    def moments_every(self) -> int:
        """How many iterations share one estimate of how the statistics respond to the weights."""
        return self._sources[0].history.every

    @property
    def compensated(self) -> bool:
        """Whether the past was recorded with what compensation needs."""
        return any(source.history.compensated for source in self._sources)

    @property
    def producers(self) -> tuple[Producer, ...]:
        """The modules whose weights produce this layer's input; empty if not bound."""
        return tuple(source.tap.module for source in self._sources if source.tap is not None)

    def bind(self, *made: nn.Module | OutputChannels) -> Self:
        """Names the conv or linear layer whose output is this layer's input; returns self.

        Several are concatenated along the channels, as in bind(conv_a, conv_b). OutputChannels(conv, first, channels)
        stands for some channels of a layer with one group. Raises TypeError for a module whose output is not
        weight · patch + bias, or for which compensation "exact" is not to be had; ValueError if the channels differ.
        """
        parts = [self._checked(part) for part in made]
        channels = sum(part.channels for part in parts)
        if channels != self.num_features:
            which = "the module has" if len(parts) == 1 else "the modules have"
            raise ValueError(f"cannot bind: {which} {channels} output channels, the norm {self.num_features}")
        self._unbind()
        self._sources, first = [], 0
        for part in parts:
            channels_here = None if len(parts) == 1 else slice(first, first + part.channels)
            self._sources.append(Source(self._new_history(), InputTap(part, self), channels_here))
            first += part.channels
        return self

    def _checked(self, made: nn.Module | OutputChannels) -> OutputChannels:
        module = made.module if isinstance(made, OutputChannels) else made
        if not is_producer(module):
            raise TypeError(
                f"cannot bind to {type(module).__name__}: its output is not known to be weight * patch + bias; bind "
                "to a conv, transposed conv, linear or weight-standardised conv of torch or timm, or leave it unbound"
            )
        if self.compensation == "exact" and not exact_is_possible(module):
            raise TypeError(f'compensation "exact" is not known for {type(module).__name__}; use "projection"')
        part = made if isinstance(made, OutputChannels) else OutputChannels(module, 0, out_channels(module))
        if part.first < 0 or part.first + part.channels > out_channels(module):
            raise ValueError(
                f"cannot bind: channels {part.first} to {part.first + part.channels} of {out_channels(module)}"
            )
        if not part.whole and (groups_of(module) > 1 or is_transposed(module)):
            raise ValueError(f"cannot bind to some channels of a {type(module).__name__} with groups or transposed")
        return part

    def _unbind(self) -> None:
        for source in self._sources:
            if source.tap is not None:
                source.tap.remove()
        self._sources = [Source(self._new_history())]

    def reset_history(self) -> None:
        """Forgets the past iterations; the window begins anew as `start` says."""
        for source in self._sources:
            source.history.clear()

    def reset_running_stats(self) -> None:
        """Resets the running statistics as BatchNorm does, and the history: both are to be estimated anew."""
        super().reset_running_stats()
        if "_sources" in self.__dict__:
            self.reset_history()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_history()

    def history_tensors(self) -> list[Tensor]:
        """The tensors that hold the past, to account for their memory."""
        return [t for source in self._sources for t in source.history.tensors()]

    @property
    def history_bytes(self) -> int:
        """What the past will take once the window is full."""
        return sum(source.history_bytes(self.num_features, self.compensation) for source in self._sources)

    def history_state(self) -> dict[str, Any]:
        """What a bit-identical resume needs beside the state_dict; tensors, numbers and strings only."""
        return {
            "iteration": self.iteration,
            "start": self.start,
            "gradient": self.gradient,
            "sources": [source.history.state_dict() for source in self._sources],
        }

    def load_history_state(self, state: dict[str, Any]) -> None:
        """Restores `history_state`; load weights first, since that empties the history.

        The window of an exponential history, its start and gradient are restored with it, as `convert` chooses them by
        the statistics that it finds. Raises ValueError if it was taken with another kind of history, a ring of another
        window, another number of channels, or gradient "current" on one side only.
        """
        gradient = state.get("gradient", self.gradient)
        if gradient != self.gradient and "current" in (gradient, self.gradient):
            raise ValueError(
                f"history was saved with gradient {gradient}, but the layer has {self.gradient}; "
                "use the same settings to resume"
            )
        every = range(self.num_features)
        own = [len(every[source.channels or slice(None)]) for source in self._sources]
        if len(own) != len(state["sources"]):
            raise ValueError(f"history is of a layer fed by {len(state['sources'])} modules, this one by {len(own)}")
        pairs = list(zip(self._sources, state["sources"], strict=True))
        for channels, (source, saved) in zip(own, pairs, strict=True):
            other = {len(t) for name, t in saved["slots"].items() if name in ("mean", "var")} - {channels}
            if other:
                raise ValueError(f"history is of a layer with {other.pop()} channels, this one has {channels}")
            source.history.check(saved)
        for source, saved in pairs:
            source.history.load_state_dict(saved)
            self.window = source.history.window
        self.iteration = int(state["iteration"])
        self.start, self.gradient = state.get("start", self.start), gradient

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

    def _normalize_by_running_statistics(self, x: Tensor, source: Source | None = None) -> Tensor:
        stored = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, gamma, beta = stored if source is None else map(source.of, stored)
        return F.batch_norm(x, mean, var, gamma, beta, mean is None and var is None, 0.0, self.eps)

    def _normalize_by_window(self, x: Tensor, act: nn.Module | None) -> Tensor:
        # Inside a backward pass this is activation checkpointing at work: nothing may be counted a second time.
        recomputing = torch._C._current_graph_task_id() != -1
        fused = name_of_activation(act, select(x).ACTIVATIONS)
        needed = self.window > 1 and not recomputing
        taken = [source.taken(source.of_input(x), needed) for source in self._sources]
        if x.numel() == 0 and not (self.sync and world_size() > 1):
            y = self._normalize_by_running_statistics(x)
            return y if act is None else act(y)
        parts: list[Tensor] = []
        counted: list[Tensor] = []
        # statistics, history and compensation are float32 whatever autocast does
        with _without_autocast(x):
            for source, (module, source_input) in zip(self._sources, taken, strict=True):
                y, finite = self._window_over(source, source.of_input(x), module, source_input, fused, recomputing)
                parts.append(y)
                counted += [] if finite is None else [finite]
        if not recomputing:
            self.iteration += 1
            if self.num_batches_tracked is not None and counted:
                # a part may be finite where another one is not
                self.num_batches_tracked.add_(counted[0] if len(counted) == 1 else torch.stack(counted).all())
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if act is None or fused else act(y)

    def _window_over(
        self,
        source: Source,
        x: Tensor,
        module: Producer | None,
        source_input: Tensor | None,
        act: str,
        recomputing: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output for a source's channels, and whether they count for the running statistics (None: they cannot)."""
        ranks = world_size() if self.sync else 1
        kernels, history = select(x), source.history
        theta, bias = (None, None) if module is None else source.theta_and_bias(module, statistics_dtype(x))
        with torch.no_grad():
            positions: float | Tensor = x.numel() / x.shape[1]
            spare = None
            if ranks == 1:
                mean, var, spare = kernels.statistics(x)
            else:
                positions, mean, var = joined_statistics(x)
            if self.start == "running" and history.is_empty and self.window > 1:
                self._start(source, mean.dtype)
            remembered = history.past(mean, module is not None, recomputing)
            past = None if self.iteration < self.burn_in + recomputing else remembered
            newest_weight = 1.0 if past is None else history.newest_weight
            count = positions / newest_weight
            # one rank alone can tell without waiting for the device
            single = ranks == 1 and count == 1
            if single and not self.track_running_stats:
                raise ValueError(f"expected more than 1 value per channel in training, got input size {x.shape}")
            pooled = self.momentum is None and self.window > 1
            running = None if recomputing or single else self._running(source, count)
            window, finite = kernels.window(
                mean, var, past, newest_weight, theta, bias, self.compensation, self.gradient,
                None if pooled else running,
            )  # fmt: skip
            if running is not None and pooled:
                _pool_running_statistics(running, mean, var, finite)
            if not recomputing and self.window > 1:
                moments, carried = Moments(mean, var), None
                if module is not None and theta is not None:
                    if remembered is not None and remembered.patch_mean is not None and history.is_carried:
                        carried = carry_over(remembered, theta, bias, self.compensation)
                    if history.due:
                        assert source_input is not None
                        moments = source.with_patches(
                            moments, module, source_input, x, theta, bias, self.compensation, self.moments_positions,
                            (self.iteration + 1) // self.moments_every, ranks,
                        )  # fmt: skip
                        if remembered is not None and self.start == "running" and self.compensation != "taylor":
                            moments = explaining(moments, remembered.var[:, 0], theta)
                history.stage(moments, finite, carried)
        if single:
            # one value per channel has no variance, but it counts for the window, which fills from here
            y = self._normalize_by_running_statistics(x, source)
            return (getattr(F, act)(y) if act else y), None
        reader = Reader()
        y = WindowNormalize.apply(
            x, theta, bias, source.of(self.weight), source.of(self.bias), window, self.eps, positions,
            total if ranks > 1 else None, kernels, (spare,), reader, act,
        )  # fmt: skip
        if y.requires_grad and window.covariance is not None:
            history.read_by(reader)
        return y, None if running is None else finite

    def _start(self, source: Source, dtype: torch.dtype) -> None:
        """Fills a source's window with the running statistics, unless they are those of a new BatchNorm."""
        mean, var = source.of(self.running_mean), source.of(self.running_var)
        if mean is not None and var is not None and (self.FROZEN or is_measured(mean, var)):
            source.history.start_from(mean.to(dtype), var.to(dtype))

    def _running(self, source: Source, count: float | Tensor) -> Running | None:
        """A source's running statistics, to move to the window's with Bessel's correction for `count` values."""
        mean, var = source.of(self.running_mean), source.of(self.running_var)
        if not self.track_running_stats or mean is None or var is None:
            return None
        assert self.num_batches_tracked is not None
        share = (self.num_batches_tracked + 1).to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        return Running(mean, var, share, count / (count - 1))

    def forward(self, input: Tensor) -> Tensor:
        """Shape: [N, C] or [N, C, ...], as the BatchNorm it stands for; output like input in shape and dtype."""
        return self.normalize(input)

    def extra_repr(self) -> str:
        """BatchNorm's arguments and the window's."""
        names = " and ".join(type(module).__name__ for module in self.producers)
        bound = f", bound to {names}" if names else ""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return (
            f"{plain}, window={self.window}, compensation={self.compensation}, "
            f"gradient={self.gradient}, history={self.history}, start={self.start}{bound}"
        )


def _pool_running_statistics(running: Running, mean: Tensor, var: Tensor, finite: Tensor) -> None:
    """Makes the running statistics those of all batches together, as recalibration with momentum None needs them.

    Each batch counts once, and the variance between them counts as well.
    """
    step = mean - running.mean.to(mean.dtype)
    running._replace(correction=1.0).update(mean, var + (1 - running.momentum) * step * step, finite)
