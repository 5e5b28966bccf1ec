"""What a window gets to see of a step: `Batch`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .functional import statistics_dtype
from .moments import InputPatches
from .producers import Producer


@dataclass
class RunningStatistics:
    """The running statistics of some channels, as a carried window finds and leaves them.

    Args:
        mean: [C], a layer's buffer or a part of it, in any dtype.
        var: [C], as mean.
        dtype: that of statistics.
        changed: whether anybody else may have written to the buffers since they were left.
        handed_out: whether that is a process group, which hands out those of rank 0 before every step.
        tracks: whether images are to be taken in.
    """

    mean: Tensor
    var: Tensor
    dtype: torch.dtype
    changed: bool
    handed_out: bool
    tracks: bool

    @property
    def rounds(self) -> bool:
        """Whether the buffers have fewer digits than what is written to them."""
        return self.mean.dtype != self.dtype

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies in the dtype of statistics."""
        return self.mean.to(self.dtype, copy=True), self.var.to(self.dtype, copy=True)

    def hold(self, mean: Tensor, var: Tensor) -> bool:
        """Whether the buffers are what `write` would make them."""
        pairs = ((self.mean, mean), (self.var, var))
        return all(torch.equal(buffer, t.to(buffer.dtype)) for buffer, t in pairs)

    def write(self, mean: Tensor, var: Tensor) -> None:
        """Writes to the buffers."""
        self.mean.copy_(mean)
        self.var.copy_(var)

    def begin_write(self) -> tuple[Tensor, Tensor] | None:
        """The buffers, to be written to by way of their memory, which counts as a write; None where nobody counts."""
        both = (self.mean, self.var)
        if self.mean.is_inference() or self.var.is_inference():
            return None
        increment_version(both)
        return both


class Pass:
    """A forward pass, which lives as long as its backward pass may come."""

    looks = False  # whether it changes what the window normalises by, as a look at its batch does
    done = False  # whether its backward pass has come

    def ends(self, *gradients: object) -> None:
        """To be called behind the backward pass."""
        self.done = True


@dataclass
class Batch:
    """The current input of some channels of a layer, and the layer that made it where its weight is followed.

    Args:
        x: [N, C, ...], what is to be normalised.
        module: the layer that made x; None where no weight is to be followed.
        input: what the module made x of; None where nobody asked for it.
        theta: the module's weights [C, F], connected to its parameters by autograd, in the dtype of statistics.
        bias: [C] or None, as theta.
        iteration: how many came before.
        recomputing: whether this is a forward pass done once more, inside of a backward pass: nothing counts again.
        ranks: over how many processes the batch is joined.
        running: the running statistics, for a carried window.
    """

    x: Tensor
    module: Producer | None
    input: Tensor | None
    theta: Tensor | None
    bias: Tensor | None
    iteration: int
    recomputing: bool
    ranks: int
    running: RunningStatistics | None = None
    positions: float | Tensor = field(default=0.0, init=False)  # values per channel in the window
    mean: Tensor | None = field(default=None, init=False)  # of x, over all ranks
    var: Tensor | None = field(default=None, init=False)
    finite: Tensor = field(default_factory=lambda: torch.tensor(True), init=False)

    @property
    def images(self) -> int:
        """How many images of this process the batch is of."""
        return len(self.x if self.input is None else self.input)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics."""
        return statistics_dtype(self.x)

    def detached(self) -> Batch:
        """The same without autograd."""
        parts = (self.x, self.theta, self.bias)
        x, theta, bias = (None if t is None else t.detach() for t in parts)
        assert x is not None
        return replace(self, x=x, theta=theta, bias=bias)

    def measured(self, positions: float | Tensor, mean: Tensor, var: Tensor) -> None:
        """Notes mean and variance [C] of x over all ranks, and how many values per channel the window holds."""
        self.positions, self.mean, self.var = positions, mean, var
        self.finite = torch.isfinite(mean + var).all()

    def patches(self, at_most: int | None, turn: int) -> InputPatches:
        """The input patches of about at_most positions; see `InputPatches`."""
        assert self.module is not None
        assert self.input is not None
        return InputPatches(self.module, self.input, self.x.shape[2:], self.dtype, at_most, turn)
