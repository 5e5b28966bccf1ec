"""The window of a layer that has no statistics to carry: the batches so far, of which the newest is half.

It knows how its statistics respond to the weights as the carried window does, by the same state. But the batch joins in
the step, with its gradient: M, S = half of the past as the weights of today see it, and half of the batch. So what is
older than a few steps counts for nothing, as it must where all layers are random and move fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .carried import PATCH_LOOKS, SLOTS, Carried, state_bytes
from .distributed import JoinedMoments, joined_patches, joined_statistics
from .functional import is_known, pooled, whole_gradient
from .kernels import select
from .window import Window

NEWEST = 0.5  # the share of the batch


class NewLayerWindow:
    """The state of some channels of a new layer, at the weights of the last step.

    The current batch is recorded when the next one begins. Until then a forward pass that is computed once more, as
    activation checkpointing does, finds the same past. Nothing recorded is ever written to. Copies and pickles begin
    anew.

    Args:
        window: the layer's.
        weightless: whether no weight made x, so that the past says nothing of its gradient: that of the batch is whole.
    """

    slots, counts = SLOTS, ("seen", "uncertainty")  # of a state_dict

    def __init__(self, window: Window, weightless: bool = False) -> None:
        self.window = window
        self.weightless = weightless
        self.clear()

    def clear(self) -> None:
        """Forgets all batches."""
        self.seen = 0
        self._past: Carried | None = None
        self._uncertainty: float | Tensor = 0.0  # one over the number of values that the past is worth
        self._current: tuple[Carried, float | Tensor, Tensor | bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"window": self.window, "weightless": self.weightless}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def _recorded(self) -> list[Carried]:
        return [one for one in (self._past, self._current and self._current[0]) if one is not None]

    @property
    def compensated(self) -> bool:
        """Whether the past was recorded with what compensation needs."""
        return any(one.patch_mean is not None for one in self._recorded)

    def statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """M and S of the past and the batch, which is recorded unless it is only computed once more."""
        positions, mean, var = joined_statistics(batch.x, batch.ranks)
        past, at = self._known(batch, mean), None
        share = 1.0 if past is None else NEWEST
        uncertainty = share**2 / positions + (1 - share) ** 2 * self._uncertainty
        batch.measured(1 / uncertainty, mean.detach(), var.detach())
        M, S = mean, var
        if past is not None:
            with torch.no_grad():
                at = past.moved(batch.theta, batch.bias)
            seen = at.connected(batch.theta, batch.bias) if self.window.gradient == "full" else at
            M, S = pooled(seen.mean, seen.var, mean, var, share)
            batch.finite = batch.finite & torch.isfinite(M.detach() + S.detach()).all()  # of what is far from the past
        if not batch.recomputing:
            with torch.no_grad():
                table = torch.stack([M.detach(), S.detach()])
                new, finite = self._joined(batch, Carried(table) if at is None else at, table)
            self._current = new, uncertainty, finite
        whole = self.weightless and self.window.gradient == "full"
        return whole_gradient((M, S), mean, var) if whole else (M, S)

    @torch.no_grad()
    def _known(self, batch: Batch, mean: Tensor) -> Carried | None:
        """The past, on the device of the batch; none where it was of another kind, dtype or size."""
        if not batch.recomputing:
            self._commit()
        past = self._past
        if past is None:
            return None
        follows = past.patch_mean is not None
        if (past.table.dtype, follows) != (mean.dtype, batch.theta is not None) or not past.fits(
            len(mean), batch.theta
        ):
            self.clear()
        elif past.table.device != mean.device:
            self._past = Carried(*[None if t is None else t.to(mean.device) for t in past])  # type: ignore[arg-type]
        return self._past

    def _commit(self) -> None:
        """Makes the current batch a part of the past, unless it was not finite."""
        if self._current is None:
            return
        (new, uncertainty, finite), self._current = self._current, None
        if self._past is None or not isinstance(finite, Tensor) or is_known(finite):
            # waits for a device where there is no past; what only stands for a tensor cannot be looked at
            if type(finite) in (bool, Tensor) and not finite:
                return
        elif type(finite) is Tensor:
            new = new.where(finite, self._past)
        self._past, self._uncertainty = new, uncertainty
        self.seen += 1

    def _joined(self, batch: Batch, at: Carried, table: Tensor) -> tuple[Carried, Tensor | bool]:
        """The past at today's weights with the batch in it, and whether that is finite.

        Without a past, `at` has the batch's own. table: M and S of both, all there is where no weight is followed.
        """
        if batch.theta is None or batch.input is None:
            return Carried(table), batch.finite
        assert batch.mean is not None
        assert batch.var is not None
        theta, bias = batch.theta.detach(), None if batch.bias is None else batch.bias.detach()
        found = joined_patches(batch.patches(self.window.positions, self.seen), at, batch.ranks)
        if at.patch_mean is None:
            state = at.with_patches(found, 1.0, theta, bias)
            return state, batch.finite & torch.isfinite(state.table.sum())
        joined = JoinedMoments(batch.mean, batch.var, 0.0, found)
        return select(theta).join(at, theta, bias, joined, (NEWEST, 1 / min(self.seen + 1, PATCH_LOOKS)))

    def tensors(self) -> list[Tensor]:
        """The tensors of the state, to account for their memory."""
        return [t for one in self._recorded for t in one if t is not None]

    def bytes(self, channels: int, fan_in: int, groups: int) -> int:
        """What the state takes in float32, with the batch that joins in the next step; as in `CarriedWindow`."""
        return 2 * state_bytes(channels, fan_in, groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as copied tensors and numbers; for training checkpoints."""
        after = NewLayerWindow(self.window, self.weightless)
        after.seen, after._past, after._uncertainty, after._current = (
            self.seen, self._past, self._uncertainty, self._current
        )  # fmt: skip
        after._commit()
        slots = {} if after._past is None else after._past.slots()
        return {"kind": "new", "seen": after.seen, "uncertainty": float(after._uncertainty), "slots": slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.clear()
        self.seen, self._uncertainty = int(state["seen"]), float(state["uncertainty"])
        self._past = Carried.of_slots(state["slots"]) if state["slots"] else None
