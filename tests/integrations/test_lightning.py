"""CbnCallback in Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import different, everything, images, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed; make test-integrations installs it")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging  # noqa: E402

from cbn_convert.integrations.lightning import CbnCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Lit(pl.LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.model: nn.Module | None = None if late else network()
        self.late = late

    def configure_model(self) -> None:
        if self.model is None:
            self.model = network()

    def training_step(self, batch: Any, _: int) -> Tensor:
        assert self.model is not None
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class WithForward(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(1, 3, 12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*images()), batch_size=2)


def fit(
    folder: Path, epochs: int, *more: Any, module: Any = None, ckpt: Any = None, callback: bool = True, **options: Any
) -> Any:
    module = module or Lit()
    own = [CbnCallback("model", example_input=torch.randn(1, 3, 12, 12))] if callback else []
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*own, *more], **{"devices": 1, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_exact(tmp_path: Path, precision: Any) -> None:
    whole = fit(tmp_path / "a", 3, precision=precision)
    fit(tmp_path / "b", 1, precision=precision)
    path = tmp_path / "b" / "1.ckpt"
    resumed = fit(tmp_path / "b", 3, ckpt=path, precision=precision)
    assert different(everything(whole), everything(resumed)) == []

    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["cbn_convert"]
    torch.save(checkpoint, path)
    with pytest.warns(cbn.errors.CbnWarning, match="1.ckpt was saved without CbnCallback, so the windows begin anew"):
        without = fit(tmp_path / "b", 3, ckpt=path, precision=precision)
    assert "weights.model.stem.0.weight" in different(everything(whole), everything(without))


@pytest.mark.parametrize("first", ["cbn", "ema"])
def test_resume_with_ema_is_exact_and_ends_with_the_averages(tmp_path: Path, first: str) -> None:
    def run(folder: str, epochs: int, **options: Any) -> tuple[Any, Any]:
        ema = EMAWeightAveraging(decay=0.5)
        at = ModelCheckpoint(dirpath=tmp_path / folder, filename="{epoch}", save_top_k=-1)
        own = CbnCallback("model", example_input=images()[0][:1])
        order = [own, ema] if first == "cbn" else [ema, own]
        return fit(tmp_path / folder, epochs, *order, at, callback=False, enable_checkpointing=True, **options), ema

    whole, ema = run("a", 3)
    averages = {k: v.clone() for k, v in ema._average_model.module.model.state_dict().items()}
    assert all(torch.equal(v, averages[k]) for k, v in whole.model.state_dict().items())
    run("b", 1)
    resumed, _ = run("b", 3, ckpt=tmp_path / "b" / "epoch=0.ckpt")
    assert different(everything(whole), everything(resumed)) == []


def test_stochastic_weight_averaging_measures_the_statistics_of_the_average(tmp_path: Path) -> None:
    def swa(folder: str, callback: bool) -> Any:
        averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        return fit(tmp_path / folder, 2, averaging, callback=callback)

    module = swa("cbn", True)
    assert any(isinstance(m, CrossIterationMixin) for m in module.modules())
    with torch.no_grad():
        x = module.model.stem[0](images()[0])
    layer = module.model.stem[1]
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("make", [lambda: Lit(late=True), Lit, WithForward], ids=["configure_model", "init", "forward"])
def test_converted_before_the_optimizer_is_made(tmp_path: Path, make: Any) -> None:
    module = make()
    callback = CbnCallback() if isinstance(module, WithForward) else CbnCallback("model", example_input=images()[0][:1])
    fit(tmp_path, 1, callback, module=module, callback=False)
    assert sum(isinstance(m, CrossIterationMixin) for m in module.modules()) == 3
    assert {type(m).__name__ for m in module.modules() if isinstance(m, CrossIterationMixin)} == {
        "CrossIterationBatchNorm2d"
    }


def test_a_part_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(cbn.CbnError, match="Lit has no module 'net' to convert; it has model"):
        fit(tmp_path, 1, CbnCallback("net"), callback=False)
    with pytest.raises(cbn.CbnError, match=r"Lit has no forward method to follow; say which part .* it has model"):
        fit(tmp_path, 1, CbnCallback(), callback=False)


def test_a_checkpoint_loads_without_the_package_and_folds(tmp_path: Path) -> None:
    module = fit(tmp_path, 1)
    x = images()[0]
    plain = Lit.load_from_checkpoint(tmp_path / "1.ckpt").eval()
    assert not any(isinstance(m, CrossIterationMixin) for m in plain.modules())
    expected = module.eval().model(x)
    assert torch.equal(plain.model(x), expected)
    folded = cbn.fold(module.model, example_input=x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


def test_resume_with_another_window_is_one_sentence(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    with pytest.raises(cbn.CbnError, match=r"layer 'model\.stem\.1' was trained with"):
        fit(tmp_path, 2, CbnCallback("model", window=4), callback=False, ckpt=tmp_path / "1.ckpt")


class Partly(Lit):
    """Says after two processes' training what became of the norms."""

    def on_train_end(self) -> None:
        kinds = [(type(m).__name__, m.window.sync) for m in self.model.modules() if isinstance(m, CrossIterationMixin)]
        kinds += [(type(m).__name__, None) for m in self.model.modules() if isinstance(m, nn.SyncBatchNorm)]
        torch.save(
            {"kinds": kinds, "end": everything(self)}, Path(self.trainer.default_root_dir) / f"{self.global_rank}.pt"
        )


def two_processes(folder: Path, epochs: int, ckpt: Any = None, sync: bool = True) -> list[Any]:
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "sync_batchnorm": sync}
    at = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    fit(folder, epochs, at, module=Partly(), ckpt=ckpt, enable_checkpointing=True, **options)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("sync", [True, False])
def test_two_processes(tmp_path: Path, sync: bool) -> None:
    whole = two_processes(tmp_path / "a", 2, sync=sync)
    assert whole[0]["kinds"] == [("CrossIterationBatchNorm2d", sync)] * 3
    two_processes(tmp_path / "b", 1, sync=sync)
    resumed = two_processes(tmp_path / "b", 2, ckpt=tmp_path / "b" / "epoch=0.ckpt", sync=sync)
    for a, b in zip(whole, resumed, strict=True):
        assert different(a["end"], b["end"]) == []
