"""The layer: its mathematics, its window, its modules. Of the rest of the package it imports `modes` and `refusals`."""

from .classes import (
    CONVERTED,
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    CrossIterationBatchNormAct2d,
    CrossIterationFrozenBatchNorm2d,
    CrossIterationSyncBatchNorm,
    CrossIterationSyncBatchNormAct,
    adopt,
    drop_and_act,
    frozen_eps,
    history_state,
    is_frozen,
    load_history_state,
)
from .layer import CrossIterationMixin
from .producers import OutputChannels
from .window import Window, WindowKeywords, window_of

__all__ = [
    "CONVERTED", "CrossIterationBatchNorm1d", "CrossIterationBatchNorm2d", "CrossIterationBatchNorm3d",
    "CrossIterationBatchNormAct2d", "CrossIterationFrozenBatchNorm2d", "CrossIterationMixin",
    "CrossIterationSyncBatchNorm", "CrossIterationSyncBatchNormAct", "OutputChannels", "Window", "WindowKeywords",
    "adopt", "drop_and_act", "frozen_eps", "history_state", "is_frozen", "load_history_state", "window_of",
]  # fmt: skip
