"""The window: what a layer remembers of past iterations, as a ring of k - 1 entries or as one exponential average."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .functional import Moments, Reader, by_group, is_known

HistoryKind = Literal["ring", "ema"]
HISTORIES: tuple[str, ...] = ("ring", "ema")
Start = Literal["running", "empty"]
LONG = 64  # how often moments of patches come within the window from which on only they carry the past along
STARTS: tuple[str, ...] = ("running", "empty")


class History:
    """Moments of past iterations; in no state_dict, and not in copies or pickles either.

    "ring" keeps the last window - 1 iterations. "ema" keeps one pooled iteration in which the newest counts 1/window;
    its memory does not grow with the window. Both start with what there is: the n-th iteration counts 1/n until the
    window is full, unless `start_from` fills it. With "ema", only every `every`-th iteration needs to bring what
    compensation needs, and counts for those that did not: the first, and those whose number plus `phase` is a multiple
    of `every`.

    A new iteration is staged and becomes part of the past when the next one asks for it. Until then a forward pass that
    is computed once more, as activation checkpointing does, finds the same past.
    """

    _REMEMBERED = ("_slots", "_staged", "_carried", "_finite", "_reader")

    def __init__(self, window: int, kind: HistoryKind, every: int = 1, phase: int = 0) -> None:
        self.window = window
        self.kind = kind
        self.every = every
        self.phase = phase
        self.capacity = min(1, window - 1) if kind == "ema" else window - 1
        self.clear()

    def clear(self) -> None:
        """Forgets all iterations."""
        self.seen = 0
        self.kept = 1.0  # the share that the last iteration with moments of patches would have kept by now
        self.patch_iterations = 0  # iterations that brought moments of patches
        self._slots: Moments | None = None  # [C, n, ...]
        self._staged: Moments | None = None
        self._carried: Moments | None = None
        self._finite: Tensor | None = None
        self._reader: weakref.ref[Reader] | None = None

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is trained, averaged or loaded into on its own: what is remembered here is not its past.
        return {**self.__dict__, "seen": 0, "kept": 1.0, "patch_iterations": 0, **dict.fromkeys(self._REMEMBERED)}

    @property
    def newest_weight(self) -> float:
        """The share of the current iteration in the window, 1/k once the window is full."""
        return 1.0 / (min(self.seen, self.window - 1) + 1)

    @property
    def due(self) -> bool:
        """Whether the current iteration should bring what compensation needs."""
        known = self._slots is not None and self._slots.patch_mean is not None
        return not known or (self.seen + self.phase) % self.every == 0

    @property
    def is_carried(self) -> bool:
        """Whether the past is to be taken to the weights of the current iteration, where its anchor will be.

        So it must be before moments of patches join it. Iterations that bring none should not be part of a past with
        an older anchor either; in a long window they are too few to matter.
        """
        return self.kind == "ema" and (self.due or self.window < LONG * self.every)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is recorded."""
        return self._slots is None and self._staged is None

    def start_from(self, mean: Tensor, var: Tensor) -> None:
        """Fills an empty window of kind "ema" with statistics [C] that came from elsewhere."""
        with torch.inference_mode(False):
            self._slots = Moments(mean[:, None].clone(), var[:, None].clone())
        self.seen = self.window

    def stage(self, new: Moments, finite: Tensor, carried: Moments | None = None) -> None:
        """Records the current iteration; where `finite` is false it counts as the one before once more.

        carried: the past of an "ema" as `carry_over` takes it to the weights of the current iteration.
        """
        if self.capacity:
            self._staged, self._finite, self._carried = new, finite, carried

    def past(self, like: Tensor, compensated: bool, recomputing: bool = False) -> Moments | None:
        """The recorded moments [C, n, ...] on the device of `like`, or None where there are none that fit.

        Moments of another dtype are dropped, and so are those of patches where nobody needs them any more. Moments
        without patches where the caller needs them are dropped from a ring; "ema" waits for the next that has them.
        `recomputing` asks for what the last call returned. The tensors change with the next call that does not, unless
        a `Reader` of theirs is waiting.
        """
        if not recomputing:
            self._commit()
        if self._slots is None:
            return None
        known = self._slots.patch_mean is not None
        of_use = known == compensated or (compensated and self.kind == "ema")
        if self._slots.mean.dtype != like.dtype or not of_use:
            self.clear()
            return None
        if self._slots.mean.device != like.device:
            with torch.inference_mode(False):
                self._slots = _map(lambda t: t.to(like.device), self._slots)
        full = len(self) == self.capacity
        return self._slots if full else _map(lambda t: t[:, : len(self)], self._slots)

    def read_by(self, reader: Reader) -> None:
        """The past as it is now must stay while this reader lives and waits."""
        self._reader = weakref.ref(reader)

    def _commit(self) -> None:
        new, finite, carried = self._staged, self._finite, self._carried
        self._staged = self._finite = self._carried = None
        if new is None or finite is None:
            return
        if self._slots is not None and not self._takes(new):
            self.clear()
        reader = None if self._reader is None else self._reader()
        if self._slots is None:
            if not finite:
                return
            # normal tensors even under inference_mode, since training goes on with them
            with torch.inference_mode(False):
                self._slots = _map(lambda t: t.new_zeros(t.shape[0], self.capacity, *t.shape[1:]), new)
            _zip(lambda stored, value: stored[:, 0].copy_(value), self._slots, new)
            self.patch_iterations = int(new.patch_mean is not None)
        else:
            if reader is not None and reader.waiting:
                with torch.inference_mode(False):
                    self._slots = _map(torch.clone, self._slots)
            last = (self.seen - 1) % self.capacity
            if self._slots.patch_mean is None and new.patch_mean is not None and finite:
                with torch.inference_mode(False):
                    self._slots = _map(lambda t: t[:, None].clone(memory_format=torch.contiguous_format), new)._replace(
                        mean=self._slots.mean, var=self._slots.var
                    )
            if carried is not None and carried.mean.shape == self._slots.mean.shape:
                for stored, value in zip(self._slots[:4], carried[:4], strict=True):
                    assert stored is not None
                    assert value is not None
                    stored.copy_(value)
            if new.patch_mean is None:
                previous = Moments(self._slots.mean[:, last], self._slots.var[:, last])
            else:
                previous = _zip(lambda t, _: t[:, last], self._slots, new)
            if not is_known(finite):  # decided on the device, without waiting for it
                new = _zip(lambda old, value: torch.where(finite, value, old), previous, new)
            elif not finite:
                new = previous
            if self.kind == "ema":
                share = self.newest_weight
                self.kept *= 1 - share
                _pool_statistics(previous, new, share)
                if new.patch_mean is not None:
                    _pool_patches(previous, new, self._share_of_patches)
                    self.kept = 1.0
                    self.patch_iterations += 1
            else:
                slot = self.seen % self.capacity
                _zip(lambda stored, value: stored[:, slot].copy_(value), self._slots, new)
        self.seen += 1

    @property
    def _share_of_patches(self) -> float:
        """The mean of the first ones; then as much as the iterations since the last ones count."""
        return max(1 / (self.patch_iterations + 1), 1 - self.kept)

    def _takes(self, new: Moments) -> bool:
        """Whether the new moments are of the same kind, dtype and size as those stored, and on the same device."""
        assert self._slots is not None
        old, mean = self._slots.mean, new.mean
        if (old.dtype, old.device, len(old)) != (mean.dtype, mean.device, len(mean)):
            return False
        if self.kind == "ema" and (self._slots.patch_mean is None or (new.patch_mean is None and self.every > 1)):
            return True
        return [t is None for t in self._slots] == [t is None for t in new]

    @property
    def compensated(self) -> bool:
        """Whether the past was recorded with what compensation needs."""
        return any(m is not None and m.patch_mean is not None for m in (self._slots, self._staged))

    def tensors(self) -> list[Tensor]:
        """The tensors of the past, as they are."""
        return [] if self._slots is None else [t for t in self._slots if t is not None]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, as copied tensors and numbers; for training checkpoints."""
        after = History(self.window, self.kind, self.every, self.phase)
        for name in ("seen", "kept", "patch_iterations", "_staged", "_carried", "_finite"):
            setattr(after, name, getattr(self, name))
        after._slots = None if self._slots is None else _map(torch.clone, self._slots)
        after._commit()
        tensors = {} if after._slots is None else {k: v for k, v in after._slots._asdict().items() if v is not None}
        numbers = {"window": self.window, "kind": self.kind, "seen": after.seen}
        return {**numbers, "kept": after.kept, "patch_iterations": after.patch_iterations, "slots": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, the window of an "ema" included. Raises ValueError as `check` does."""
        self.check(state)
        self.clear()
        self.window = int(state["window"])
        self.seen, self.kept = int(state["seen"]), float(state.get("kept", 1.0))
        self.patch_iterations = int(state.get("patch_iterations", self.seen))
        self._slots = Moments(**{k: v.clone() for k, v in state["slots"].items()}) if state["slots"] else None

    def check(self, state: dict[str, Any]) -> None:
        """Raises ValueError if what `state_dict` returned is of another kind, a ring of another window, or damaged."""
        own = self.window if self.kind == "ring" or 1 in (self.window, state["window"]) else state["window"]
        if (state["window"], state["kind"]) != (own, self.kind):
            raise ValueError(
                f"history was saved with window {state['window']} ({state['kind']}), "
                f"but the layer has window {self.window} ({self.kind}); use the same settings to resume"
            )
        for name, value in state["slots"].items():
            if not torch.isfinite(value).all():
                raise ValueError(f"history holds a {name} that is not finite; it is damaged")


