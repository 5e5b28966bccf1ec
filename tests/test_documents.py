"""What messages and documents say: nothing that a user does not have, and what their scripts write."""

from __future__ import annotations

import ast
import importlib
import json
import re
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
def test_a_document_is_what_its_script_writes(script: str, results: str) -> None:
    module = importlib.import_module(f"benchmarks.documents.{script}")
    document = module.DOCUMENT.read_text(encoding="utf-8")
    tables = module.tables(json.loads((ROOT / "benchmarks/results" / results).read_text(encoding="utf-8")))
    assert len(tables) > 5
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in document


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a module, by their qualified names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds)]
    inner = {f"{c.name}.{m.name}" for c in top for m in getattr(c, "body", []) if isinstance(m, kinds)}
    return {node.name for node in top} | inner


def test_the_method_points_at_code_and_tests_that_exist() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    algorithm = re.findall(r" (\w+\.py): ([\w.]+)$", text, re.MULTILINE)
    assert len(algorithm) >= 12
    assert not [pair for pair in algorithm if pair[1] not in defined(ROOT / "cbn_convert/norm" / pair[0])]
    tests = {name for path in ROOT.glob("tests/**/*.py") for name in defined(path)}
    assert not set(re.findall(r"`(test_\w+)`", text)) - tests


@pytest.mark.parametrize("document", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Files of the repository, and headings in them, as GitHub names these."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http", "mailto:")):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target
