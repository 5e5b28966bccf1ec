"""A run from a folder of settings goes on, and is exported, as the network that the folder describes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import randomize_norms
from helpers.runs import Killed, assert_equal, config, final_state, kill_after
from safetensors.torch import load_file

import cbn_convert as cbn
from cbn_convert.errors import ModelError, RunError
from cbn_convert.models import ModelSpec, create_model
from cbn_convert.training import load_run
from cbn_convert.training.description import build_described, describe
from cbn_convert.training.run_export import export_run
from cbn_convert.training.setup import build, prepare_folder

# same keys and shapes with and without
ARGS = {"pad_type": "same", "bn_eps": 0.3, "global_pool": "max"}


def save_source(folder: Path, architecture: str = "test_efficientnet", **args: Any) -> str:
    """A folder as timm writes it for the hub; its name for timm.create_model."""
    torch.manual_seed(1)
    model = randomize_norms(timm.create_model(architecture, num_classes=5, **args))
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.7, "interpolation": "nearest"}
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


def by_hand(weights: Path, **args: Any) -> torch.nn.Module:
    """The architecture with these arguments, as timm builds it without any settings, and the weights of a folder."""
    model = timm.create_model("test_efficientnet", num_classes=2, **args)
    model.load_state_dict(load_file(weights / "model.safetensors"))
    return model.eval()


def test_a_run_that_was_cut_goes_on_as_the_network_of_its_source(colors: Path, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", **ARGS)
    settings: dict[str, Any] = {"model": source, "pretrained": True, "drop_path": 0.3, "epochs": 1, "eval_every": 4}
    cbn.finetune(config(colors, tmp_path / "whole", **settings), quiet=True)
    run = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        kill_after(5, patch)
        with pytest.raises(Killed):
            cbn.finetune(config(colors, run, **settings), quiet=True)
    shutil.rmtree(tmp_path / "source")
    cbn.resume(run, quiet=True)
    assert_equal(final_state(run), final_state(tmp_path / "whole"))

    x = torch.randn(2, 3, 64, 64)
    export_run(run, tmp_path / "out")
    export_run(tmp_path / "out", tmp_path / "again", fold="conv")
    with torch.no_grad():
        expected = by_hand(run / "best", **ARGS)(x)
        assert torch.equal(load_run(run)[0](x), expected)
        for folder in (run / "best", tmp_path / "out", tmp_path / "again"):
            plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        for other in ({}, {**ARGS, "bn_eps": 1e-5}, {**ARGS, "pad_type": ""}, {**ARGS, "global_pool": "avg"}):
            assert not torch.allclose(by_hand(run / "best", **other)(x), expected, rtol=1e-2, atol=1e-3)
    assert json.loads((run / "best/config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.7


def test_channels_of_the_source(colors: Path, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", in_chans=1, **ARGS)
    settings = config(colors, tmp_path / "run", model=source, pretrained=True)
    first = build(settings)
    (tmp_path / "run").mkdir()
    prepare_folder(tmp_path / "run", settings, first, ranks=1)
    again = build(settings, resumed=True)
    torch.nn.init.normal_(first.model.get_classifier().weight)  # which starts at zero, as any network's would
    again.model.load_state_dict(first.model.state_dict())
    assert json.loads(json.dumps(again.data_config)) == json.loads(json.dumps(first.data_config))
    assert json.dumps(again.spec) == json.dumps(first.spec)

    cbn.export(again.model, tmp_path / "out")
    x = torch.randn(2, 1, 64, 64)
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected = by_hand(tmp_path / "out", in_chans=1, **ARGS)(x)
        assert torch.equal(plain(x), expected)
        assert torch.equal(again.model.eval()(x), expected)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_an_eps_that_depends_on_pretrained(norm: str, colors: Path, tmp_path: Path) -> None:
    """timm builds fbnetc_100 with eps 1e-5, and with pretrained=True with 1e-3, which no settings say."""
    source = save_source(tmp_path / "source", "fbnetc_100")
    model = create_model(ModelSpec(source), 2)
    again = build_described(json.loads(json.dumps(describe(model))), 2)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert model.bn1.eps == 1e-3
    assert torch.equal(again.eval()(x), model.eval()(x))
    if norm == "gn":
        settings = config(colors, tmp_path / "run", norm="gn", model=source, pretrained=True, max_steps=1)
        result = cbn.finetune(settings, quiet=True)
        assert {m.eps for m in load_run(tmp_path / "run")[0].modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-3}
        assert cbn.evaluate(tmp_path / "run", str(colors), device="cpu", workers=0).top1 == result.best_top1


def test_the_size_that_a_network_is_built_for(tmp_path: Path) -> None:
    """LeViT takes images of one size, which timm's create_model is told."""
    model = create_model(ModelSpec("levit_128s", pretrained=False, img_size=64), 3)
    again = build_described(json.loads(json.dumps(describe(model))), 3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval()(x), model.eval()(x))
    given = create_model(ModelSpec("levit_128s", pretrained=False, model_kwargs={"img_size": 64}), 3)
    assert timm.data.resolve_model_data_config(given)["input_size"] == (3, 64, 64)
    with pytest.raises(ModelError, match="levit_128s is built for images of 96 x 96 and not of 64"):
        create_model(ModelSpec("levit_128s", pretrained=False, img_size=64, model_kwargs={"img_size": 96}), 3)


def test_a_run_of_an_older_version_is_refused(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cbn.finetune(config(colors, run, norm="gn", max_steps=1), quiet=True)
    stored = json.loads((run / "config.json").read_text())
    spec = {"model_kwargs": {}, "mean": [0.5] * 3, "std": [0.5] * 3, "img_size": 32}
    stored["model"] = {"architecture": "test_resnet", "spec": spec}
    (run / "config.json").write_text(json.dumps(stored))
    for use in (lambda: cbn.resume(run, quiet=True), lambda: load_run(run)):
        with pytest.raises(RunError, match="was started by an older version, which did not store all"):
            use()


def test_an_argument_that_cannot_be_stored(colors: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model argument act_layer is <class .* give it as plain data"):
        cbn.finetune(config(colors, tmp_path / "run", model_kwargs={"act_layer": torch.nn.SiLU}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_network_than_was_described(tmp_path: Path) -> None:
    description = describe(timm.create_model("test_resnet"))
    description["norm_eps"].popitem()
    with pytest.raises(ModelError, match="builds test_resnet with other norm layers"):
        build_described(description, 2)
