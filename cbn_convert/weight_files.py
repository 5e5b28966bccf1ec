"""Files of weights as other tools write them: what is in a file, and which part of it is a model's.

Nothing is unpickled but tensors, numbers, text, containers of them, numpy arrays and argparse.Namespace.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .errors import ModelError, first_line

_HEAD = 1 << 16  # bytes that tell what a file is
_DEPTH = 4  # of entries in entries
_DAMAGED = "the file is damaged or no checkpoint"
_AVERAGED = {"ema", "teacher"}  # of several states that fit, timm takes that of the average, too
# what DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer in the place of the file; fetch that with git lfs pull",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "a numpy array",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ\x00": "an xz archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
}


@dataclass(frozen=True)
class Weights:
    """A state_dict found in a file, with names as the model has them, and where it was.

    entry: of the file's dictionary, as "a.b" for one in another; empty for the file as a whole. prefix: what all names
    began with. unwrapped: names also had parts in the middle that wrappers of a model add. outside: names in the same
    dictionary without the prefix. others: where else weights of as many of the model's tensors are.
    """

    state: dict[str, Tensor]
    entry: str = ""
    prefix: str = ""
    unwrapped: bool = False
    outside: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def report(self) -> str:
        """What was chosen and left out, as a part of a sentence; empty if the file holds just these weights."""
        parts = []
        if self.entry:
            parts.append(f"taken from its entry {self.entry!r}")
        if self.prefix:
            parts.append(f"without the prefix {self.prefix!r}")
        if self.unwrapped:
            parts.append("without what wrappers such as DistributedDataParallel put into names")
        if self.others:
            parts.append(f"not from {' or '.join(self.others)}, which would fit as well")
        if self.outside:
            parts.append(f"and {len(self.outside)} other tensors are left out, such as {self.outside[0]}")
        return ", ".join(parts)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of weights holds, whatever its name ends in: a dictionary of tensors or of other entries, on the CPU.

    Raises ModelError, which says what the file is, if it is none, is damaged or would need unpickling.
    """
    refuse_other_files(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            if _is_safetensors(_head(path), path):
                content: Any = safetensors.torch.load_file(path)
            else:
                with path.open("rb") as file:  # given a path, newer versions of torch go by its ending
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers raise a dozen types, all of them about this file
        raise ModelError(
            f"cannot load weights from {path}: {_reason(path, error)}; "
            "give a .safetensors file or a state_dict saved with torch.save"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"cannot load weights from {path}: it holds a {type(content).__name__}, no state_dict of tensors"
        )
    return content


def refuse_other_files(path: Path) -> None:
    """Raises ModelError if the file does not exist, or what it begins with shows that it is no file of weights."""
    if path.is_dir():
        raise ModelError(f"checkpoint {path} is a folder; give the file in it that holds the weights")
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist; check the path")
    try:
        what = _other_kind(_head(path), path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if what is not None:
        fact, _, remedy = what.partition("; ")
        raise ModelError(
            f"cannot load weights from {path}: it is {fact}; "
            f"{remedy or 'give a .safetensors file or a state_dict saved with torch.save'}"
        )


def find_weights(content: dict[str, Any], wanted: dict[str, Tensor]) -> Weights | None:
    """The part of a checkpoint that holds the most of the tensors `wanted`, a model's state_dict, by name and shape.

    It may be an entry of the content or of its entries, and its names may all begin with some prefix. Where several
    are as good, an average of weights ("ema", "teacher") comes before others, and then the first. Where no prefix has
    most of the names, none is taken off. None if there are no tensors at all.
    """
    found = []
    for entry, tensors in _dictionaries(content):
        for unwrapped, state in ((False, tensors), (True, _without_wrappers(tensors))):
            if not state or (unwrapped and state.keys() == tensors.keys()):
                continue
            for prefix, (shapes, names) in _prefixes(state, wanted).items():
                averaged = bool(_AVERAGED & set(re.split(r"[._]", f"{entry}.{prefix}".lower())))
                found.append(((shapes, names, averaged, not unwrapped), entry, prefix, unwrapped, state))
    if not found:
        return None
    fits = 2 * max(score[1] for score, *_ in found) > len(wanted)
    if not fits:  # another architecture, which no prefix mends
        found = [item for item in found if not item[2]]
    best, entry, prefix, unwrapped, state = max(found, key=lambda item: item[0])
    others = {
        f"{other!r}" for score, *place, again, _ in found
        if score[:2] == best[:2] and not again and (other := ".".join(filter(None, place))) and place != [entry, prefix]
    }  # fmt: skip
    return Weights(
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)},
        entry, prefix, unwrapped,
        outside=[name for name in state if not name.startswith(prefix)], others=sorted(others) if fits else [],
    )  # fmt: skip


