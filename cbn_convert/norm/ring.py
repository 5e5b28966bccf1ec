"""The paper's window: the last iterations, each as it was, seen from today's weights (arXiv 2002.05712, eqs. 7 to 10).

With C = mean((x - μ) p), so that dμ/dθ = p̄, dσ²/dθ = 2C and θ·C = σ², an iteration τ of the past has under today's θ

    μ̃ = μ + p̄·(θ - θ_τ) + (b - b_τ)                                        exact
    σ̃² = σ² + 2C·(θ - θ_τ) - (μ̃ - μ)²                                      "taylor": eqs. 9 and 10, where ν = σ² + μ²
    σ̃² = σ² (θ·C / θ_τ·C)²                                                 "projection"

The projection is what Cauchy-Schwarz leaves of the variance of θ·p, given its covariance with θ_τ·p; it is positive,
and exact where weights are only rescaled. What is stored of θ_τ is what it made of its patches: θ_τ·p̄ + b_τ and θ_τ·C.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .distributed import joined_mean, joined_statistics
from .functional import by_group, is_known, response, whole_gradient
from .producers import is_linear
from .window import Window

# a variance that vanishes beside BatchNorm's eps: nothing is known of the slope of a channel that is constant
NEGLIGIBLE = 1e-15


class Iteration(NamedTuple):
    """What one iteration leaves behind; the last four are None where no weight is to be followed.

    Shapes for C channels, G groups and F = (C_in / G)·K_h·K_w weights per channel.
    """

    mean: Tensor  # μ [C]
    var: Tensor  # σ² [C], biased
    anchor: Tensor | None = None  # θ_τ·p̄ + b_τ [C]
    explained: Tensor | None = None  # θ_τ·C [C]
    patch_mean: Tensor | None = None  # p̄ [G, F]
    covariance: Tensor | None = None  # C [C, F]

    def seen_from(self, theta: Tensor | None, bias: Tensor | None, compensation: str) -> tuple[Tensor, Tensor]:
        """μ̃ and σ̃² [C] under θ [C, F] and b [C]; as they were without θ."""
        _, _, anchor, explained, patch_mean, covariance = self
        if theta is None or anchor is None or explained is None or patch_mean is None or covariance is None:
            return self.mean, self.var
        drift = response(patch_mean, theta, bias) - anchor
        gain = torch.linalg.vecdot(covariance, theta) - explained
        if compensation == "taylor":
            var = (self.var + 2 * gain - drift * drift).clamp_min(0)
        else:
            var = self.var * (1 + gain / explained.clamp_min(NEGLIGIBLE)) ** 2
        return self.mean + drift, var

    def is_like(self, other: Iteration) -> bool:
        """Whether both hold the same kinds of moments, of the same dtype and size and on the same device."""
        pairs = zip(self, other, strict=True)
        return all((t is None) == (u is None) for t, u in pairs) and (
            (self.mean.dtype, self.mean.device, self.mean.shape)
            == (other.mean.dtype, other.mean.device, other.mean.shape)
        )

    def where(self, finite: Tensor, other: Iteration) -> Iteration:
        """This one where `finite`, else the other; decided on the device, without waiting for it."""
        pairs = zip(self, other, strict=True)
        return Iteration(*[t if t is None or u is None else torch.where(finite, t, u) for t, u in pairs])  # type: ignore[arg-type]


class Ring:
    """The last `window.size` - 1 iterations of some channels; in no state_dict, and not in copies or pickles either.

    The current iteration is recorded when the next one begins. Until then a forward pass that is computed once more, as
    activation checkpointing does, finds the same past. Nothing recorded is ever written to.
    """

    slots, counts = Iteration._fields, ("seen",)  # of a state_dict

    def __init__(self, window: Window) -> None:
        self.window = window
        self.clear()

    def clear(self) -> None:
        """Forgets all iterations."""
        self.seen = 0
        self._past: tuple[Iteration, ...] = ()  # the oldest first
        self._current: tuple[Iteration, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": 0, "_past": (), "_current": None}

    @property
    def compensated(self) -> bool:
        """Whether the past was recorded with what compensation needs."""
        recorded = self._past if self._current is None else (*self._past, self._current[0])
        return any(i.covariance is not None for i in recorded)

    def statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M and S of the window over the past and the batch, which is recorded unless it is only computed once more."""
        positions, mean, var = joined_statistics(batch.x, batch.ranks)
        with torch.no_grad():
            past = self._recorded(batch, mean)
        if batch.iteration < self.window.burn_in:
            past = ()
        share = 1 / (len(past) + 1)
        batch.measured(positions / share, mean.detach(), var.detach())
        if not batch.recomputing and self.window.size > 1:
            self._current = (self._iteration(batch, mean.detach(), var.detach()), batch.finite)
        gradient = self.window.gradient
        theta, bias = batch.theta, batch.bias
        if gradient != "full":
            theta, bias = (None if t is None else t.detach() for t in (theta, bias))
        seen = [i.seen_from(theta, bias, self.window.compensation) for i in past]
        M = share * (mean + sum(m for m, _ in seen))
        S = share * (var + (mean - M) ** 2 + sum(v + (m - M) ** 2 for m, v in seen))
        return whole_gradient((M, S), mean, var) if gradient == "straight_through" else (M, S)

    def _recorded(self, batch: Batch, mean: Tensor) -> tuple[Iteration, ...]:
        """The past for a batch; moments of another kind, dtype or size are dropped, or moved to its device."""
        if not batch.recomputing:
            self._commit()
        if self._past:
            newest = self._past[-1]
            follows = batch.theta is not None
            if newest.mean.dtype != mean.dtype or (newest.covariance is not None) != follows:
                self.clear()
            elif newest.mean.device != mean.device:
                with torch.inference_mode(False):
                    self._past = tuple(
                        Iteration(*[None if t is None else t.to(mean.device) for t in i])  # type: ignore[arg-type]
                        for i in self._past
                    )
        return self._past

    def _commit(self) -> None:
        """Makes the current iteration a part of the past; one that is not finite counts as the one before once more."""
        if self._current is None:
            return
        (recorded, finite), self._current = self._current, None
        new: Iteration | None = recorded
        if self._past and not recorded.is_like(self._past[-1]):
            self.clear()
        if type(finite) is not Tensor:
            new = recorded  # what only stands for a tensor cannot be looked at
        elif is_known(finite) or not self._past:
            new = recorded if finite else self._past[-1] if self._past else None
        else:
            new = recorded.where(finite, self._past[-1])
        if new is None:
            return
        self._past = (*self._past, new)[-(self.window.size - 1) :]
        self.seen += 1

    def _iteration(self, batch: Batch, mean: Tensor, var: Tensor) -> Iteration:
        """The current batch's moments, with those of its patches where θ is to be followed."""
        if batch.theta is None or batch.input is None:
            return Iteration(mean, var)
        with torch.no_grad():
            theta, bias = batch.theta.detach(), None if batch.bias is None else batch.bias.detach()
            patches = batch.patches(self.window.positions, batch.iteration + 1)
            groups = patches.groups
            # a batch that is looked at in part has its own mean: what C is about
            patch_mean = joined_mean(patches.mean(), patches.positions, batch.ranks)
            anchor = response(patch_mean, theta, bias)
            xs = patches.outputs(batch.x).to(mean.dtype)
            linear = is_linear(patches.module)
            xc = xs - anchor.view(*([-1, 1] if linear else [1, -1, *[1] * (xs.dim() - 2)]))
            # what rounding left of the mean would be multiplied by a patch mean that may be large
            axes = [1] if linear else [0, *range(2, xc.dim())]
            rest = by_group(joined_mean(xc.mean(axes), patches.positions, batch.ranks), groups)
            covariance = joined_mean(patches.covariance_with(xc), patches.positions, batch.ranks)
            by_group(covariance, groups).baddbmm_(rest[:, :, None], patch_mean[:, None], alpha=-1)
            explained = torch.linalg.vecdot(covariance, theta)
        return Iteration(mean, var, anchor, explained, patch_mean, covariance)

    def tensors(self) -> list[Tensor]:
        """The tensors of the past, to account for their memory."""
        recorded = self._past if self._current is None else (*self._past, self._current[0])
        return [t for i in recorded for t in i if t is not None]

    def bytes(self, channels: int, fan_in: int, groups: int) -> int:
        """What a full ring takes in float32; fan_in 0 where no weight is followed."""
        numbers = 2 * channels + (2 * channels + groups * fan_in + channels * fan_in if fan_in else 0)
        return 4 * numbers * (self.window.size if self.window.size > 1 else 0)  # the current one is there between steps

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as copied tensors and numbers; for training checkpoints."""
        after = Ring(self.window)
        after.seen, after._past, after._current = self.seen, self._past, self._current
        after._commit()
        slots = {
            name: torch.stack([getattr(i, name) for i in after._past])
            for name in Iteration._fields
            if after._past and getattr(after._past[0], name) is not None
        }
        return {"kind": "ring", "seen": after.seen, "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.clear()
        self.seen = int(state["seen"])
        every = {name: stacked.clone().unbind() for name, stacked in state["slots"].items()}
        count = len(every["mean"]) if every else 0
        self._past = tuple(Iteration(**{name: tensors[n] for name, tensors in every.items()}) for n in range(count))
