"""CbnHook in mmengine's Runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import dataset, different, everything, network
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin

pytest.importorskip("mmengine", reason="mmengine is not installed; make test-integrations installs it")
from mmengine.model import BaseModel
from mmengine.runner import Runner

import cbn_convert.integrations.mmengine

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Backbone(nn.Module):
    """With mmdetection's norm_eval."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.norm_eval = True

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        out = self.backbone(inputs.float())
        return {"loss": F.cross_entropy(out.float(), labels)} if mode == "loss" else out


@pytest.fixture(autouse=True)
def _own_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine 0.10 does not read its own checkpoints with weights_only, torch's default."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


SAMPLER = {"type": "DefaultSampler", "shuffle": True}
COLLATE = {"type": "default_collate"}
RUNS = iter(range(1000))


def run(folder: Path, epochs: int, *, hooks: Any = None, model: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    runner = Runner(
        model or Model(), str(folder), experiment_name=str(next(RUNS)),
        train_dataloader={"dataset": dataset(), "batch_size": 2, "sampler": SAMPLER, "collate_fn": COLLATE},
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.02, "momentum": 0.9}},
        custom_hooks=[{"type": "CbnHook", "part": "backbone"}] if hooks is None else hooks,
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        randomness={"seed": 3}, **options,
    )  # fmt: skip
    return runner.train()


EMA = {"type": "EMAHook", "momentum": 0.2, "update_buffers": True}
CBN = {"type": "CbnHook", "part": "backbone"}


WAYS = {"alone": [CBN], "ema": [CBN, EMA]}  # its mixed precision needs CUDA


@pytest.mark.parametrize("hooks", WAYS.values(), ids=WAYS)
def test_resume_is_exact(tmp_path: Path, hooks: Any) -> None:
    whole = run(tmp_path, 3, hooks=hooks)
    assert sum(isinstance(m, CrossIterationMixin) for m in whole.modules()) == 3
    path = tmp_path / "epoch_1.pth"
    resumed = run(tmp_path, 3, hooks=hooks, load_from=str(path), resume=True)
    assert different(everything(whole), everything(resumed)) == []

    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["cbn_convert"]
    torch.save(checkpoint, path)
    with pytest.warns(cbn.errors.CbnWarning, match="saved without CbnHook, so the windows begin anew"):
        without = run(tmp_path, 3, hooks=hooks, load_from=str(path), resume=True)
    assert "weights.backbone.net.head.weight" in different(everything(whole), everything(without))


def test_norm_eval_is_off_where_it_converts(tmp_path: Path) -> None:
    model = run(tmp_path, 1)
    assert model.backbone.norm_eval is False
    assert all(m.training for m in model.modules() if isinstance(m, CrossIterationMixin))


def test_weights_of_another_run_begin_without_its_windows(tmp_path: Path) -> None:
    run(tmp_path, 1)
    path = str(tmp_path / "epoch_1.pth")
    fresh = run(tmp_path / "a", 1, load_from=path)
    torch.save({"state_dict": torch.load(path, weights_only=False)["state_dict"]}, path)
    assert different(everything(fresh), everything(run(tmp_path / "b", 1, load_from=path))) == []


def test_a_checkpoint_loads_without_the_hook_and_folds(tmp_path: Path) -> None:
    model = run(tmp_path, 1).eval()
    x = dataset()[:][0]
    expected = model.backbone(x)
    plain = Model().eval()
    plain.load_state_dict(torch.load(tmp_path / "epoch_1.pth", weights_only=False)["state_dict"])
    assert torch.equal(plain.backbone(x), expected)
    torch.testing.assert_close(cbn.fold(model.backbone)(x), expected, rtol=1e-5, atol=1e-5)


def test_frozen_norms_behind_the_optimizer_are_one_sentence(tmp_path: Path) -> None:
    model = Model()
    model.backbone.net.stem[1] = FrozenBatchNorm2d(8)
    with pytest.raises(cbn.CbnError, match="Model has frozen BatchNorm layers, whose weights become parameters"):
        run(tmp_path, 1, model=model)


def test_resume_with_another_window_is_one_sentence(tmp_path: Path) -> None:
    run(tmp_path, 1)
    hooks = [{"type": "CbnHook", "part": "backbone", "window": 4}]
    with pytest.raises(cbn.CbnError, match="was trained with Window"):
        run(tmp_path, 2, hooks=hooks, load_from=str(tmp_path / "epoch_1.pth"), resume=True)
