"""What a model is run on: examples that convert makes for itself, and what it says where none will do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.errors import ConversionError, FoldError


def block(rank: int, channels: int, **kwargs) -> nn.Sequential:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    return nn.Sequential(conv(channels, 4, 3, padding=1, **kwargs), norm(4))


class Encoder(nn.Module):
    """A first conv behind something else, as MONAI's networks have it, and a decoder that was registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.ConvTranspose3d(4, 2, 2, stride=2), block(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(nn.functional.max_pool3d(self.encoder(x), 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one-channel": lambda: block(2, 1),
    "many-channels": lambda: block(2, 13),
    "sequence": lambda: block(1, 7),
    "audio": lambda: nn.Sequential(nn.Conv1d(1, 4, 80, stride=4), nn.BatchNorm1d(4), nn.MaxPool1d(400)),
    "volume": lambda: block(3, 1),
    "volume-of-a-size": lambda: nn.Sequential(block(3, 2), nn.Flatten(), nn.Linear(4 * 64**3, 2)),
    "decoder-first": Encoder,
    "small-images": lambda: nn.Sequential(block(2, 1), nn.Flatten(), nn.Linear(4 * 28 * 28, 8), nn.BatchNorm1d(8)),
    "vectors": lambda: nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
    "tokens": lambda: nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(8)),
    "generator": lambda: nn.Sequential(nn.ConvTranspose2d(100, 8, 4), nn.BatchNorm2d(8)),
    "vectors-to-images": lambda: nn.Sequential(
        nn.Linear(10, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4)
    ),
    "patches-of-images": lambda: nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.BatchNorm2d(4)
    ),
    "double": lambda: block(3, 1).double(),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_layers_show_what_a_model_takes(kind: str) -> None:
    model = MODELS[kind]()
    report = cbn.convert(model)
    assert all(row.status == "compensated" or kind == "tokens" for row in report)
    assert all(row.status != "kept" for row in report)
    assert cbn.fold(model, "conv") is not model


def test_pretrained_configurations_come_first() -> None:
    seen: list[tuple[int, ...]] = []
    model = timm.create_model("test_efficientnet")
    model.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    cbn.convert(model)
    assert set(seen) == {(1, 3, 64, 64)}


class Never(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        return self.part(x) + guide


@pytest.mark.parametrize(
    ("part", "what", "shown"),
    [
        (block(3, 1), "volumes", (1, 1, 160, 160, 160)),
        (block(1, 5), "sequences", (1, 5, 32000)),
        (block(2, 6), "images", (1, 6, 512, 512)),
        (nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4)), "vectors", (4, 9)),
        (nn.BatchNorm2d(3), "images", (1, 3, 512, 512)),
    ],
)
def test_where_nothing_works_the_sentence_shows_an_example(part: nn.Module, what: str, shown: tuple[int, ...]) -> None:
    """What it shows is in the form that the first layer takes."""
    with pytest.raises(
        ConversionError, match=f"cannot run on random {what} of shape .*guide.*pass an example"
    ) as error:
        cbn.convert(Never(part))
    expression = re.search(r"example_input=torch\.zeros\(([\d, ]+)\)", str(error.value))
    assert tuple(map(int, expression[1].split(","))) == shown
    small = [min(n, 8) if i > 1 else n for i, n in enumerate(shown)]
    cbn.convert(Never(part), example_input=(torch.zeros(small), torch.zeros(())))


def test_an_example_that_does_not_fit_is_answered_with_one_that_does() -> None:
    with pytest.raises(
        ConversionError, match=r"example input of shape \(1, 3, 8, 8\).*torch.zeros\(1, 1, 160, 160, 160\)"
    ):
        cbn.fold(block(3, 1), "conv", example_input=torch.zeros(1, 3, 8, 8))


def lazy(first: nn.Module | None = None) -> nn.Sequential:
    first = nn.Conv2d(1, 4, 3) if first is None else first
    return nn.Sequential(first, nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d())


def test_lazy_layers_get_the_shapes_and_weights_of_a_first_forward_pass() -> None:
    first, x = nn.Conv2d(1, 4, 3), torch.randn(2, 1, 9, 9)
    model, twin = lazy(first), lazy(copy.deepcopy(first))
    torch.manual_seed(5)
    assert cbn.convert(model).counts == {"compensated": 2, "window": 0, "kept": 0}
    torch.manual_seed(5)
    twin.eval()(x)
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    for _ in range(3):
        model(x).square().sum().backward()


@pytest.mark.parametrize("kind", ["conv", "linear", "norm"])
def test_a_lazy_layer_whose_shape_is_anybodys_guess_is_left_alone(kind: str) -> None:
    model = {
        "conv": lambda: lazy(nn.LazyConv2d(4, 3)),
        "linear": lambda: nn.Sequential(block(2, 3), nn.Flatten(), nn.LazyLinear(4)),
        "norm": lambda: nn.Sequential(block(2, 3), nn.Flatten(), nn.LazyBatchNorm1d()),
    }[kind]()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ConversionError, match=r"gets its shape from the first input.*run the model once"):
        cbn.convert(model)
    with pytest.raises(ConversionError, match="cannot run on the example input"):
        cbn.convert(model, example_input=torch.zeros(1, 3, 1, 1))
    assert [type(m) for m in model.modules()] == classes
    assert cbn.convert(model, example_input=torch.randn(2, 3, 16, 16)).counts["kept"] == 0


def test_lazy_layers_out_of_reach() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = block(2, 3), nn.LazyBatchNorm2d()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(ConversionError, match=r"'other', a LazyBatchNorm2d, .*does not reach it; run the model once"):
        cbn.convert(Part())
    model = Part()
    assert cbn.convert(model, exclude="other").counts == {"compensated": 1, "window": 0, "kept": 1}
    cbn.warm_up(model, [torch.randn(2, 3, 8, 8)])
    with pytest.raises(FoldError, match=r"'other' has no weights yet.*run the model once"):
        cbn.fold(model, "conv")


class GhostBatchNorm(nn.Module):
    """As in TabNet: batches of at most 8, each with statistics of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(part) for part in x.split(8)])


def test_virtual_batches_of_a_large_example_are_told_from_repeated_calls() -> None:
    def ghost() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), GhostBatchNorm(4))

    assert cbn.convert(ghost()).counts["compensated"] == 1
    (row,) = cbn.convert(ghost(), example_input=torch.randn(20, 5))
    assert row.status == "kept"
    assert row.reason.startswith("called 3 times per forward pass for 20 samples")
    assert "a smaller example_input" in row.reason
    shared = nn.BatchNorm1d(4)
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    assert "smaller" not in next(iter(cbn.convert(twice, example_input=torch.randn(6, 4)))).reason
