"""What feeds some channels of a norm layer, and the window of those channels."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..modes import what_lasts_may_be_made
from ..refusals import refuse_replica, refuse_transforms
from . import graph
from .activation import origin
from .batch import Batch, Pass, RunningStatistics
from .carried import CarriedWindow
from .distributed import world_size
from .folded import FoldedMap, FoldedStep
from .functional import statistics_dtype
from .new_layer import NewLayerWindow
from .producers import (
    as_function,
    channels_last,
    fan_in,
    groups_of,
    is_at_hand,
    is_linear,
    is_transposed,
    learns,
    plain_class,
    theta_and_bias,
)
from .ring import Ring
from .tap import CHANGED, InputTap, OfNorm, is_watched, writes_to

if TYPE_CHECKING:
    from .layer import CrossIterationMixin

MOST_PASSES = 16  # that are noted before those that are gone are forgotten


class Source(OfNorm):
    """Channels of a norm layer that have one window: all of them, or those that one of several modules made.

    tap: on the module whose weight made them, None where no weight did. channels: which of the layer's, None for all.
    state: the window, chosen when training begins.
    """

    def __init__(self, norm: CrossIterationMixin, tap: InputTap | None = None, channels: slice | None = None) -> None:
        super().__init__(norm)
        self.tap = tap
        self.channels = channels
        self.state: CarriedWindow | NewLayerWindow | Ring | None = None
        self.number = graph.numbered(self)
        self.passes: list[weakref.ref[Pass]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "passes": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = graph.numbered(self)

    def of(self, values: Tensor | None) -> Tensor | None:
        """This source's part of a tensor [C]."""
        return values if values is None or self.channels is None else values[self.channels]

    def of_input(self, x: Tensor) -> Tensor:
        """This source's part of x [N, C, ...]."""
        return x if self.channels is None else x[:, self.channels]

    @property
    def compensated(self) -> bool:
        """Whether the window was recorded with what compensation needs."""
        return self.state is not None and self.state.compensated

    def bytes(self, channels: int) -> int:
        """What a full window takes in float32, for a layer of so many channels."""
        count = len(range(channels)[self.channels or slice(None)])
        window = self.norm.window
        carried = NewLayerWindow if self.norm.is_new and not window.is_fixed else CarriedWindow
        state = self.state or (carried(window) if window.is_carried else Ring(window))
        if self.tap is None or not self.tap.followed:
            return state.bytes(count, 0, 1)
        return state.bytes(count, fan_in(self.tap.module), groups_of(self.tap.module))

    def running(self, dtype: torch.dtype) -> RunningStatistics | None:
        """This source's running statistics; None where the layer has none."""
        buffers = self.norm._buffers
        mean, var = self.of(buffers["running_mean"]), self.of(buffers["running_var"])
        if mean is None or var is None:
            return None
        # DistributedDataParallel writes to buffers in a way that counts as no write
        handed_out = world_size() > 1
        changed = self.norm.statistics_changed or handed_out
        return RunningStatistics(mean, var, dtype, changed, handed_out, self.norm.track_running_stats)

    def in_training(self, dtype: torch.dtype) -> RunningStatistics | None:
        """`running` for a step. Raises RuntimeError where a carried window has none any more."""
        running = self.running(dtype)
        if isinstance(self.state, CarriedWindow):
            if running is None:  # as in test-time adaptation by the batch alone
                raise RuntimeError(
                    f"{self.norm.described} has no running statistics any more, which its window is made of; call "
                    "cbn.revert(model) before they are taken away"
                )
            self.norm.check_momentum()
        return running

    def batch(self, x: Tensor, recomputing: bool) -> Batch:
        """What the window is to see of x [N, C, ...].

        Raises RuntimeError if x is not what the tapped module made, or if that has not run.
        """
        norm, dtype = self.norm, statistics_dtype(x)
        module = made_of = theta = bias = None
        if self.tap is not None:
            made_of = self.tap.take()
            if not recomputing:
                self.tap.watch()
            if self.tap.followed:
                module = self.tap.module
                if made_of is None and norm.window.size > 1 and not recomputing:
                    raise RuntimeError(
                        f"{norm.described} is bound to a {plain_class(module).__name__} that has not run since the "
                        f"last forward pass; {CHANGED}bind it to the module that produces its input"
                    )
                theta, bias = self.theta_and_bias(dtype)
            if norm.window.compensation != "none":
                self.tap.check_output(x)
        ranks = world_size() if norm.window.sync else 1
        return Batch(x, module, made_of, theta, bias, norm.iteration, recomputing, ranks, self.in_training(dtype))

    def theta_and_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """θ [C, F] and b [C] of these channels, as `producers.theta_and_bias`."""
        assert self.tap is not None
        theta, bias = theta_and_bias(self.tap.module, dtype)
        rows = self.tap.rows
        return (theta, bias) if rows is None else (theta[rows], None if bias is None else bias[rows])

    def carry(self) -> None:
        """Takes a carried window to the weights as they are, and the running statistics with it."""
        if self.tap is None or not isinstance(self.state, CarriedWindow) or not self.state.compensated:
            return
        if not is_at_hand(self.tap.module):
            return
        assert self.state.state is not None
        dtype = self.state.state.mean.dtype
        running = self.running(dtype)
        if running is not None:
            running.changed = True  # looked at, since `buffer.data.copy_(t)`, and what numpy does, count as no write
            self.state.carry(running, *self.theta_and_bias(dtype))

    def begins(self, one: Pass) -> None:
        """Notes a forward pass that is not a computation once more."""
        if len(self.passes) > MOST_PASSES:
            self.passes = [ref for ref in self.passes if ref() is not None]
        self.passes.append(weakref.ref(one))

    def check_passes(self) -> None:
        """To be called where a pass is computed once more: which one, nobody says.

        Raises RuntimeError where several wait for their backward pass and have not all normalised alike.
        """
        waiting = [one for one in (ref() for ref in self.passes) if one is not None and not one.done]
        if len(waiting) > 1 and any(one.looks for one in waiting):
            raise RuntimeError(
                f"activation checkpointing computes {self.norm.described} once more, but {len(waiting)} forward passes "
                "wait for their backward pass, and which one is meant nobody says; call backward() behind every "
                "forward pass, give the model all images at once, or train without activation checkpointing"
            )

    def folds(self, module: nn.Module, input: Any) -> bool:
        """Whether the module is to apply the norm in this forward pass: what it makes goes there, and nowhere else."""
        if self.is_orphan:
            if self.tap is not None:
                self.tap.leave()
            return False
        norm = self.norm
        # one that was taken out of the model hears of no eval(), but the module does
        if not (norm.training and module.training) or self.tap is None or self.tap.module is not module:
            refuse_replica(module)
            return False
        compiling = torch.compiler.is_compiling()
        if not isinstance(input, Tensor) or not (graph.can_fold(self.number) if compiling else self.can_fold()):
            return False
        weight = module._parameters["weight"]
        if weight is None or not (input.dim() >= 2 if is_linear(module) else input.dim() == weight.dim()):
            return False
        if input.dtype != weight.dtype and (
            torch.float64 in (input.dtype, weight.dtype) or not torch.is_autocast_enabled(input.device.type)
        ):
            return False  # an error of torch's own
        return bool(input.numel()) or (norm.window.sync and world_size() > 1)

    def can_fold(self) -> bool:
        """Whether the module can apply the norm, whatever it gets: with a carried window, and nobody looking."""
        norm, module = self.norm, None if self.tap is None else self.tap.module
        if norm is None or module is None:
            return False
        if self.state is None:
            norm.begin_training()
        if not isinstance(self.state, CarriedWindow) or "parametrizations" in module._modules:
            return False
        for m in (module, norm):
            if "weight" not in m._parameters or "bias" not in m._parameters:
                return False  # as where somebody keeps them elsewhere, in one flat parameter
        return not (is_watched(module) or is_watched(norm) or _any_module_is_watched())

    def passes_by(self) -> None:
        """To be called where the module does not apply the norm: what it makes is no normalised output."""
        if self.tap is not None and self.tap.folded:
            self.tap.folded = self.tap.in_graph = False

    def counted_in_graph(self) -> bool:
        """Whether the step whose output has arrived was counted by a compiled graph, of which the norm is no part."""
        assert self.tap is not None
        counted, self.tap.in_graph = self.tap.in_graph, False
        return counted

    def folded(self, module: Any, input: Tensor, output_size: Any = None) -> Tensor:
        """The output of the module, normalised; input [N, C_in, ...], the rest as a transposed conv takes it."""
        if torch.compiler.is_compiling():
            return self._folded_in_graph(module, input, output_size)
        if not torch.is_inference_mode_enabled():
            return self._folded(module, input, output_size)
        with what_lasts_may_be_made():
            return self._folded(module, input, output_size)

    def _folded(self, module: Any, input: Tensor, output_size: Any) -> Tensor:
        norm, tap, device, recomputing = self.norm, self.tap, input.device.type, self.norm.is_recomputing
        # not as attributes, which modules look up the long way, here and below
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        gamma, beta = norm._parameters["weight"], norm._parameters["bias"]
        refuse_transforms(input, weight, bias, gamma, beta)
        assert tap is not None
        assert isinstance(self.state, CarriedWindow)
        made_of, casts = origin(input), torch.is_autocast_enabled(device)
        if casts and input.dtype not in (torch.float64, torch.get_autocast_dtype(device)):
            input, made_of = input.to(torch.get_autocast_dtype(device)), None
        if recomputing:
            self.check_passes()
        else:
            tap.check_arrivals()
            tap.watch()
        running = self.in_training(statistics_dtype(weight))
        assert running is not None, "a carried window has some"
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            apply, padded = as_function(module, input, output_size)
            last, made_of = (0, None) if is_transposed(module) else (channels_last(weight), made_of)
            step = FoldedStep(
                norm.eps, running.dtype, last, module, apply, self.state, running, norm.iteration, recomputing,
                world_size() if norm.window.sync else 1, tap.followed, made_of, input.detach(),
            )  # fmt: skip
            y: Tensor = FoldedMap.apply(padded, weight, bias, gamma, beta, step)
        if not recomputing:
            self.begins(step)
        tap.folded, tap.in_graph = not recomputing, False
        y._cbn_writes = writes_to(y)  # type: ignore[attr-defined]
        return y

    def _folded_in_graph(self, module: Any, input: Tensor, output_size: Any) -> Tensor:
        norm, tap, device = self.norm, self.tap, input.device.type
        assert tap is not None
        casts = torch.is_autocast_enabled(device)
        if casts and input.dtype not in (torch.float64, torch.get_autocast_dtype(device)):
            input = input.to(torch.get_autocast_dtype(device))
        weight, bias, gamma, beta = module.weight, module.bias, norm.weight, norm.bias
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            apply, padded = as_function(module, input, output_size)
            batches = norm.num_batches_tracked if norm.track_running_stats else None
            parameters = [None if t is None else t.detach() for t in (weight, bias, gamma, beta)]
            # a weight that moves without a gradient is followed behind the operator, and needs none of its state
            learned = norm.window.compensation != "none" and learns(module)
            scale, shift, *state = graph.step(self.number, batches, input.detach(), *parameters, output_size, learned)
            if not learned or norm.window.gradient != "full":
                state = [state[0], None, None, None]
            own = (weight, bias, gamma, beta, scale, shift, *state, norm.eps, module, apply)
            y: Tensor = graph.FoldedInGraph.apply(padded, *own)
        tap.made_in_graph(y)
        return y


def _any_module_is_watched() -> bool:
    m = torch_module
    return bool(m._global_forward_hooks or m._global_forward_pre_hooks or m._global_backward_hooks)
