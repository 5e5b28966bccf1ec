"""CbnCallback in fastai's Learner."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import dataset, different, everything, images, network
from torch import nn
from torchvision.models import resnet18

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin

pytest.importorskip("fastai", reason="fastai is not installed; make test-integrations installs it")
from fastai.callback.schedule import Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import SGD
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner

from cbn_convert.integrations.fastai import CbnCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def learner(folder: Path, callbacks: Any = None, model: Any = None) -> Learner:
    dls = DataLoaders(*[DataLoader(dataset(), bs=2, shuffle=False, num_workers=0) for _ in range(2)], device="cpu")
    callbacks = [CbnCallback()] if callbacks is None else callbacks
    return Learner(
        dls, network() if model is None else model, loss_func=F.cross_entropy, opt_func=partial(SGD, mom=0.9),
        cbs=callbacks, path=folder,
    )  # fmt: skip


def fit(learn: Learner, epochs: int) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.02)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = learner(tmp_path)
    assert sum(isinstance(m, CrossIterationMixin) for m in whole.model.modules()) == 3
    fit(whole, 1)
    whole.save("one")
    fit(whole, 2)
    resumed = learner(tmp_path)
    resumed.load("one", with_opt=True)
    fit(resumed, 2)
    assert different(everything(whole.model), everything(resumed.model)) == []

    (tmp_path / "models" / "one.cbn").unlink()
    without = learner(tmp_path)
    without.load("one", with_opt=True)
    fit(without, 2)
    assert "weights.stem.0.weight" in different(everything(whole.model), everything(without.model))


def test_weights_that_were_replaced_do_not_get_the_old_windows(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    fit(learn, 1)
    learn.save("one")
    learner(tmp_path, callbacks=[]).save("one")
    learn.load("one", with_opt=False)
    assert not any(layer.compensated for layer in learn.model.modules() if isinstance(layer, CrossIterationMixin))


@pytest.mark.parametrize("begun", [False, True])
def test_lr_find_leaves_no_trace(tmp_path: Path, begun: bool) -> None:
    found, other = learner(tmp_path / "a"), learner(tmp_path / "b")
    for learn in (found, other):
        if begun:
            fit(learn, 1)
    before = everything(found.model)
    with found.no_bar(), found.no_logging():
        found.lr_find(num_it=15, show_plot=False)
    assert different(before, everything(found.model)) == []
    for learn in (found, other):
        fit(learn, 1)
    assert different(everything(found.model), everything(other.model)) == []
    assert not list((tmp_path / "a").rglob("*.cbn"))


def test_save_model_callback_goes_back_to_the_best_window(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.02, cbs=SaveModelCallback(fname="best", with_opt=True))
    other = learner(tmp_path)
    other.load("best", with_opt=True)
    assert different(everything(learn.model), everything(other.model)) == []
    assert all(layer.history_state()["iteration"] for layer in other.model.modules() if hasattr(layer, "window"))


def test_added_later_and_as_a_part(tmp_path: Path) -> None:
    learn = learner(tmp_path, callbacks=[])
    learn.add_cb(CbnCallback("stem"))
    fit(learn, 1)
    assert sum(isinstance(m, CrossIterationMixin) for m in learn.model.modules()) == 1


LOADED = """
import sys, torch
sys.modules["cbn_convert"] = None
from fastai.learner import load_learner
model = load_learner(sys.argv[1]).model.eval()
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_an_exported_learner_loads_without_the_package(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    fit(learn, 1)
    before = everything(learn.model)
    learn.export("out.pkl")
    assert different(before, everything(learn.model)) == []
    x = images()[0]
    expected = learn.model.eval()(x)
    torch.save(x, tmp_path / "x.pt")
    arguments = [str(tmp_path / name) for name in ("out.pkl", "x.pt", "y.pt")]
    path = str(Path(__file__).parent)
    script = f"import sys; sys.path[:0] = [{path!r}, {str(Path(path).parent)!r}]" + LOADED
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)
    fit(learn, 1)  # and goes on
    assert not torch.equal(learn.model.head.weight, before["weights.head.weight"])
    learn.save("later")
    assert (tmp_path / "models" / "later.cbn").is_file()


def test_learners_of_images_fine_tune(tmp_path: Path, colors: Path) -> None:
    dls = ImageDataLoaders.from_folder(colors, train="train", valid="val", bs=2, num_workers=0, device="cpu")
    learn = vision_learner(dls, resnet18, pretrained=False, path=tmp_path, cbs=CbnCallback())
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)
    norms = [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 22  # 20 of the body, 2 BatchNorm1d of fastai's head
    assert all(isinstance(m, CrossIterationMixin) for m in norms)
    assert all(layer.history_state()["iteration"] for layer in norms)


def test_load_with_another_window_is_one_sentence(tmp_path: Path) -> None:
    learn = learner(tmp_path)
    fit(learn, 1)
    learn.save("one")
    with pytest.raises(cbn.CbnError, match="was trained with Window"):
        learner(tmp_path, callbacks=[CbnCallback(window=4)]).load("one", with_opt=False)
