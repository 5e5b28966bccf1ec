"""accelerate: accelerator.register_for_checkpointing(CbnState(model)), with a model that is converted.

Convert before accelerator.prepare, register before or after it. save_state then writes the windows of all processes
beside the rest, and load_state restores them last, behind the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CbnError
from .plain import load_training_state, training_state
from .shared import converted_layers


class CbnState:
    """The windows of a model as an object with state_dict and load_state_dict, for any loop that wants one."""

    def __init__(self, model: nn.Module) -> None:
        if not converted_layers(model):
            raise CbnError(
                f"{type(model).__name__} has no converted layer to keep the window of; call cbn_convert.convert(model) "
                "before accelerator.prepare"
            )
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """`training_state` of all processes, which all have to call it, as Accelerator.save_state does."""
        return training_state(self.model, gather=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`load_training_state`."""
        load_training_state(self.model, state)
