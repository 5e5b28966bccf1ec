"""Cross-Iteration Batch Normalization as a mixin for the BatchNorm classes that it stands for."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from ..modes import what_lasts_may_be_made
from ..refusals import qconfig, refuse_proxy, refuse_replica, refuse_script, refuse_transforms
from .activation import activate, activate_in_graph
from .batch import Batch, Pass
from .carried import CarriedWindow
from .distributed import world_size
from .folded import begin_folding, end_folding
from .functional import is_known, is_measured, normalize, pooled
from .new_layer import NewLayerWindow
from .producers import (
    OutputChannels,
    Producer,
    applies_stored_weight,
    groups_of,
    is_producer,
    is_transposed,
    out_channels,
    plain_class,
)
from .ring import Ring
from .saved import check_history
from .source import Source
from .tap import InputTap, writes_to
from .window import Window, WindowKeywords, window_of


class CrossIterationMixin(_BatchNorm):
    """Turns the BatchNorm class that follows it into a cross-iteration one.

    All that it adds to an instance are `WINDOW_ATTRIBUTES`, so that a conversion can give them to an existing layer
    (`set_window`) and take them away again (`restore`).
    """

    window: Window

    PLAIN: ClassVar[type[nn.Module]]
    FROZEN: ClassVar[bool] = False  # stands for one whose statistics are part of the function, whatever they are
    qconfig = qconfig
    __prepare_scriptable__ = refuse_script
    WINDOW_ATTRIBUTES = (
        "window", "phase", "layer_name", "iteration", "_sources", "_begun", "_left", "_moving", "_momentum", "_told"
    )  # fmt: skip

    def __init__(self, *args: Any, window: Window | int = 8, **kwargs: Any) -> None:
        keywords: Any = {name: kwargs.pop(name) for name in WindowKeywords.__annotations__ if name in kwargs}
        super().__init__(*args, **kwargs)
        self.set_window(window_of(window, keywords))

    def set_window(self, window: Window, phase: int = 0, name: str = "") -> None:
        """Starts unbound, with nothing remembered; `phase` shifts the steps that look, `name` is for messages."""
        self.window = window
        self.phase = phase
        self.layer_name = name
        self.iteration = 0
        self._begun = False  # whether it has been decided what each source remembers
        self._momentum = self.momentum  # that of the layer then
        self._told = False  # whether it was said that it is not read
        self._moving = False  # whether it has taken a step since it last was in evaluation
        self._left: Any = None  # the running statistics as this layer left them, and how often they had been written to
        self._sources = [Source(self)]

    def restore(self) -> nn.Module:
        """Turns this layer, in place, into the BatchNorm that it stands for; returns it."""
        self._carry()
        self._unbind()
        for name in self.WINDOW_ATTRIBUTES:
            delattr(self, name)
        self.__class__ = self.PLAIN  # type: ignore[assignment]
        return self

    def fuse(self) -> nn.Module:
        """`restore`, under the name that timm's reparameterize_model calls."""
        return self.restore()

    @property
    def described(self) -> str:
        """The layer in a message."""
        return f"layer {self.layer_name!r}" if self.layer_name else f"a {type(self).__name__}"

    @property
    def compensated(self) -> bool:
        """Whether what is remembered can follow the weights."""
        return any(source.compensated for source in self._sources)

    @property
    def producers(self) -> tuple[Producer, ...]:
        """The modules whose weights produce this layer's input; empty if not bound."""
        return tuple(source.tap.module for source in self._sources if source.tap is not None)

    @property
    def trains_folded(self) -> bool:
        """Whether the layer that feeds this one applies it, where nothing stands in the way."""
        return any(module.__dict__.get("folds_into") in self._sources for module in self.producers)

    @property
    def is_new(self) -> bool:
        """Whether there are no statistics to carry: none at all, or those of a new BatchNorm."""
        if self.window.start == "empty" or self.running_mean is None:
            return True
        return not (self.FROZEN or is_measured(self.running_mean, self.running_var))

    @property
    def is_recomputing(self) -> bool:
        """Whether this is activation checkpointing at work, inside a backward pass: nothing may be counted again."""
        return torch._C._current_graph_task_id() != -1

    def bind(self, *made: nn.Module | OutputChannels, folded: bool = False) -> Self:
        """Names the conv or linear layer whose output is this layer's input; returns self.

        Several are concatenated along the channels, as in bind(conv_a, conv_b). OutputChannels(conv, first, channels)
        stands for some channels of a layer with one group. `folded` lets a single one apply this layer in training,
        which is right where its output goes nowhere else. Raises TypeError for a module whose output is not
        weight · patch + bias; ValueError if the channels differ, or if it cannot train so.
        """
        parts = [self._checked(part) for part in made]
        channels = sum(part.channels for part in parts)
        if channels != self.num_features:
            which = "the module has" if len(parts) == 1 else "the modules have"
            raise ValueError(f"cannot bind: {which} {channels} output channels, the norm {self.num_features}")
        if folded and not (len(parts) == 1 and parts[0].whole and applies_stored_weight(parts[0].module)):
            raise ValueError("cannot bind folded: this takes one whole layer that applies its weight as it is stored")
        self._unbind()
        self._sources, first = [], 0
        for part in parts:
            channels_here = None if len(parts) == 1 else slice(first, first + part.channels)
            end_folding(part.module)  # its output goes to two norms now
            self._sources.append(Source(self, InputTap(part, self), channels_here))
            first += part.channels
        if folded:
            begin_folding(parts[0].module, self._sources[0])
        return self

    def _checked(self, made: nn.Module | OutputChannels) -> OutputChannels:
        module = made.module if isinstance(made, OutputChannels) else made
        if not is_producer(module):
            raise TypeError(
                f"cannot bind to {type(module).__name__}: its output is not known to be weight * patch + bias; bind "
                "to a conv, transposed conv, linear or weight-standardised conv of torch or timm, or leave it unbound"
            )
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
        self._sources = [Source(self)]
        self._begun = False

    def begin_training(self) -> None:
        """Decides what each source remembers, by the running statistics that are there; once, until they are reset.

        And again where they have been measured anew, as torch's `update_bn` does: without a momentum, from nothing.
        """
        if self._begun:
            if self._momentum is not None or self.momentum is None:
                return
            self.reset_history()
        self._begun, self._momentum = True, self.momentum
        carried = "ema" if self.window.is_fixed or not self.is_new else "new"
        for source in self._sources:
            source.state = self._new_state(source, carried if self.window.is_carried else "ring")

    def _new_state(self, source: Source, kind: str) -> CarriedWindow | NewLayerWindow | Ring:
        if kind == "ema":
            return CarriedWindow(self.window, self.phase)
        if kind == "new":
            return NewLayerWindow(self.window, source.tap is None and self.window.compensation != "none")
        return Ring(self.window if source.tap is not None else self.window.without_weight())

    def reset_history(self) -> None:
        """Forgets all but the running statistics, which are looked at once more when training goes on."""
        self._begun = self._moving = False
        self._left = None
        self.iteration = 0
        for source in self._sources:
            source.state = None
            if source.tap is not None:
                source.tap.sums = None

    def reset_running_stats(self) -> None:
        """Resets the running statistics as BatchNorm does, and the history: both are to be estimated anew."""
        super().reset_running_stats()
        if "_sources" in self.__dict__:
            self.reset_history()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # else a carried window stays, and follows the weights that were loaded without it as it does in a step
        carried = all(isinstance(source.state, CarriedWindow) for source in self._sources)
        if prefix + "running_mean" in state_dict or not carried:
            self.reset_history()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._carry()
        super()._save_to_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; running statistics are taken to the weights as they are before an evaluation."""
        if self.training != mode:  # whoever sets `training` itself ends an evaluation here as well
            if not mode:
                self._carry()
            self._moving = False
        return super().train(mode)

    @torch.no_grad()
    def _carry(self) -> None:
        """Takes the running statistics to the weights as they are; in evaluation they are part of the function."""
        if not (self.training and self._moving and self.compensated and self.window.is_carried):
            return
        for source in self._sources:
            source.carry()
        self._leave()

    def __getstate__(self) -> dict[str, Any]:
        # a copy has nothing that could take its statistics to the weights that it is copied with
        self._carry()
        return dict(self.__dict__)

    @property
    def statistics_changed(self) -> bool:
        """Whether anybody else has written to the running statistics since this layer left them."""
        if self._left is None:
            return True
        left, found = self._left, self._found()
        return not (left[0] is found[0] and left[1] is found[1] and left[2:] == found[2:])

    def _leave(self) -> None:
        """Notes the running statistics as this layer leaves them."""
        self.__dict__["_left"] = self._found()  # modules set attributes the long way

    def check_momentum(self) -> None:
        """Warns where somebody sets a momentum, which a carried window does not read; once."""
        if self._told or self.momentum == self._momentum or self.window.is_fixed:
            return
        warnings.warn(
            f"the momentum of {self.described} was set to {self.momentum}, which CBN does not read: its statistics "
            "follow images and weights in their own way; to measure statistics anew, as PreciseBN does, do so with "
            "cbn.revert(copy.deepcopy(model)), or by torch.optim.swa_utils.update_bn",
            stacklevel=2,
        )
        self._told = True

    def took_step(self) -> None:
        """Counts a step of training, whose running statistics have been written."""
        self.__dict__["iteration"] += 1
        self.__dict__["_moving"] = True
        self._leave()

    def _found(self) -> tuple[Any, ...]:
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None:
            return mean, var
        # `buffer.data = t` counts as no write
        places = (mean.data_ptr(), var.data_ptr()) if type(mean) is type(var) is Tensor else ()
        return mean, var, writes_to(mean), writes_to(var), *places

    def history_tensors(self) -> list[Tensor]:
        """The tensors that hold the past, to account for their memory."""
        return [t for source in self._sources if source.state is not None for t in source.state.tensors()]

    @property
    def history_bytes(self) -> int:
        """What the past will take once the window is full."""
        return sum(source.bytes(self.num_features) for source in self._sources)

    @torch.no_grad()
    def history_state(self) -> dict[str, Any]:
        """What a bit-identical resume needs beside the state_dict; tensors, numbers and strings only."""
        self._carry()
        states = [source.state for source in self._sources]
        return {
            "iteration": self.iteration,
            "momentum": self._momentum,
            "window": str(self.window),
            "sources": [None if state is None else state.state_dict() for state in states],
        }

    def load_history_state(self, state: dict[str, Any]) -> None:
        """Restores `history_state`; load weights first, since that empties the history.

        What each source remembers is restored with it, as it depends on the statistics that were there when training
        began. Raises ValueError if it was taken with another window, another number of modules or channels, or if it
        is damaged.
        """
        check_history(self, state)
        saved = state["sources"]
        self.reset_history()
        self.iteration = int(state["iteration"])
        self._begun, self._momentum = None not in saved, state.get("momentum", self.momentum)
        for source, own in zip(self._sources, saved, strict=True):
            if own is not None:
                source.state = self._new_state(source, own["kind"])
                source.state.load_state_dict(own)
        self._leave()

    def normalize(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """Normalises x [N, C, ...]: over the window in training, exactly as BatchNorm in evaluation; then `act`."""
        refuse_proxy(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected input with {self.num_features} channels, got {tuple(x.shape)}")
        if self.training:
            refuse_replica(self)
            if torch.compiler.is_compiling():
                tap = self._sources[0].tap
                if tap is not None and tap.take_in_graph(x):
                    return x if act is None else activate_in_graph(x, act)
                unfolded: Tensor = torch.compiler.disable(self._normalize_by_window)(x, act)
                return unfolded
            if not torch.is_inference_mode_enabled():
                return self._normalize_by_window(x, act)
            with what_lasts_may_be_made():
                return self._normalize_by_window(x, act)
        y = self._normalize_by_running_statistics(x)
        return y if act is None else act(y)

    def _normalize_by_running_statistics(self, x: Tensor, source: Source | None = None) -> Tensor:
        stored = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, gamma, beta = stored if source is None else map(source.of, stored)
        return F.batch_norm(x, mean, var, gamma, beta, mean is None and var is None, 0.0, self.eps)

    def _normalize_by_window(self, x: Tensor, act: nn.Module | None) -> Tensor:
        recomputing = self.is_recomputing
        self.begin_training()
        if self._is_folded(x, recomputing):
            was_counted = self._sources[0].counted_in_graph()
            if not (recomputing or was_counted):
                self._count(None)
            return x if act is None else activate(x, act)
        refuse_transforms(x, self.weight, self.bias)
        batches = [source.batch(source.of_input(x), recomputing) for source in self._sources]
        if x.numel() == 0 and not (self.window.sync and world_size() > 1):
            y = self._normalize_by_running_statistics(x)
            return y if act is None else act(y)
        # statistics and what is remembered are float32 whatever autocast does
        with torch.autocast(x.device.type, enabled=False):
            made = [self._over(source, batch) for source, batch in zip(self._sources, batches, strict=True)]
        if not recomputing:
            counted = [finite for _, finite in made if finite is not None]
            # a part may be finite where another one is not
            self._count(torch.stack(counted).all() if counted else None, counts=bool(counted))
        y = made[0][0] if len(made) == 1 else torch.cat([part for part, _ in made], 1)
        return y if act is None else act(y)

    def _is_folded(self, x: Tensor, recomputing: bool) -> bool:
        """Whether the layer that made x has normalised it already."""
        (source, *more) = self._sources
        if more or source.tap is None or not isinstance(source.state, CarriedWindow):
            return False
        return source.tap.take_folded(x) or (recomputing and source.state.last_folded)

    def _count(self, finite: Tensor | None, counts: bool = True) -> None:
        batches = self._buffers["num_batches_tracked"]
        if batches is not None and counts and self.track_running_stats:
            batches.add_(1 if finite is None else finite)
        self.took_step()

    def _over(self, source: Source, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Output for a source's channels, and whether they count for the running statistics (None: they cannot)."""
        state = source.state
        assert state is not None
        if batch.recomputing:
            source.check_passes()
        mean, var = state.statistics(batch)
        if not isinstance(state, CarriedWindow):
            # one rank alone can tell without waiting for the device
            if batch.ranks == 1 and batch.positions == 1:
                if not self.track_running_stats:
                    raise ValueError(
                        f"expected more than 1 value per channel in training, got input size {batch.x.shape}"
                    )
                # one value per channel has no variance, but it counts for the window, which fills from here
                return self._normalize_by_running_statistics(batch.x, source), None
            if not batch.recomputing:
                self._update_running_statistics(batch, mean, var)
        y = normalize(batch.x, mean, var, source.of(self.weight), source.of(self.bias), self.eps)
        if y.grad_fn is not None and not batch.recomputing:
            one = Pass()
            one.looks = not isinstance(state, CarriedWindow) or state.last_looked
            y.grad_fn.register_hook(one.ends)  # so that it lives as long as the graph does
            source.begins(one)
        return y, batch.finite

    @torch.no_grad()
    def _update_running_statistics(self, batch: Batch, mean: Tensor, var: Tensor) -> None:
        """Moves a source's running statistics to mean and var of the window, as BatchNorm, with Bessel's correction.

        With momentum None, as recalibration needs it, to those of all batches together: each counts once, and the
        variance between them counts as well.
        """
        running = batch.running
        if not self.track_running_stats or running is None:
            return
        var = var * batch.positions / (batch.positions - 1)
        share: Any = self.momentum
        if share is None:
            assert self.num_batches_tracked is not None
            share = (self.num_batches_tracked + 1).to(running.dtype).reciprocal()
        old_mean, old_var = running.read()
        if self.momentum is None and self.window.size > 1:
            assert batch.mean is not None
            assert batch.var is not None
            mean, var = pooled(old_mean, old_var, batch.mean, batch.var, share)
        else:
            mean, var = old_mean.lerp(mean, share), old_var.lerp(var, share)
        if not is_known(batch.finite):  # decided on the device, without waiting for it
            mean, var = torch.where(batch.finite, mean, old_mean), torch.where(batch.finite, var, old_var)
        elif not batch.finite:
            return
        running.write(mean, var)

    def forward(self, input: Tensor) -> Tensor:
        """Shape: [N, C] or [N, C, ...], as the BatchNorm it stands for; output like input in shape and dtype."""
        return self.normalize(input)

    def extra_repr(self) -> str:
        """BatchNorm's arguments and the window's."""
        names = " and ".join(plain_class(module).__name__ for module in self.producers)
        how = "folded into" if self.trains_folded else "bound to"
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, window=({self.window}){f', {how} {names}' if names else ''}"
