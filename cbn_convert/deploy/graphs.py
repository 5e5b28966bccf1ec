"""A model as a graph that runs without timm: ONNX and torch.export, each checked by running what was written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from .. import __version__
from ..errors import ExportError
from .folding import fold, relative_difference

TOLERANCE = 1e-4  # relative, in float32; a fold into the conv weights rounds differently, nothing else does
_BATCHES = (2, 1, 3)  # the first is traced, the others show that the graph has no batch size of its own

_Outputs = list[Tensor]
_LEAVE_OUT = {"model.onnx": "leave out --onnx (onnx=True)", "model.pt2": "leave out --torch-export (torch_export=True)"}


def check_onnx_installed() -> None:
    """Raises ExportError if a package that ONNX export needs is absent."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise ExportError(f"ONNX export needs {', '.join(absent)}; pip install {' '.join(absent)}")


def write_graphs(model: nn.Module, folder: Path, config: dict[str, Any], *, onnx: bool, torch_export: bool) -> None:
    """Writes folder/model.onnx and folder/model.pt2 in float32, folded into the convs, for any number of images.

    Args:
        model: any model that `fold` takes; it does not change.
        folder: where the files go.
        config: the exported config.json; it gives the size of the images, and what the ONNX metadata says.
        onnx: whether model.onnx is written.
        torch_export: whether model.pt2 is written.

    Raises ExportError if the model cannot be traced or converted, or if a written file's outputs on random images are
    not the model's, and what `fold` raises.
    """
    size = config["pretrained_cfg"]["input_size"]
    plain = fold(model, "bn").to("cpu", torch.float32)
    bare = fold(plain, "conv", example_input=random_images(1, size))
    images = [random_images(count, size) for count in _BATCHES]
    # before tracing, which may leave fake tensors in what a model caches; inference tensors there could not be traced
    with torch.no_grad():
        expected = [_tensors(plain(batch)) for batch in images]
    program = _trace(bare, images[0], config["architecture"])
    if torch_export:
        _write_pt2(program, folder / "model.pt2")
        _check("model.pt2", _load_pt2(folder / "model.pt2"), images, expected)
    if onnx:
        _write_onnx(program, folder / "model.onnx", len(expected[0]), config)
        _check("model.onnx", _load_onnx(folder / "model.onnx"), images, expected)


def random_images(count: int, size: Sequence[int]) -> Tensor:
    """The same normal noise [count, *size] at every call."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _trace(model: nn.Module, images: Tensor, name: str) -> ExportedProgram:
    try:
        with _no_warnings():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    except Exception as error:  # the tracer raises a dozen types, all of them about this model
        raise ExportError(
            f"{name} cannot be traced for batches of any size ({_cause(error)}); {' and '.join(_LEAVE_OUT.values())}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # both formats would store the paths of this machine
    return program


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    content = BytesIO()  # given a path, torch ends the process when the disk is full
    with _no_warnings():
        torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _load_pt2(path: Path) -> Callable[[Tensor], _Outputs]:
    with _no_warnings():
        module = torch.export.load(path).module()
    return lambda images: _tensors(module(images))


def _write_onnx(program: ExportedProgram, path: Path, outputs: int, config: dict[str, Any]) -> None:
    names = ["logits"] if outputs == 1 else [f"logits_{i}" for i in range(outputs)]
    try:
        with _no_warnings():
            converted: Any = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=names, verbose=False
            )
    except Exception as error:  # as for the tracer
        raise ExportError(
            f"{config['architecture']} cannot be written as ONNX ({_cause(error)}); {_LEAVE_OUT[path.name]}"
        ) from error
    converted.model.metadata_props.update(_onnx_metadata(config))
    converted.save(path, external_data=False)


def _onnx_metadata(config: dict[str, Any]) -> dict[str, str]:
    """What a program needs beside the graph, lists as JSON."""
    data = config["pretrained_cfg"]
    lists = {key: list(data[key]) for key in ("input_size", "mean", "std")}
    if "label_names" in config:
        lists["classes"] = config["label_names"]
    return {
        "cbn_convert": __version__,
        "architecture": config["architecture"],
        "interpolation": data["interpolation"],
        "crop_mode": data["crop_mode"],
        "crop_pct": json.dumps(data["crop_pct"]),
        **{key: json.dumps(values, ensure_ascii=False) for key, values in lists.items()},
    }


def _load_onnx(path: Path) -> Callable[[Tensor], _Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def _check(
    file: str, run: Callable[[Tensor], _Outputs], images: Sequence[Tensor], expected: Sequence[_Outputs]
) -> None:
    for batch, wanted in zip(images, expected, strict=True):
        try:
            got = run(batch)
        except Exception as error:
            raise ExportError(
                f"{file} does not run on {len(batch)} images ({_cause(error)}); {_LEAVE_OUT[file]}"
            ) from error
        difference = max(relative_difference(g, w) for g, w in zip(got, wanted, strict=True))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the outputs of {file} on {len(batch)} images differ by {difference:.1e} from the model's; "
                f"{_LEAVE_OUT[file]}"
            )


def _tensors(outputs: Any) -> _Outputs:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _cause(error: BaseException) -> str:
    """First line of the error that is at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _no_warnings() -> Iterator[None]:
    """The tracers warn about their own internals; what matters is checked afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
