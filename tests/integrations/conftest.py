"""What the frameworks write when first imported is written before the workers start."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """yapf, which mmengine imports, shows its pickled grammar to other processes before it is whole."""
    if not hasattr(config, "workerinput") and importlib.util.find_spec("yapf") is not None:
        importlib.import_module("yapf")
