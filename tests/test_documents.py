"""What messages and documents say: nothing that a user does not have, and what their scripts write."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def texts(path: Path) -> Iterator[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("what", ["docs/", "examples/", "CHANGELOG", "cbn-convert["])
def test_no_message_points_at_what_an_installed_package_lacks(what: str) -> None:
    """Documents stay in the repository, and no index has the package, so that it has no extras there."""
    files = [*ROOT.glob("cbn_convert/**/*.py"), *ROOT.glob("cli/*.py")]
    assert len(files) > 50
    assert not [(path.name, text) for path in files for text in texts(path) if what in text]


@pytest.mark.parametrize(("script", "results"), [("reliability", "chaos.json"), ("coverage", "coverage.json")])
def test_a_document_is_what_its_script_writes(script: str, results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("report", script):  # other folders may have modules of these names
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(script)
    written = module.document(json.loads((ROOT / "benchmarks/results" / results).read_text(encoding="utf-8")))
    assert module.DOCUMENT.read_text(encoding="utf-8") == written
