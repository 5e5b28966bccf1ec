"""Whether the history that was saved of a layer is one that it can go on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .carried import PATCHES, CarriedWindow
from .functional import patch_shapes
from .new_layer import NewLayerWindow
from .producers import fan_in, groups_of
from .ring import Ring

if TYPE_CHECKING:
    from .layer import CrossIterationMixin
    from .source import Source

# what a source remembers, by its name in checkpoints
_KINDS: dict[str, type[CarriedWindow | NewLayerWindow | Ring]] = {
    "ema": CarriedWindow, "new": NewLayerWindow, "ring": Ring
}  # fmt: skip


def check_history(norm: CrossIterationMixin, state: dict[str, Any]) -> None:
    """Raises ValueError unless `state` is what `history_state` of such a layer gives."""
    if state.get("window") != str(norm.window):
        raise ValueError(
            f"history was saved with window {state.get('window')}, but the layer has window {norm.window}; use the "
            "same settings to resume"
        )
    saved = state["sources"]
    if len(norm._sources) != len(saved):
        raise ValueError(f"history is of a layer fed by {len(saved)} modules, this one by {len(norm._sources)}")
    for source, own in zip(norm._sources, saved, strict=True):
        if own is not None:
            _check_complete(own, norm.window.is_carried)
            _check_slots(own, source, len(range(norm.num_features)[source.channels or slice(None)]))


def _check_complete(own: dict[str, Any], is_carried: bool) -> None:
    """Raises ValueError where something lacks in what a source of such a layer saves."""
    kind = _KINDS.get(own.get("kind", ""))
    if kind is None or (kind is Ring) == is_carried or not own.keys() >= {*kind.counts, "slots"}:
        raise ValueError("history is of another version of the windows, or damaged; train with that one")
    names = own["slots"].keys()
    if names and names not in ({"mean", "var"}, set(kind.slots)):
        lacking = ", ".join(sorted(set(kind.slots) - names)) or "nothing"
        raise ValueError(f"history holds a part of what it should, without {lacking}; it is damaged")


def _check_slots(own: dict[str, Any], source: Source, channels: int) -> None:
    """Raises ValueError for tensors that are of another layer, or not finite."""
    for name, value in own["slots"].items():
        if name not in PATCHES and name != "covariance" and value.shape[-1] != channels:
            raise ValueError(f"history is of a layer with {value.shape[-1]} channels, this one has {channels}")
        if name in PATCHES and own["kind"] != "ring" and source.tap is not None:
            shape = patch_shapes(groups_of(source.tap.module), fan_in(source.tap.module))[PATCHES.index(name)]
            if value.shape != shape:
                raise ValueError(
                    f"history is of a module whose {name} has shape {(*value.shape,)}, this one's has {shape}"
                )
        if not torch.isfinite(value).all():
            raise ValueError(f"history holds a {name} that is not finite; it is damaged")
