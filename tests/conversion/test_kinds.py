"""Other kinds of BatchNorm: frozen, synchronised, and those that are refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import SyncBatchNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.errors import ConversionError
from cbn_convert.norm import CrossIterationFrozenBatchNorm2d, CrossIterationMixin

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class DetrFrozenBatchNorm2d(nn.Module):
    """As in DETR and other detectors after detectron: four buffers, and an eps that nothing tells."""

    eps_inside = 1e-5

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (v + self.eps_inside).rsqrt()
        return x * scale + (b - m * scale)


class WithoutEpsFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
    """As in maskrcnn-benchmark."""

    eps_inside = 0.0


class OddFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
    """Not what its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


FROZEN = {
    "torchvision": lambda: FrozenBatchNorm2d(4, eps=1e-3),
    "timm": lambda: freeze_batch_norm_2d(BatchNormAct2d(4, act_layer=nn.SiLU)),
    "detr": lambda: DetrFrozenBatchNorm2d(4),
    "maskrcnn-benchmark": lambda: WithoutEpsFrozenBatchNorm2d(4),
}


def frozen(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    norm = FROZEN[kind]()
    for name, buffer in norm.named_buffers():
        buffer.copy_(torch.rand(4) + (0.5 if name in ("weight", "running_var") else -0.5))
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_layers_follow_their_data_again_and_can_be_frozen_anew(kind: str) -> None:
    model = frozen(kind).eval()
    cls, before, expected = type(model[1]), copy.deepcopy(model.state_dict()), model(X)
    attributes = set(model[1].__dict__)
    (row,) = cbn.convert(model, example_input=X)
    assert (row.norm, row.channels, row.status, row.fed_by) == (cls.__name__, 4, "compensated", "0")
    assert isinstance(model[1], CrossIterationFrozenBatchNorm2d)
    assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)  # which knows nothing of num_batches_tracked
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    assert not any(torch.equal(after[f"1.{n}"], before[f"1.{n}"]) for n in ("weight", "running_mean", "running_var"))
    expected = model.eval()(X)
    cbn.revert(model)
    assert type(model[1]) is cls
    assert list(model.state_dict()) == list(before)
    assert not list(model[1].parameters())
    assert set(model[1].__dict__) == attributes
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_layers_normalise_as_batchnorm_does_at_window_1(kind: str) -> None:
    model = frozen(kind).train()
    norm = model[1]
    plain = nn.BatchNorm2d(4, eps=max(getattr(norm, "eps", getattr(norm, "eps_inside", None)), 1e-12))
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(plain, name).copy_(getattr(norm, name))
    act = getattr(norm, "act", nn.Identity())
    cbn.convert(model, window=1, example_input=X)
    y = model[0](X)
    torch.testing.assert_close(model[1](y), act(plain(y)))
    torch.testing.assert_close(model[1].running_var, plain.running_var)


@pytest.mark.parametrize("into", ["conv", "affine", "bn"])
@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_layers_fold(kind: str, into: str) -> None:
    for model in (frozen(kind).eval(), frozen(kind).eval()):
        expected = model(X)
        folded = cbn.fold(model, into, example_input=X)
        torch.testing.assert_close(folded(X), expected, rtol=1e-4, atol=1e-5)
        assert into == "bn" or not any("BatchNorm" in type(m).__name__ for m in folded.modules())
        cbn.convert(model, example_input=X)


def test_a_stage_that_is_frozen_as_a_whole_keeps_its_affine() -> None:
    model = frozen("torchvision").train()
    model[0].requires_grad_(False)
    cbn.convert(model, example_input=X)
    assert not any(p.requires_grad for p in model[1].parameters())


class HalfInsideFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
    eps_inside = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class FrozenBatchNorm1d(DetrFrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias.view(1, -1)


def test_what_only_looks_frozen_is_refused() -> None:
    half = nn.Sequential(nn.Conv2d(3, 4, 3), HalfInsideFrozenBatchNorm2d(4))
    assert cbn.convert(half, example_input=X).counts["compensated"] == 1
    assert half[1].eps == 1e-3
    with pytest.raises(ConversionError, match="'1' cannot be converted: FrozenBatchNorm1d does not take images"):
        cbn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm1d(4)), example_input=X)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), OddFrozenBatchNorm2d(4))
    with pytest.raises(ConversionError, match="'2' cannot be converted: OddFrozenBatchNorm2d does not compute"):
        cbn.convert(model, example_input=X)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("act", [False, True])
def test_synchronised_layers(act: bool) -> None:
    torch.manual_seed(0)
    norm = BatchNormAct2d(4, act_layer=nn.SiLU) if act else nn.BatchNorm2d(4)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    model = convert_sync_batchnorm(copy.deepcopy(plain))
    kind = SyncBatchNormAct if act else nn.SyncBatchNorm
    assert type(model[1]) is kind
    assert [row.status for row in cbn.convert(model, window=4, example_input=X)] == ["compensated"]
    cbn.convert(plain, window=4, example_input=X)
    assert isinstance(model[1], CrossIterationMixin)
    assert model[1].window.sync
    for _ in range(3):
        assert torch.equal(model.train()(X), plain.train()(X))
    assert torch.equal(model.eval()(X), plain.eval()(X))
    folded = cbn.fold(model, "conv", example_input=X)
    torch.testing.assert_close(folded(X), plain(X), rtol=1e-4, atol=1e-5)
    cbn.revert(model)
    assert type(model[1]) is kind


def test_unknown_kinds_are_refused_by_name() -> None:
    class InplaceAbn(nn.Module):  # no subclass of BatchNorm, as timm's
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), InplaceAbn())
    with pytest.raises(ConversionError, match="'2' is a InplaceAbn"):
        cbn.convert(model, example_input=X)
    assert [r.status for r in cbn.convert(model, exclude="2", example_input=X)] == ["compensated", "kept"]
    instance = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    assert len(cbn.convert(instance, example_input=X)) == 1


def test_frozen_act_of_timm_keeps_its_class_name() -> None:
    assert type(frozen("timm")[1]) is FrozenBatchNormAct2d
