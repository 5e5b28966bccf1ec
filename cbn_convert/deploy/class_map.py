"""The order of the classes for timm's reader of image folders, which would take them in another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLASS_MAP = "class_map.txt"


def known_classes(model: Any) -> list[str]:
    """Names of a timm model's classes, as its weights have brought them along; empty if those of all are not there."""
    labels = model.pretrained_cfg.get("label_names") or ()
    if isinstance(labels, dict):  # of an index, which is text in JSON, to a name
        labels = [labels.get(i, labels.get(str(i))) for i in range(model.num_classes)]
    return list(labels) if len(labels) == model.num_classes and None not in labels else []


def unwritable_class(names: Sequence[str]) -> str | None:
    """The first name that timm would not read back from a class map as it is; None if it reads all of them."""
    seen: set[str] = set()
    for name in names:
        # a line each, of which timm strips the blanks
        if name != name.strip() or not name or {"\n", "\r"} & set(name) or name in seen or not _is_utf8(name):
            return name
        seen.add(name)
    return None


def write_class_map(folder: Path, names: Sequence[str]) -> None:
    """Writes folder/class_map.txt, unless it cannot hold the names."""
    if names and unwritable_class(names) is None:
        (folder / CLASS_MAP).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a folder's name in another encoding
        return False
    return True