def _map(fn: Callable[[Tensor], Tensor], moments: Moments) -> Moments:
    return Moments(*[None if t is None else fn(t) for t in moments])  # type: ignore[arg-type]


def _zip(fn: Callable[[Tensor, Tensor], Tensor], a: Moments, b: Moments) -> Moments:
    pairs = zip(a, b, strict=True)
    return Moments(*[None if t is None or u is None else fn(t, u) for t, u in pairs])  # type: ignore[arg-type]


def _pool_statistics(old: Moments, new: Moments, share: float) -> None:
    """Makes `old` the statistics of a mixture with the new population of weight `share` (parallel variance formula)."""
    step = new.mean - old.mean
    old.mean.lerp_(new.mean, share)
    old.var.lerp_(new.var, share).addcmul_(step, step, value=share * (1 - share))


def _pool_patches(old: Moments, new: Moments, share: float) -> None:
    """The same for the moments of patches, of which the outputs have mean `anchor` and variance `explained`."""
    between = share * (1 - share)
    assert old.anchor is not None
    assert new.anchor is not None
    assert old.explained is not None
    assert old.patch_mean is not None
    assert new.patch_mean is not None
    step, patch_step = new.anchor - old.anchor, new.patch_mean - old.patch_mean
    for stored, value in zip(old[2:], new[2:], strict=True):
        if stored is not None and value is not None:
            stored.lerp_(value, share)
    old.explained.addcmul_(step, step, value=between)
    if old.covariance is not None:
        # viewed as [G, C/G, F], a rank-one update per group
        rows = by_group(step, len(patch_step))[:, :, None]
        by_group(old.covariance, len(patch_step)).baddbmm_(rows, patch_step[:, None], alpha=between)
    if old.patch_covariance is not None:
        old.patch_covariance.addcmul_(patch_step[:, :, None], patch_step[:, None], value=between)
