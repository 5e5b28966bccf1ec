"""Fine-tune any pretrained CNN with 1 to 8 images per step: Cross-Iteration Batch Normalization (arXiv 2002.05712).

Names load on first use, so that `cbn --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import ComparisonConfig as ComparisonConfig
    from .comparison import compare as compare
    from .conversion import ConversionReport as ConversionReport
    from .conversion import ReportRow as ReportRow
    from .conversion import convert as convert
    from .conversion import revert as revert
    from .conversion import warm_up as warm_up
    from .deploy import export as export
    from .deploy import fold as fold
    from .deploy import load_folded as load_folded
    from .errors import CbnError as CbnError
    from .norm import CrossIterationBatchNorm1d as CrossIterationBatchNorm1d
    from .norm import CrossIterationBatchNorm2d as CrossIterationBatchNorm2d
    from .norm import CrossIterationBatchNorm3d as CrossIterationBatchNorm3d
    from .norm import CrossIterationBatchNormAct2d as CrossIterationBatchNormAct2d
    from .norm import Window as Window
    from .norm import history_state as history_state
    from .norm import load_history_state as load_history_state
    from .training import FinetuneConfig as FinetuneConfig
    from .training import FinetuneResult as FinetuneResult
    from .training import evaluate as evaluate
    from .training import finetune as finetune
    from .training import resume as resume

__version__ = "0.1.0"

_SOURCES = {
    "comparison": ("ComparisonConfig", "compare"),
    "conversion": ("ConversionReport", "ReportRow", "convert", "revert", "warm_up"),
    "deploy": ("export", "fold", "load_folded"),
    "errors": ("CbnError",),
    "norm": (
        "CrossIterationBatchNorm1d",
        "CrossIterationBatchNorm2d",
        "CrossIterationBatchNorm3d",
        "CrossIterationBatchNormAct2d",
        "Window",
        "history_state",
        "load_history_state",
    ),
    "training": ("FinetuneConfig", "FinetuneResult", "evaluate", "finetune", "resume"),
}
_MODULES = {name: module for module, names in _SOURCES.items() for name in names}
__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
