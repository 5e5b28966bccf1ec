"""The same fine-tuning with several norms and batch sizes, each at its own best learning rate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ComparisonConfig as ComparisonConfig
    from .running import compare as compare

_MODULES = {"ComparisonConfig": "config", "compare": "running"}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
