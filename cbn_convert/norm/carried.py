"""The carried window: the running statistics, following the weights in every step and the images in some.

A window that starts at running_mean and running_var, forgets slowly and is carried to the weights of every step needs
no history: the running statistics are the window, valid at the weights of the last step. What must be known besides is
how they respond to the weights, for which mean and covariance of the input patches are enough, shared by all channels
of a group: the mean patch p̄, a few principal axes u_k, and for every entry the variance d that these leave. From the
weights θ_0 of the last step to θ, with q(θ) = Σ_f d_f θ_f² + Σ_k (u_k·θ)²,

    M = μ + p̄·(θ - θ_0) + (b - b_0) + (|θ| / |θ_0| - 1) (μ - θ_0·p̄ - b_0)            S = σ² q(θ) / q(θ_0)

Both are exact if weights are only rescaled, and M wherever p̄ is the mean patch of what μ was taken of; S wherever the
covariance of the patches is what d and the axes say. What p̄ does not explain of μ grows with the length of θ alone,
since p̄ says all that is known of directions. q is positive, so nothing can vanish or turn negative. θ·∂L/∂θ = 0, up to
eps.

One step of `every` looks at its batch, the layers of a model taking turns: mean and variance of x join with the share
1 - (1 - 1/size)^n, n being the images since the last look. In one look of four, p̄, d and the axes of some positions
join as the mean of the last eight such looks: they say how statistics respond to weights, for which few images are
enough, and change as earlier layers do. All that happens behind the step: what it normalises by depends on the weights
alone.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch, RunningStatistics
from .distributed import JoinedMoments, PatchMoments, joined_moments
from .functional import (
    LEAST_VARIANCE,
    TINY,
    between_means,
    is_known,
    patch_shapes,
    principal_axes,
)
from .kernels import select
from .producers import groups_of
from .window import Window

# Looks in a row at the start: the patches of one batch say little of the others.
FIRST_LOOKS = 32
PATCH_TURNS = 4  # looks of which one looks at patches, too, later on: these cost more
PATCH_LOOKS = 8  # such looks that the moments of patches remember
# see `warn_of_strangers`
LEAST_CHANNELS, LEAST_POSITIONS, LEAST_CORRELATION, LEAST_SHARE = 16, 16, 0.2, 1e-6
# `Carried.table` and the rest of it, by their names in checkpoints
_ROWS, PATCHES = ("mean", "var", "anchor", "spread", "square"), ("patch_mean", "patch_rest", "patch_axes")
SLOTS = (*_ROWS, *PATCHES)


class Carried(NamedTuple):
    """Statistics of some channels at certain weights, and how they respond to these; None where they need not.

    Never written to: whoever keeps one for a backward pass finds it as it was.
    """

    table: Tensor  # [5, C]: M, S, θ·p̄ + b, q and θ·θ; of the first two alone where weights are not followed
    patch_mean: Tensor | None = None  # p̄ [G, F]
    patch_rest: Tensor | None = None  # d [G, F], the variance of every entry that the axes leave
    patch_axes: Tensor | None = None  # u [G, K, F]

    @property
    def mean(self) -> Tensor:
        """M [C]."""
        return self.table[0]

    @property
    def var(self) -> Tensor:
        """S [C]."""
        return self.table[1]

    def fits(self, channels: int, theta: Tensor | None) -> bool:
        """Whether these are of a layer with so many channels and weights [C, ...], as not where it was pruned since."""
        if self.table.shape[1] != channels:
            return False
        return theta is None or self.patch_mean is None or self.patch_mean.shape[1] * channels == theta.numel()

    def moved(self, theta: Tensor | None, bias: Tensor | None) -> Carried:
        """The statistics at θ [C, F] and b [C]; may be differentiated with respect to both.

        Where weights were zero, and are no more, what x was says nothing: the patches say all that is known.
        """
        if theta is None or self.patch_mean is None:
            return self
        return self._replace(table=select(theta).move(self, theta, bias))

    def connected(self, theta: Tensor | None, bias: Tensor | None) -> Carried:
        """The same values to the bit, of statistics that are at θ and b, with the derivatives by both."""
        table = self.moved(theta, bias).table
        return self._replace(table=self.table + (table - table.detach())) if table.requires_grad else self

    def of(self, mean: Tensor, var: Tensor) -> Carried:
        """Other statistics [C] at the same weights that respond in the same way."""
        return self._replace(table=torch.cat([torch.stack([mean, var]), self.table[2:]]))

    def placed(self, mean: Tensor, var: Tensor, theta: Tensor, bias: Tensor | None) -> Carried:
        """Other statistics [C] at θ and b that respond in the same way.

        Args:
            mean, var: M and S [C].
            theta, bias: θ [C, F], and b [C] or None.
        """
        return self._replace(table=torch.stack([mean, var, mean, var, var])).moved(theta, bias).of(mean, var)

    def with_patches(self, found: PatchMoments, share: float | Tensor, theta: Tensor, bias: Tensor | None) -> Carried:
        """Patches joined with what a look found of them; statistics as they are, anchored at θ and b.

        Args:
            found: the moments of the patches that were looked at.
            share: their weight, from 0 to 1; of no meaning where no patches were known.
            theta, bias: θ [C, F], and b [C] or None.
        """
        own, along = found.var, found.along
        if self.patch_mean is None or self.patch_rest is None or self.patch_axes is None:
            mean, total = found.mean, _at_least(own)
        else:
            step, axes = found.mean - self.patch_mean, self.patch_axes
            mean, left = self.patch_mean + share * step, 1 - share
            total = (self.patch_rest + axes.square().sum(1)).lerp(_at_least(own + left * step * step), share)
            # no matrix products, whose precision is up to the user's settings
            kept = (found.probes[:, :, None] * axes[:, None]).sum(3, keepdim=True)
            along = left * (kept * axes[:, None]).sum(2) + share * (along + left * between_means(found.probes, step))
        least = LEAST_VARIANCE / (1 + LEAST_VARIANCE) * total.mean(1, keepdim=True)
        axes = principal_axes(found.probes, along, total, least)
        rest = (total - axes.square().sum(1)).clamp_min(0)
        return Carried(self.table, mean, rest, axes).placed(self.mean, self.var, theta, bias)

    def slots(self) -> dict[str, Tensor]:
        """Copies of all tensors by their names in checkpoints."""
        rows = dict(zip(_ROWS, self.table.clone(), strict=False))
        return rows | {name: t.clone() for name, t in zip(PATCHES, self[1:], strict=True) if t is not None}

    @classmethod
    def of_slots(cls, slots: dict[str, Tensor]) -> Carried:
        """The inverse of `slots`."""
        table = torch.stack([slots[name] for name in _ROWS if name in slots])
        return cls(table, *[slots[name].clone() if name in slots else None for name in PATCHES])

    def where(self, finite: Tensor, other: Carried) -> Carried:
        """This one where `finite`, else the other; decided on the device, without waiting for it."""
        pairs = zip(self, other, strict=True)
        return Carried(*[t if t is None or u is None else torch.where(finite, t, u) for t, u in pairs])  # type: ignore[arg-type]


def warn_of_strangers(known: Carried, found: JoinedMoments, batch: Batch) -> None:
    """Warns where statistics are of other weights than those of the module, as where a stem was replaced.

    Pretrained layers whose channels differ in variance by more than a factor of e have these differences in any batch:
    in three networks on four data sets the correlation is 0.32 at least; under new weights, with 32 channels, it is
    below 0.2 in 33 of 36 cases (benchmarks/study/foreign_statistics.py).
    """
    if type(found.mean) is not Tensor or found.mean.is_meta or len(found.mean) < LEAST_CHANNELS:
        return
    positions = batch.x.numel() // len(found.mean)
    if positions < LEAST_POSITIONS or found.var.sum() < LEAST_SHARE * known.var.sum():  # an image of zeros, say
        return
    then, now = (var.clamp_min(TINY).log() for var in (known.var, found.var))
    if then.std() > 1 and torch.corrcoef(torch.stack([then, now]))[0, 1] < LEAST_CORRELATION:
        what = "a layer without a weight of its own"
        if batch.module is not None:
            what = str(batch.module).removeprefix("Folded")
        warnings.warn(
            f"the running statistics behind {what} are not those of what it makes (variances over channels: no "
            "correlation with the batch's); if it was replaced or initialised anew, call reset_running_stats() of its "
            "norm layer before training, which then starts as a new one",
            stacklevel=2,
        )


def _at_least(var: Tensor) -> Tensor:
    return var + LEAST_VARIANCE * var.mean(1, keepdim=True) + TINY


def state_bytes(channels: int, fan_in: int, groups: int) -> int:
    """What a `Carried` takes in float32; fan_in 0 where no weight is followed."""
    of_patches = sum(math.prod(shape) for shape in patch_shapes(groups, fan_in))
    return 4 * (2 * channels + (3 * channels + of_patches if fan_in else 0))


_COUNTS = ("seen", "looks", "waiting", "patch_looks")


class CarriedWindow:
    """The state of the carried window for some channels of a layer.

    `state` holds at the weights of the last step, `last` is what that step normalised by, for a forward pass that is
    computed once more. Copies and pickles keep neither: they go on from their own running statistics.
    """

    compensated = property(lambda self: self.state is not None and self.state.patch_mean is not None)
    slots, counts = SLOTS, _COUNTS  # of a state_dict

    def __init__(self, window: Window, phase: int = 0) -> None:
        self.window = window
        self.phase = phase
        self.clear()

    def clear(self) -> None:
        """Forgets all but what the running statistics say."""
        self.seen = 0  # steps
        self.looks = 0
        self.waiting = 0  # images since the last look
        self.patch_looks = 0
        self.state: Carried | None = None
        self.last: Carried | None = None
        self.last_looked = self.last_folded = False

    def __getstate__(self) -> dict[str, Any]:
        return {"window": self.window, "phase": self.phase}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def is_due(self, running: RunningStatistics, iteration: int, follows: bool) -> bool:
        """Whether the step looks at its batch: in turn, or because little is known of the patches yet."""
        every, early = self.window.every, not self.compensated or self.looks < FIRST_LOOKS
        if every is None or not (running.tracks or (follows and not self.compensated)):
            return False
        return (follows and early) or (iteration + self.phase) % every == 0

    def begin(self, running: RunningStatistics, theta: Tensor | None, bias: Tensor | None, images: int) -> Carried:
        """Counts a step with so many images; returns the statistics that are to be taken to its θ [C, F] and b [C].

        Args:
            running: those of the norm layer, where the window begins.
            theta, bias: None where the weight is not followed; b also where there is none.
            images: of this process.
        """
        known = self._known(running, theta, bias)
        self.seen += 1
        self.waiting += images if running.tracks else 0
        return known

    def arrive(self, at: Carried, folded: bool) -> None:
        """Notes the statistics at the weights of a step that has begun, and whether its layer trains folded."""
        self.state = self.last = at
        self.last_looked, self.last_folded = False, folded

    def _known(self, running: RunningStatistics, theta: Tensor | None, bias: Tensor | None) -> Carried:
        if self.state is not None and not self.state.fits(len(running.mean), theta):
            self.clear()
        state, changed = self.state, running.changed
        if state is not None and changed and running.rounds and running.hold(state.mean, state.var):
            changed = False  # a group has handed out what was left; read, they would be rounded in every step
        if state is None or (theta is None and changed):
            return Carried(torch.stack(running.read()))
        if (state.table.dtype, state.table.device) != (running.dtype, running.mean.device):
            state = Carried(*[None if t is None else t.to(running.mean.device, running.dtype) for t in state])  # type: ignore[arg-type]
        if theta is None or not changed:
            return state
        # Somebody else wrote to the buffers, or to memory that they share with others. What DistributedDataParallel
        # hands out before every step are those of rank 0 at the weights of the step before; what others write goes
        # with the weights as they are.
        if not running.handed_out and running.hold(state.mean, state.var):
            return state
        mean, var = running.read()
        return state.of(mean, var) if running.handed_out else state.placed(mean, var, theta, bias)

    def look(self, batch: Batch) -> Carried:
        """Takes the batch in, behind the step that `begin` began; returns what the step is to normalise by."""
        before = self.last
        assert before is not None
        self.last_looked = True
        theta, bias = batch.theta, batch.bias
        turn, patches = (batch.iteration + 1) // (self.window.every or 1), None
        known = before.patch_mean
        if known is not None and batch.module is not None and len(known) != groups_of(batch.module):
            before = Carried(before.table[:2])  # somebody changed them
        due = before.patch_mean is None or self.looks < FIRST_LOOKS or turn % PATCH_TURNS == 0
        if theta is not None and batch.input is not None and due:
            patches = batch.patches(self.window.positions, self.patch_looks)
        found = joined_moments(batch, patches, before, self.waiting)
        if self.looks == 0:
            warn_of_strangers(before, found, batch)
        share = 1 - (1 - 1 / self.window.size) ** found.images
        finite: Tensor | bool
        if found.patches is not None and theta is not None:
            if before.patch_mean is None:
                # none yet; these serve this step already, so that here it has to be known whether they can be trusted
                trusted = found.finite
                if type(trusted) is Tensor and not trusted:
                    return before
                before = before.with_patches(found.patches, 1.0, theta, bias)
                self.looks = self.patch_looks = 0
            of_patches = 1 / min(self.patch_looks + 1, PATCH_LOOKS)
            joined, finite = select(theta).join(before, theta, bias, found, (share, of_patches))
        else:
            joined, finite = select(before.table).pool(before, found, share)
        self.last = before
        if isinstance(finite, Tensor) and not is_known(finite):
            self.state = joined.where(finite, before)
        elif finite:
            self.state = joined
        else:
            return before
        self.looks, self.waiting = self.looks + 1, 0
        if patches is not None:
            self.patch_looks += 1
        return before

    def advance(self, batch: Batch) -> Carried:
        """Takes a step; returns what it normalises by at θ and b."""
        running, theta, bias = batch.running, batch.theta, batch.bias
        assert running is not None
        carried = self.begin(running, theta, bias, batch.images).moved(theta, bias)
        self.arrive(carried, folded=False)
        if self.is_due(running, batch.iteration, theta is not None):
            carried = self.look(batch)
        self.write(running)
        return carried

    def statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M and S that a step normalises x by where the layer does not train folded; see `folded` for where it does."""
        if batch.recomputing and self.last is not None:
            carried = self.last
        else:
            with torch.no_grad():
                carried = self.advance(batch.detached())
        if batch.theta is not None and self.window.gradient == "full":
            carried = carried.connected(batch.theta, batch.bias)
        return carried.mean, carried.var

    def write(self, running: RunningStatistics) -> None:
        """Makes the running statistics those of the window, unless they are to stay as they are."""
        if self.state is not None and not self.window.is_fixed:
            running.write(self.state.mean, self.state.var)

    def carry(self, running: RunningStatistics, theta: Tensor, bias: Tensor | None) -> None:
        """Takes the window, and the running statistics with it, to other weights between two steps."""
        if self.state is not None:
            self.state = self._known(running, theta, bias).moved(theta, bias)
            self.write(running)

    def tensors(self) -> list[Tensor]:
        """The tensors of the state, to account for their memory."""
        return [] if self.state is None else [t for t in self.state if t is not None]

    def bytes(self, channels: int, fan_in: int, groups: int) -> int:
        """What the state takes in float32; fan_in 0 where no weight is followed."""
        return state_bytes(channels, fan_in, groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as copied tensors and numbers; for training checkpoints."""
        slots = {} if self.state is None else self.state.slots()
        return {"kind": "ema", **{name: getattr(self, name) for name in _COUNTS}, "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.clear()
        for name in _COUNTS:
            setattr(self, name, int(state[name]))
        if state["slots"]:
            self.state = Carried.of_slots(state["slots"])
