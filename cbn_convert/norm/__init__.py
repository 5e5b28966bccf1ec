"""The layer: its mathematics, its window, its modules. Imports nothing of the rest of the package."""

from .layer import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    CrossIterationBatchNormAct2d,
    CrossIterationMixin,
    check_window_options,
    history_state,
    load_history_state,
)

__all__ = [
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "CrossIterationBatchNorm3d",
    "CrossIterationBatchNormAct2d",
    "CrossIterationMixin",
    "check_window_options",
    "history_state",
    "load_history_state",
]
