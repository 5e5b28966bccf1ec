"""Weights from files and folders; every way it can go wrong is one sentence."""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cbn_convert.cli.main import app
from safetensors.torch import save_file
from timm.models import register_model
from typer.testing import CliRunner

from cbn_convert import export
from cbn_convert.classifier import reset_head
from cbn_convert.errors import CbnWarning, ModelError
from cbn_convert.models import ModelSpec, create_model


@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "-nested.pth"])
def test_checkpoint_is_loaded_except_another_head(source, suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"weights{suffix}", source.state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "nested" in suffix else state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CbnWarning)
        model = create_model(ModelSpec("test_resnet", checkpoint=str(path)), 3)
        same = create_model(ModelSpec("test_resnet", checkpoint=str(path)), 7)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, state[key])
    assert model.num_classes == 3
    assert torch.equal(same.fc.weight, source.fc.weight)
    if suffix == ".safetensors":
        model = create_model(ModelSpec(str(path), arch="test_resnet"), 3)
        assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])


def test_headless_weights_fit(source, tmp_path: Path) -> None:
    save_file({k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}, tmp_path / "w.safetensors")
    assert create_model(ModelSpec("test_resnet", checkpoint=str(tmp_path / "w.safetensors")), 3).num_classes == 3


def test_data_config_overrides() -> None:
    spec = ModelSpec("test_resnet", pretrained=False, mean=(0.1,) * 3, std=(0.2,) * 3, img_size=48)
    config = timm.data.resolve_model_data_config(create_model(spec, 3))
    assert (config["mean"], config["std"], config["input_size"]) == ((0.1,) * 3, (0.2,) * 3, (3, 48, 48))


def test_without_a_number_of_classes_the_file_decides(source, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_model(ModelSpec("test_resnet", checkpoint=str(tmp_path / "w.safetensors")))
    assert model.num_classes == 7
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_reset_head_keeps_norms_in_the_head() -> None:
    model = create_model(ModelSpec("repvit_m0_9", pretrained=False), 3)
    reset_head(model)
    model.train()
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    modules = list(model.get_classifier().modules())
    linears = [m for m in modules if isinstance(m, torch.nn.Linear)]
    norms = [m for m in modules if isinstance(m, torch.nn.BatchNorm1d)]
    assert linears
    assert norms
    assert all(torch.count_nonzero(m.weight) == 0 and torch.count_nonzero(m.weight.grad) > 0 for m in linears)
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in norms)


def test_reset_head_gives_equal_classes(source) -> None:
    model = create_model(ModelSpec("test_resnet", pretrained=False), 4)
    reset_head(model)
    assert torch.equal(model.eval()(torch.randn(2, 3, 64, 64)), torch.zeros(2, 4))


