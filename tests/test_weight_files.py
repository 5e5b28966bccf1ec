"""Checkpoints of other tools: their weights are found, what was taken is said, and other files are called by name."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import randomize_norms
from safetensors.torch import save_file
from torch import Tensor

from cbn_convert.errors import CbnWarning, ModelError
from cbn_convert.models import ModelSpec, create_model

State = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    torch.manual_seed(5)
    return randomize_norms(timm.create_model("test_resnet", num_classes=7)).eval()


@pytest.fixture(scope="module")
def other() -> State:
    torch.manual_seed(6)
    return randomize_norms(timm.create_model("test_resnet", num_classes=7)).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def load(path: Path, classes: int | None = 7, **spec: Any) -> tuple[torch.nn.Module, str]:
    """The model, and what was said of the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = create_model(ModelSpec("test_resnet", checkpoint=str(path), **spec), classes).eval()
    said = [str(w.message) for w in caught if issubclass(w.category, CbnWarning)]
    assert len(said) < 2
    return model, "".join(said)


# how a tool writes it -> what is said of it
LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda s: s, ""),
    "timm": (
        lambda s: {"epoch": 3, "arch": "x", "state_dict": s, "args": argparse.Namespace(lr=1.0), "metric": 70.1},
        "taken from its entry 'state_dict'",
    ),
    "tutorial": (
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"m": torch.ones(3)}}}, "loss": 1.0},
        "taken from its entry 'model_state_dict'",
    ),
    "net": (lambda s: {"net": s, "acc": 90, "epoch": 1}, "taken from its entry 'net'"),
    "in entries of entries": (lambda s: {"ema": {"model": s, "decay": 0.9}}, "taken from its entry 'ema.model'"),
    "parallel": (lambda s: prefixed(s, "module."), "without the prefix 'module.'"),
    "compiled and parallel": (lambda s: prefixed(s, "module._orig_mod."), "without the prefix 'module._orig_mod.'"),
    "Lightning": (
        lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2", "hyper_parameters": {}},
        "taken from its entry 'state_dict', without the prefix 'model.'",
    ),
    "of a larger model": (
        lambda s: {"state_dict": {**prefixed(s, "module.encoder."), "module.decoder.0.weight": torch.ones(3)}},
        "without the prefix 'module.encoder.', and 1 other tensors are left out, such as module.decoder.0.weight",
    ),
    "averaged": (
        lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(3)},
        "without the prefix 'module.', and 1 other tensors are left out, such as n_averaged",
    ),
    "parts compiled": (
        lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
        "without what wrappers such as DistributedDataParallel put into names",
    ),
    "numpy": (
        lambda s: {"model": {k: v.numpy() for k, v in s.items()}, "best": s["fc.bias"].numpy().max()},
        "taken from its entry 'model'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_and_what_was_taken_is_said(layout: str, source, tmp_path: Path) -> None:
    make, expected = LAYOUTS[layout]
    torch.save(make(source.state_dict()), tmp_path / "w.pth")
    model, said = load(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert expected in said
    assert bool(said) == bool(expected)
    assert load(tmp_path / "w.pth", None)[0].num_classes == 7
    headless, _ = load(tmp_path / "w.pth", 3)
    assert torch.equal(headless.forward_features(IMAGES), source.forward_features(IMAGES))


def test_timm_chooses_the_same_of_several(source, other: State, tmp_path: Path) -> None:
    """The average of the weights, where both are there; and it is said."""
    torch.save({"state_dict": other, "state_dict_ema": prefixed(source.state_dict(), "module.")}, tmp_path / "w.pth")
    model, said = load(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    by_timm = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(tmp_path / "w.pth")).eval()
    assert torch.equal(by_timm(IMAGES), model(IMAGES))
    assert "taken from its entry 'state_dict_ema', without the prefix 'module.', not from 'state_dict', which" in said


def test_an_average_without_statistics_is_not_taken(source, other: State, tmp_path: Path) -> None:
    parameters = {k: v for k, v in other.items() if k in dict(source.named_parameters())}
    torch.save({"ema": parameters, "model": source.state_dict()}, tmp_path / "w.pth")
    model, said = load(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert said.endswith("are taken from its entry 'model'")


def test_the_part_with_the_same_shapes_is_taken(source, tmp_path: Path) -> None:
    wide = {k: torch.cat([v, v]) if v.dim() else v for k, v in source.state_dict().items()}
    torch.save({**prefixed(wide, "teacher."), **prefixed(source.state_dict(), "student.")}, tmp_path / "w.pth")
    model, said = load(tmp_path / "w.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert "without the prefix 'student.'" in said


def test_no_part_is_sought_in_the_weights_of_another_architecture(tmp_path: Path) -> None:
    """Whose blocks have a bn1 each, as the whole model has, too; one of them even of the same shape."""
    channels = timm.create_model("test_resnet").bn1.num_features
    state = timm.create_model("test_efficientnet").state_dict()
    state |= prefixed(torch.nn.BatchNorm2d(channels).state_dict(), "blocks.9.bn1.")
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"of this architecture \(taken from its entry 'state_dict'\): \d+ missing"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape", "of integers"])
def test_no_part_is_loaded_of_what_does_not_fit(change: str, source, tmp_path: Path) -> None:
    state = dict(source.state_dict())
    if change == "missing":
        del state["layer1.0.bn1.weight"]
    elif change == "unexpected":
        state["projector.weight"] = torch.ones(3)
    elif change == "of another shape":
        state["layer1.0.bn1.weight"] = torch.ones(3)
    else:
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=rf"\(taken from its entry 'state_dict', .* 'model\.'\): 1 {change}"):
        load(tmp_path / "w.pth", 3)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_a_stem_is_adapted_as_timm_does(channels: int, source, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model, said = load(tmp_path / "w.safetensors", model_kwargs={"in_chans": channels})
    plain = timm.create_model(
        "test_resnet", True, num_classes=7, in_chans=channels,
        pretrained_cfg_overlay={"file": str(tmp_path / "w.safetensors"), "num_classes": 7},
    ).eval()  # fmt: skip
    images = torch.randn(2, channels, 64, 64)
    assert torch.equal(model(images), plain(images))
    assert f"from 3 channels to {channels}" in said
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=f"--in-chans {channels}$"):  # only weights for RGB stand for others
        load(tmp_path / "own.safetensors", model_kwargs={"in_chans": channels + 1})


FORMS: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, path: save_file(state, path),
    "torch": lambda state, path: torch.save(state, path),
    "old torch": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "w.ckpt", "w.pth.tar", "w", "w.onnx.pt"])
def test_a_file_is_what_it_holds_whatever_its_name(form: str, name: str, source, tmp_path: Path) -> None:
    FORMS[form](source.state_dict(), tmp_path / name)
    assert torch.equal(load(tmp_path / name)[0](IMAGES), source(IMAGES))
    as_model = create_model(ModelSpec(str(tmp_path / name), arch="test_resnet"), 7).eval()
    assert torch.equal(as_model(IMAGES), source(IMAGES))


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"content")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OTHERS: dict[str, tuple[bytes, str]] = {
    "page": (b"\n<!DOCTYPE html>\n<html><head>", "it is a web page; download the file itself"),
    "old page": (b"<HTML><title>404</title>", "it is a web page"),
    "server error": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is an XML text"),
    "pointer": (POINTER, "it is a Git LFS pointer in the place of the file; fetch that with git lfs pull"),
    "empty": (b"", "it is empty"),
    "json": (b'{"error": "Entry not found"}', "it is a JSON text"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "it is the index of a checkpoint in several files"),
    "keras": (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "it is an HDF5 file"),
    "tflite": (b"\x1c\0\0\0TFL3" + b"0" * 99, "it is a TFLite model"),
    "zip": (archive("weights/readme.txt"), "it is a zip archive without a checkpoint of torch.save; unpack it"),
    "npz": (archive("a.npy", "b.npy"), "it is an archive of numpy arrays"),
    "cut off": (archive("archive/data.pkl", "archive/data/0")[:60], "it is cut off or damaged"),
    "answer": (b"404: Not Found", "it is a text, which begins with '404: Not Found'"),
    "settings": ("epochs: 1\nname: \u00fc\n".encode(), "it is a text, which begins with 'epochs: 1 name: \u00fc'"),
    "pickle of today": (pickle.dumps({"weight": [1.0]}, protocol=4), "it is a pickle of another kind"),
    "pickle": (pickle.dumps({"weight": [1.0]}, protocol=2), "it is a pickle that torch.save did not write"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    content, expected = OTHERS[kind]
    (tmp_path / name).write_bytes(content)
    for spec in (
        ModelSpec("test_resnet", checkpoint=str(tmp_path / name)),
        ModelSpec(str(tmp_path / name), "resnet18"),
    ):
        with pytest.raises(ModelError) as error:
            create_model(spec, 3)
        assert str(error.value).startswith(f"cannot load weights from {tmp_path / name}: {expected}")
        assert "\n" not in str(error.value)


def test_graphs_and_programs_are_called_what_they_are(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    linear = torch.nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(linear, torch.ones(1, 2)).save(tmp_path / "a.pt")
        torch.export.save(torch.export.export(linear, (torch.ones(1, 2),)), tmp_path / "b.pt2")
    with zipfile.ZipFile(tmp_path / "of torch 2.6.pt2", "w") as archive:
        for name in ("serialized_exported_program.json", "serialized_state_dict.pt", "version"):
            archive.writestr(name, b"")
    graph = onnx.helper.make_graph([], "g", [], [])
    (tmp_path / "c.pth").write_bytes(onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString())
    (tmp_path / "d.pth").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    for name, expected in (
        ("a.pt", "a TorchScript archive"), ("b.pt2", "a program of torch.export"), ("c.pth", "an ONNX model"),
        ("d.pth", "an ONNX model"), ("of torch 2.6.pt2", "a program of torch.export"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=f"it is {expected}"):
            load(tmp_path / name)


@pytest.mark.parametrize("content", [bytes(99), b"Rar!\x1a\x07\x00 and more", b"\x82\xa3abc"])
def test_junk_is_not_said_to_hold_more_than_tensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pth: the file is damaged or no checkpoint; give"):
        load(tmp_path / "w.pth")


def test_a_folder_is_not_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder; give the file in it that holds the weights"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"absent\.pth does not exist; give"):
        create_model(ModelSpec(str(tmp_path / "absent.pth"), "test_resnet"), 3)


def test_a_pointer_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "pretrained_cfg": {}}')
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"model\.safetensors: it is a Git LFS pointer"):
        create_model(ModelSpec(str(tmp_path)), 3)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["beside", "in options", "in an array"])
def test_nothing_is_unpickled_beside_the_weights(place: str, source, tmp_path: Path) -> None:
    evil: Any = Evil(tmp_path / "owned")
    if place == "in options":
        evil = argparse.Namespace(device=evil)
    elif place == "in an array":
        import numpy as np

        evil = np.array([evil], dtype=object)
    torch.save({"state_dict": source.state_dict(), "args": evil}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"it holds more than tensors \(.+\), and nothing is unpickled here"):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()
