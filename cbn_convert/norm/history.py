"""The window: what a layer remembers of past iterations, as a ring of k - 1 entries or as one exponential average."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .functional import Moments, by_group

HistoryKind = Literal["ring", "ema"]
HISTORIES: tuple[str, ...] = ("ring", "ema")


class History:
    """Moments of past iterations; never part of a state_dict.

    "ring" keeps the last window - 1 iterations. "ema" keeps one pooled iteration in which the newest counts 1/window;
    its memory does not grow with the window. Both start with what there is: the n-th iteration counts 1/n until the
    window is full.
    """

    def __init__(self, window: int, kind: HistoryKind) -> None:
        self.window = window
        self.kind = kind
        self.capacity = min(1, window - 1) if kind == "ema" else window - 1
        self.clear()

    def clear(self) -> None:
        """Forgets all iterations."""
        self.seen = 0
        self._slots: Moments | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    @property
    def newest_weight(self) -> float:
        """The share of the current iteration in the window, 1/k once the window is full."""
        return 1.0 / (min(self.seen, self.window - 1) + 1)

    def past(self, device: torch.device, dtype: torch.dtype, compensated: bool) -> Moments | None:
        """The stored moments [C, n, ...] on `device`, or None where there are none that fit.

        Moments of another dtype, or without what compensation needs, are of no use to the caller and are dropped.
        """
        if self._slots is None:
            return None
        if self._slots.mean.dtype != dtype or (self._slots.patch_mean is not None) != compensated:
            self.clear()
            return None
        if self._slots.mean.device != device:
            self._slots = _map(lambda t: t.to(device), self._slots)
        return _map(lambda t: t[:, : len(self)], self._slots)

    def push(self, new: Moments) -> None:
        """Records the current iteration. Tensors handed out by `past` must not be used afterwards."""
        if self.capacity == 0:
            return
        if self._slots is not None and not _alike(self._slots, new):
            self.clear()
        if self._slots is None:
            # normal tensors even under inference_mode, since training goes on with them
            with torch.inference_mode(False):
                self._slots = _map(lambda t: t.new_zeros(t.shape[0], self.capacity, *t.shape[1:]), new)
        last = (self.seen - 1) % self.capacity
        previous = _map(lambda t: t[:, last], self._slots)
        # A batch with NaN or inf counts as the one before once more; decided on the device, without waiting for it.
        finite = torch.isfinite(new.mean).all() & torch.isfinite(new.var).all()
        if self.kind == "ema" and self.seen:
            new = _pool(previous, new, self.newest_weight)
        slot = self.seen % self.capacity
        for stored, value, old in zip(self._slots, new, previous, strict=True):
            if stored is not None and value is not None and old is not None:
                stored[:, slot] = torch.where(finite, value, old)
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as tensors and numbers; for training checkpoints."""
        tensors = {} if self._slots is None else {k: v for k, v in self._slots._asdict().items() if v is not None}
        return {"window": self.window, "kind": self.kind, "seen": self.seen, "slots": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError if it was taken with another window or kind."""
        if (state["window"], state["kind"]) != (self.window, self.kind):
            raise ValueError(
                f"history was saved with window {state['window']} ({state['kind']}), "
                f"but the layer has window {self.window} ({self.kind}); use the same settings to resume"
            )
        self.seen = int(state["seen"])
        self._slots = Moments(**{k: v.clone() for k, v in state["slots"].items()}) if state["slots"] else None


def _alike(slots: Moments, new: Moments) -> bool:
    """Whether the new moments are of the same kind, dtype and size as those stored."""
    return all(
        (a is None) == (b is None) and (a is None or b is None or (a.dtype, a.shape[0]) == (b.dtype, b.shape[0]))
        for a, b in zip(slots, new, strict=True)
    )


def _map(fn: Any, moments: Moments) -> Moments:
    mapped: Any = [None if t is None else fn(t) for t in moments]
    return Moments(*mapped)


def _pool(old: Moments, new: Moments, share: float) -> Moments:
    """Moments of the mixture of two populations, the new one with weight `share` (parallel variance formula)."""

    def blend(a: Tensor | None, b: Tensor | None) -> Any:
        return None if a is None or b is None else torch.lerp(a, b, share)

    between = share * (1 - share)
    step = new.mean - old.mean
    var = blend(old.var, new.var) + between * step * step
    covariance, patch_covariance = (
        blend(old.covariance, new.covariance),
        blend(old.patch_covariance, new.patch_covariance),
    )
    if old.patch_mean is not None and new.patch_mean is not None:
        patch_step = new.patch_mean - old.patch_mean
        if covariance is not None:
            outer = by_group(step, patch_step.shape[0])[:, :, None] * patch_step[:, None]
            covariance += between * outer.flatten(0, 1)
        if patch_covariance is not None:
            patch_covariance += between * patch_step[:, :, None] * patch_step[:, None]
    return Moments(
        mean=blend(old.mean, new.mean),
        var=var,
        anchor=blend(old.anchor, new.anchor),
        patch_mean=blend(old.patch_mean, new.patch_mean),
        covariance=covariance,
        patch_covariance=patch_covariance,
    )