def test_reset_head_gives_equal_classes_where_a_second_one_is_added() -> None:
    model = create_model(ModelSpec("volo_d1_224", pretrained=False), 4)
    assert torch.count_nonzero(model.eval()(torch.randn(1, 3, 224, 224))) > 0
    reset_head(model)
    assert torch.equal(model(torch.randn(1, 3, 224, 224)), torch.zeros(1, 4))


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": Malicious(str(tmp_path / "pwned"))}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Malicious(str(tmp_path / "pwned"))))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(ModelError, match="cannot load weights from"):
            create_model(ModelSpec("test_resnet", checkpoint=str(tmp_path / name)), 3)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "resnet81"}, "did you mean resnet18"),
        ({"model": "qqqq"}, "timm knows no model 'qqqq'"),
        ({"model": "resnet18", "checkpoint": "absent.pth"}, "absent.pth does not exist"),
        ({"model": "resnet18", "checkpoint": "junk.pth"}, "cannot load weights from junk.pth"),
        ({"model": "resnet18", "checkpoint": "junk.safetensors"}, "cannot load weights from junk.safetensors"),
        ({"model": "resnet18", "checkpoint": "empty.pth"}, "cannot load weights from empty.pth"),
        ({"model": "junk.safetensors"}, "cannot load weights from junk.safetensors"),
        ({"model": "plain.safetensors"}, "pass the timm name with --arch"),
        ({"model": "absent.safetensors"}, "absent.safetensors does not exist"),
        ({"model": "plain.safetensors", "arch": "resnet18"}, "1 unexpected"),
        ({"model": "plain.safetensors", "checkpoint": "junk.pth"}, "not both"),
        ({"model": "local-dir:pickled"}, "no model.safetensors"),
        ({"model": "local-dir:absent"}, "absent does not exist; give a timm name"),
        ({"model": "absent/folder"}, "absent/folder does not exist; give a timm name"),
        ({"model": "resnet18", "pretrained": False, "model_kwargs": {"nonsense": 1}}, "check --model-kwargs"),
    ],
)
def test_errors(spec: dict, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("junk.pth", "junk.safetensors"):
        Path(name).write_bytes(b"no weights at all" * 50)
    Path("empty.pth").touch()
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text('{"architecture": "test_resnet"}')
    Path("pickled/pytorch_model.bin").write_bytes(b"pickle")
    save_file({"weight": torch.zeros(2)}, "plain.safetensors")
    with pytest.raises(ModelError) as error:
        create_model(ModelSpec(**spec), 3)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet18.a1_in1k"])
def test_unreachable_hub_names_the_alternatives(name: str, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(ModelError, match=r"--checkpoint FILE, or start from random weights with --no-pretrained"):
        create_model(ModelSpec(name), 3)
    assert constants.HF_HUB_OFFLINE is False


class _Network:
    """Stands for the network: counts who asks for it, and is unreachable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        from huggingface_hub import constants

        self.asked = 0
        monkeypatch.setattr(socket, "create_connection", self._refuse)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(proxy, raising=False)

    def _refuse(self, *args, **kwargs):
        self.asked += 1
        raise OSError("unreachable")


def test_the_hub_is_asked_for_nothing_that_is_here(source, tmp_path: Path, monkeypatch) -> None:
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    folder = export(source, tmp_path / "folder")
    network = _Network(monkeypatch, tmp_path / "cache")
    weights = str(tmp_path / "w.safetensors")
    for spec in (
        {"model": f"local-dir:{folder}"},
        {"model": str(folder)},
        {"model": weights, "arch": "test_resnet"},
        {"model": "test_resnet", "checkpoint": weights},
        {"model": "resnet18", "pretrained": False},
        {"model": "levit_128s", "pretrained": False, "img_size": 64},
    ):
        create_model(ModelSpec(**spec), 3)
    result = CliRunner().invoke(app, ["inspect", "resnet18", "--json"])
    assert result.exit_code == 0, result.output
    assert network.asked == 0


def test_a_backbone_that_timm_has_from_the_hub_whoever_loads(tmp_path: Path, monkeypatch) -> None:
    """Its export is written without a network; loading says what is missing, without a minute of trying."""
    network = _Network(monkeypatch, tmp_path / "cache")
    model = create_model(ModelSpec("vit_small_resnet26d_224", pretrained=False), 3)
    assert network.asked == 0
    folder = export(model, tmp_path / "folder")
    with pytest.raises(ModelError, match="give the architecture's name, and model"):
        create_model(ModelSpec(f"local-dir:{folder}"), 3)
    create_model(ModelSpec("vit_small_resnet26d_224", checkpoint=str(folder / "model.safetensors")), 3)
    assert network.asked == 2


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_weights_in_the_cache_need_no_network(name: str, source, tmp_path: Path, monkeypatch) -> None:
    """The cache as huggingface_hub leaves it after a download."""
    cached = tmp_path / "cache/models--timm--test_resnet.r160_in1k"
    model = timm.create_model("test_resnet")
    export(model, cached / "snapshots/0123456789")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123456789")
    network = _Network(monkeypatch, tmp_path / "cache")
    loaded = create_model(ModelSpec(name), 3)
    assert torch.equal(loaded.conv1[0].weight, model.conv1[0].weight)
    assert network.asked == 1


def test_a_registered_architecture_that_ignores_its_weights(tmp_path: Path) -> None:
    @register_model
    def forgetful_resnet(pretrained: bool = False, **kwargs: Any) -> Any:
        model = timm.create_model("test_resnet", num_classes=kwargs.get("num_classes", 10))
        model.register_buffer("positions", torch.arange(8.0).sin())  # which every model of the kind has alike
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "forgetful_resnet"}
        return model

    export(timm.create_model("forgetful_resnet"), tmp_path / "out")
    with pytest.raises(ModelError, match=r"model\.safetensors was not loaded: ResNet, .* ignores pretrained=True"):
        create_model(ModelSpec(f"local-dir:{tmp_path / 'out'}"))
    (tmp_path / "out/model.safetensors").write_bytes(b"xx")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        create_model(ModelSpec(f"local-dir:{tmp_path / 'out'}"))
