"""What fold has made is saved and loaded into a new model of the same architecture, to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers.models import randomize_norms
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import cbn_convert as cbn
from cbn_convert.errors import FoldError

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """Two names for one conv and its norm, a linear layer with a norm, and a norm that cannot be folded."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.again = nn.ModuleList([self.conv, self.norm])
        self.head = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.first(x))).mean((2, 3)))


class Tied(Plain):
    """Two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(6, 4)
        self.tail.weight = self.head[2].weight


BUILD: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
    "torchvision lraspp": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
    "timm, norm with activation": lambda: timm.create_model("efficientnet_b0", num_classes=4),
    "timm, merged branches": lambda: timm.create_model("repvgg_a0", num_classes=4),
    "timm, fused blocks": lambda: timm.create_model("levit_128s", num_classes=4, img_size=64),
}  # fmt: skip


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model.eval()(X))


@pytest.mark.parametrize(("into", "keep_bn"), [("bn", False), ("affine", False), ("conv", False), ("conv", True)])
@pytest.mark.parametrize("name", BUILD)
def test_a_new_model_takes_the_weights(name: str, into: str, keep_bn: bool, tmp_path: Path) -> None:
    model = randomize_norms(BUILD[name]())
    cbn.convert(model, example_input=X)
    folded = cbn.fold(model, into, keep_bn=keep_bn, example_input=X)
    state = {k: v.clone().contiguous() for k, v in folded.state_dict().items()}
    save_file(state, tmp_path / "folded.safetensors")
    new = cbn.load_folded(BUILD[name](), load_file(tmp_path / "folded.safetensors"))
    assert list(new.state_dict()) == list(folded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(new), outputs(folded), strict=True))
    assert not new.training
    kinds = [[type(m) for m in net.modules() if isinstance(m, _BatchNorm)] for net in (new, folded)]
    assert kinds[0] == kinds[1]


def test_a_converted_model_and_tied_weights() -> None:
    model = randomize_norms(Tied())
    cbn.convert(model, example_input=X)
    folded = cbn.fold(model, example_input=X)
    state = folded.state_dict()
    del state["tail.weight"]  # as transformers leaves out all but one
    new = randomize_norms(Tied())
    cbn.convert(new, example_input=X)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    cbn.load_folded(new, torch.load(buffer))
    assert torch.equal(new(X), folded(X))
    assert type(new.conv) is nn.Conv2d
    assert new.tail.weight is new.head[2].weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv.weight"), "conv.weight is absent"),
        (lambda state: state.update(other=torch.zeros(1)), "other is none of its tensors"),
        (lambda state: state.pop("head.2.bias"), "head.2.bias is absent"),
    ],
)
def test_other_weights_are_refused(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = cbn.fold(randomize_norms(Plain()), example_input=X).state_dict()
    change(state)
    if "conv.weight" not in state:
        del state["again.0.weight"]  # its other name
    with pytest.raises(FoldError, match=rf"no weights of a folded Plain: {message}.*; build the model"):
        cbn.load_folded(Plain(), state)


def test_another_number_of_classes_is_refused() -> None:
    state = cbn.fold(randomize_norms(Plain()), example_input=X).state_dict()
    with pytest.raises(FoldError, match=r"head.2.weight has the shape \(4, 6\) in place of \(5, 6\), and 1 more"):
        cbn.load_folded(Plain(5), state)


def test_transformers(tmp_path: Path) -> None:
    """save_pretrained and from_pretrained alone with keep_bn, and with load_folded without norm layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = randomize_norms(transformers.ResNetForImageClassification(config))
    example = {"pixel_values": X}
    cbn.convert(model, example_input=example)
    kept = cbn.fold(model, keep_bn=True, example_input=example)
    kept.save_pretrained(tmp_path / "kept")
    back = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(back(X).logits, kept(X).logits)
    bare = cbn.fold(model, example_input=example)
    assert not any(isinstance(m, _BatchNorm) for m in bare.modules())
    bare.save_pretrained(tmp_path / "bare")
    new = transformers.AutoModelForImageClassification.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "bare")
    )
    cbn.load_folded(new, load_file(tmp_path / "bare/model.safetensors"))
    assert torch.equal(new(X).logits, bare(X).logits)
    assert (bare(X).logits - model.eval()(X).logits).abs().max() < 1e-4
