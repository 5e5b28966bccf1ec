"""Fine-tuning on an image folder, with CBN or one of the usual alternatives for small batches.

Names load on first use: the command line reads the table of settings without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FinetuneConfig as FinetuneConfig
    from .config import FinetuneResult as FinetuneResult
    from .runs import finetune as finetune
    from .runs import resume as resume
    from .trained import evaluate as evaluate
    from .trained import load_run as load_run

_MODULES = {
    "FinetuneConfig": "config",
    "FinetuneResult": "config",
    "evaluate": "trained",
    "finetune": "runs",
    "load_run": "trained",
    "resume": "runs",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
