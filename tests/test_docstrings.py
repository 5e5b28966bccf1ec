"""Docstrings: one for all that is public, which names arguments where there are many, and none that is not there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for path in ROOT.glob("cbn_convert/**/*.py"))  # cli/ has help texts instead
FEW = 3  # arguments that need no list
ENTRY = re.compile(r"    (\w+(?:, \w+)*): \S")
COMPILED = ("triton.jit", "torch.library.custom_op")

Classes = dict[str, list[ast.ClassDef]]
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(
    parent: ast.AST, owners: tuple[ast.ClassDef, ...] = ()
) -> Iterator[tuple[tuple[ast.ClassDef, ...], Documented]]:
    """Classes, functions and methods, but for those inside of a function, with the classes that they are in."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Documented):
            yield owners, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, (*owners, node))
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from definitions(node, owners)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[list[str], list[str]]:
    """Those with a name of their own, without self and cls; and `args` and `kwargs` of *args and **kwargs."""
    a = function.args
    named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
    return named, [p.arg for p in (a.vararg, a.kwarg) if p is not None]


def fields(node: ast.ClassDef, classes: Classes) -> set[str]:
    """What a class may be made of: the fields of a dataclass and arguments of __init__, those of its bases too."""
    found: set[str] = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found.update(*parameters(part))
    for base in node.bases:
        for known in classes.get(ast.unparse(base), []):
            found |= fields(known, classes)
    return found


def listed(doc: str) -> tuple[list[str] | None, list[str]]:
    """The names under `Args:`, or None where there is no list; and lines of it that are no entries."""
    _, there, rest = f"\n{doc}\n".partition("\nArgs:\n")
    section = re.match(r"(?:    .*\n)*", rest)
    if not there or section is None:
        return None, []
    entries = [line for line in section[0].splitlines() if not line.startswith(" " * 5)]
    names = [name for line in entries if (match := ENTRY.match(line)) for name in match[1].split(", ")]
    return names, [line.strip() for line in entries if not ENTRY.match(line)]


def needs_no_list(path: Path, owners: tuple[ast.ClassDef, ...], node: Documented, doc: str) -> bool:
    """Whether the arguments are explained elsewhere: by another docstring, by torch or Triton, or by a framework."""
    if doc.startswith("See ") or node.name in ("forward", "backward"):
        return True
    if any(ast.unparse(decorator).startswith(COMPILED) for decorator in node.decorator_list):
        return True
    return path.parent.name == "integrations" and bool(owners and owners[-1].bases)  # hooks of the framework


def faults(path: Path, tree: ast.Module, classes: Classes) -> Iterator[str]:
    """What is wrong with the docstrings of a module."""
    if not ast.get_docstring(tree):
        yield f"{path}: the module has no docstring"
    for owners, node in definitions(tree):
        where = f"{path}: {'.'.join(part.name for part in (*owners, node))}"
        doc = ast.get_docstring(node) or ""
        public = not any(part.name.startswith("_") for part in (*owners, node))
        if public and not doc:
            yield f"{where} has no docstring"
            continue
        names, odd = listed(doc)
        yield from (f"{where}: {line!r} is no `name: text`" for line in odd)
        if isinstance(node, ast.ClassDef):
            own, needed = fields(node, classes), set[str]()
        else:
            named, others = parameters(node)
            own, needed = {*named, *others}, set(named) if len(named) > FEW else set()
            if names is None and (not public or needs_no_list(path, owners, node, doc)):
                continue
        if names is None and needed:
            yield f"{where} has {len(needed)} arguments and no `Args:`"
        elif names is not None:
            yield from (f"{where} has no {name}, which its docstring names" for name in names if name not in own)
            yield from (f"{where} has {name}, which its `Args:` leaves out" for name in sorted(needed - {*names}))


def classes_of(*trees: ast.Module) -> Classes:
    found: Classes = {}
    for tree in trees:
        for _, node in definitions(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def test_all_that_is_public_says_what_it_is_and_what_it_takes() -> None:
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    assert len(trees) > 50
    classes = classes_of(*trees.values())
    assert not [fault for path, tree in trees.items() for fault in faults(path, tree, classes)]


FOUR = "def f(a, b, *, c, d):\n"
LIST = "    '''What it is.\n\n    Args:\n"  # of f or of a class


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(a):\n    pass", "f has no docstring"),
        ("class A:\n    '''A.'''\n    def f(self):\n        pass", "A.f has no docstring"),
        (f"{FOUR}    '''F.'''", "f has 4 arguments and no `Args:`"),
        (f"{FOUR}{LIST}        a, b: x.\n        c: y.\n    '''", "f has d, which"),
        (f"{FOUR}{LIST}        a, b: x.\n        c, d, e: y.\n    '''", "f has no e, which"),
        (f"{FOUR}{LIST}        a, b, c, d: x.\n        other words.\n    '''", "'other words.'"),
        (f"class A:\n{LIST}        b: x.\n    '''\n    a: int", "A has no b, which"),
    ],
)
def test_a_fault_is_found(source: str, words: str) -> None:
    tree = ast.parse(f"'''M.'''\n{source}\n")
    (fault,) = faults(Path("cbn_convert/module.py"), tree, classes_of(tree))
    assert fault.startswith("cbn_convert/module.py: ")
    assert words in fault


@pytest.mark.parametrize(
    "source",
    [
        "def _f(a, b, c, d):\n    pass",
        "class _A:\n    def f(self, a, b, c, d):\n        pass",
        "class A:\n    '''A.'''\n    def f(self, a, b, c):\n        '''F.'''",
        "class A:\n    '''A.'''\n    def forward(self, a, b, c, d):\n        '''F.'''",
        f"{FOUR}    '''See `g`.'''",
        f"@triton.jit\n{FOUR}    '''F.'''",
        f"{FOUR}{LIST}        a: x: y,\n            and so on.\n        b, c, d: z.\n\n    More.\n    '''",
        f"class A:\n    '''A.'''\n    a: int\nclass B(A):\n{LIST}        a, b: x.\n    '''\n    b: int",
    ],
)
def test_what_needs_no_list_or_has_one_is_left_alone(source: str) -> None:
    tree = ast.parse(f"'''M.'''\n{source}\n")
    assert not list(faults(Path("cbn_convert/module.py"), tree, classes_of(tree)))


def test_hooks_of_a_framework_are_documented_there() -> None:
    tree = ast.parse("'''M.'''\nclass A(Callback):\n    '''A.'''\n    def f(self, a, b, c, d):\n        '''F.'''\n")
    assert not list(faults(Path("cbn_convert/integrations/x.py"), tree, {}))
    assert len(list(faults(Path("cbn_convert/norm/x.py"), tree, {}))) == 1
