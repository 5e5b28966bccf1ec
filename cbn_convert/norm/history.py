"""The window: what a layer remembers of past iterations, as a ring of k - 1 entries or as one exponential average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .functional import Moments, by_group

HistoryKind = Literal["ring", "ema"]
HISTORIES: tuple[str, ...] = ("ring", "ema")


class History:
    """Moments of past iterations; in no state_dict, and not in copies or pickles either.

    "ring" keeps the last window - 1 iterations. "ema" keeps one pooled iteration in which the newest counts 1/window;
    its memory does not grow with the window. Both start with what there is: the n-th iteration counts 1/n until the
    window is full.

    A new iteration is staged and becomes part of the past when the next one asks for it. Until then a forward pass that
    is computed once more, as activation checkpointing does, finds the same past.
    """

    def __init__(self, window: int, kind: HistoryKind) -> None:
        self.window = window
        self.kind = kind
        self.capacity = min(1, window - 1) if kind == "ema" else window - 1
        self.clear()

    def clear(self) -> None:
        """Forgets all iterations."""
        self.seen = 0
        self._slots: Moments | None = None  # [C, n, ...]
        self._staged: Moments | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is trained, averaged or loaded into on its own: what is remembered here is not its past.
        return {**self.__dict__, "seen": 0, "_slots": None, "_staged": None}

    @property
    def newest_weight(self) -> float:
        """The share of the current iteration in the window, 1/k once the window is full."""
        return 1.0 / (min(self.seen, self.window - 1) + 1)

    def stage(self, new: Moments) -> None:
        """Records the current iteration."""
        if self.capacity:
            self._staged = new

    def past(self, like: Tensor, compensated: bool, recomputing: bool = False) -> Moments | None:
        """The recorded moments [C, n, ...] on the device of `like`, or None where there are none that fit.

        Moments of another dtype, or without what compensation needs, are of no use to the caller and are dropped.
        `recomputing` asks for what the last call returned. The tensors change with the next call that does not.
        """
        if not recomputing:
            self._commit()
        if self._slots is None:
            return None
        if self._slots.mean.dtype != like.dtype or (self._slots.patch_mean is not None) != compensated:
            self.clear()
            return None
        if self._slots.mean.device != like.device:
            self._slots = _map(lambda t: t.to(like.device), self._slots)
        return _map(lambda t: t[:, : len(self)], self._slots)

    def _commit(self) -> None:
        new, self._staged = self._staged, None
        if new is None:
            return
        if self._slots is not None and not _alike(self._slots, new):
            self.clear()
        # A batch with NaN or inf counts as the one before once more; decided on the device, without waiting for it.
        finite = torch.isfinite(torch.stack([t.sum() for t in new if t is not None])).all()
        if self._slots is None:
            if not finite:
                return
            # normal tensors even under inference_mode, since training goes on with them
            with torch.inference_mode(False):
                self._slots = _map(lambda t: t.new_zeros(t.shape[0], self.capacity, *t.shape[1:]), new)
            _zip(lambda stored, value: stored[:, 0].copy_(value), self._slots, new)
        else:
            last = (self.seen - 1) % self.capacity
            previous = _map(lambda t: t[:, last], self._slots)
            new = _zip(lambda old, value: torch.where(finite, value, old), previous, new)
            if self.kind == "ema":
                _pool(previous, new, self.newest_weight)
            else:
                slot = self.seen % self.capacity
                _zip(lambda stored, value: stored[:, slot].copy_(value), self._slots, new)
        self.seen += 1

    @property
    def compensated(self) -> bool:
        """Whether the last iteration was recorded with what compensation needs."""
        last = self._slots if self._staged is None else self._staged
        return last is not None and last.patch_mean is not None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as copied tensors and numbers; for training checkpoints."""
        after = History(self.window, self.kind)
        after.seen, after._staged = self.seen, self._staged
        after._slots = None if self._slots is None else _map(torch.clone, self._slots)
        after._commit()
        tensors = {} if after._slots is None else {k: v for k, v in after._slots._asdict().items() if v is not None}
        return {"window": self.window, "kind": self.kind, "seen": after.seen, "slots": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError if it was taken with another window or kind."""
        if (state["window"], state["kind"]) != (self.window, self.kind):
            raise ValueError(
                f"history was saved with window {state['window']} ({state['kind']}), "
                f"but the layer has window {self.window} ({self.kind}); use the same settings to resume"
            )
        self.clear()
        self.seen = int(state["seen"])
        self._slots = Moments(**{k: v.clone() for k, v in state["slots"].items()}) if state["slots"] else None


def _alike(slots: Moments, new: Moments) -> bool:
    """Whether the new moments are of the same kind, dtype and size as those stored, and on the same device."""
    return all(
        (a is None) == (b is None)
        and (a is None or b is None or (a.dtype, a.device, a.shape[0]) == (b.dtype, b.device, b.shape[0]))
        for a, b in zip(slots, new, strict=True)
    )


def _map(fn: Callable[[Tensor], Tensor], moments: Moments) -> Moments:
    return Moments(*[None if t is None else fn(t) for t in moments])  # type: ignore[arg-type]


def _zip(fn: Callable[[Tensor, Tensor], Tensor], a: Moments, b: Moments) -> Moments:
    pairs = zip(a, b, strict=True)
    return Moments(*[None if t is None or u is None else fn(t, u) for t, u in pairs])  # type: ignore[arg-type]


def _pool(old: Moments, new: Moments, share: float) -> None:
    """Makes `old` the moments of a mixture with the new population of weight `share` (parallel variance formula)."""
    between = share * (1 - share)
    step = new.mean - old.mean
    patch_step = None
    if new.patch_mean is not None and old.patch_mean is not None:
        patch_step = new.patch_mean - old.patch_mean
    _zip(lambda stored, value: stored.lerp_(value, share), old, new)
    old.var.addcmul_(step, step, value=between)
    if patch_step is None:
        return
    if old.covariance is not None:
        # viewed as [G, C/G, F], a rank-one update per group
        rows = by_group(step, patch_step.shape[0])[:, :, None]
        by_group(old.covariance, patch_step.shape[0]).addcmul_(rows, patch_step[:, None], value=between)
    if old.patch_covariance is not None:
        old.patch_covariance.addcmul_(patch_step[:, :, None], patch_step[:, None], value=between)