def _dictionaries(
    content: dict[Any, Any], entry: str = "", depth: int = _DEPTH
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each dictionary in the content, with its place."""
    if not all(isinstance(key, str) for key in content):
        return  # an optimizer's
    tensors = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            tensors[key] = torch.from_numpy(value.copy())
        elif isinstance(value, Tensor):
            tensors[key] = value
    if tensors:
        yield entry, tensors
    for key, value in content.items():
        if isinstance(value, dict) and depth:
            yield from _dictionaries(value, f"{entry}.{key}".lstrip("."), depth - 1)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With plain names; empty if two tensors would have the same."""
    plain = {".".join(part for part in key.split(".") if part not in _WRAPPERS): t for key, t in state.items()}
    return plain if len(plain) == len(state) else {}


def _prefixes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """For each prefix how many names without it are wanted, with the same shape and in all."""
    shapes: Counter[str] = Counter()
    names: Counter[str] = Counter({"": 0})
    for key, tensor in state.items():
        for start in [0, *(match.end() for match in re.finditer(r"\.", key))]:
            own = wanted.get(key[start:])
            if own is not None:
                names[key[:start]] += 1
                shapes[key[:start]] += own.shape == tensor.shape
    return {prefix: (shapes[prefix], count) for prefix, count in names.items()}


def _harmless() -> list[Any]:
    """What torch may also make of a pickle: options, and numpy's arrays and numbers as numpy 1 and 2 name them."""
    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    functions = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (("_reconstruct", rebuild), ("scalar", scalar))
    ]
    types = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, np.ndarray, np.dtype, *functions, *types]


def _reason(path: Path, error: Exception) -> str:
    reason = first_line(error)
    if "weights_only" in str(error).lower():
        try:
            with torch.serialization.safe_globals(_harmless()), path.open("rb") as file:
                needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # it knows only the newer format
            needed = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if needed or zipfile.is_zipfile(path):
            return f"it holds more than tensors{f' ({needed[0]})' if needed else ''}, and nothing is unpickled here"
    if text := _text(_head(path)):
        return f"it is a text, which begins with {text!r}"
    if "weights_only" in str(error).lower() or isinstance(error, IndexError):
        return (
            "it is a pickle of another kind, and nothing is unpickled here" if _head(path)[:1] == b"\x80" else _DAMAGED
        )
    if "magic number" in reason:
        return "it is a pickle that torch.save did not write, and nothing is unpickled here"
    return reason[:200] if " " in reason else _DAMAGED


def _text(head: bytes) -> str:
    """The beginning of a file that is a text, on one line; empty for others."""
    try:
        text = head[:1024].decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8") if error.start > 1020 else ""  # cut within a letter
    shown = " ".join(text.split())
    return textwrap.shorten(shown, 40, placeholder=" ..") if shown.isprintable() else ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_safetensors(head: bytes, path: Path) -> bool:
    """By its beginning: the length of a JSON text, and this text. A name only decides for what is no format at all."""
    known = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    return known or (path.suffix == ".safetensors" and head[:1] != b"\x80" and head[:2] != b"PK")


def _other_kind(head: bytes, path: Path) -> str | None:
    """What a file is that is no checkpoint, and what to do after a semicolon; None if it may be one."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:4096].lower()
    if not head:
        return "empty; fetch it again"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page; download the file itself, by the link to its raw content"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML text, such as the error of a server; fetch the file again"
    if text[:1] in (b"{", b"["):
        several = b'"weight_map"' in head
        return "the index of a checkpoint in several files; join them" if several else "a JSON text"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    if head[4:8] == b"TFL3":
        return "a TFLite model"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    # protobuf: ir_version, then the name of the producer or the graph
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x3a")):
        return "an ONNX model, a graph; give the weights that it was made from"
    return _kind_of_zip(path) if head.startswith(b"PK\x03\x04") else None


def _kind_of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "cut off or damaged; fetch it again"
    files = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in files or any("/code/" in name for name in names):
        return "a TorchScript archive, a program; save torch.jit.load(FILE).state_dict() with torch.save and give that"
    # of torch 2.6, and of 2.14
    if "serialized_exported_program.json" in files or ("archive_format" in files and "data.pkl" not in files):
        return "a program of torch.export; save torch.export.load(FILE).state_dict with torch.save and give that"
    if all(name.endswith(".npy") for name in names):
        return "an archive of numpy arrays"
    return None if "data.pkl" in files else "a zip archive without a checkpoint of torch.save; unpack it"
