"""A norm layer behind several modules, or behind a part of one: the same as norm layers of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import randomize_norms
from torch import Tensor, nn

from cbn_convert.norm import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, OutputChannels

STEPS = 5
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def joined_convs() -> list[nn.Module]:
    return [
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
    ]


class Together(nn.Module):
    def __init__(self, convs: list[nn.Module], **options) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        norm = CrossIterationBatchNorm2d(sum(c.out_channels for c in convs), **options)
        self.norm = randomize_norms(norm).bind(*convs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([conv(x) for conv in self.convs], 1))


class Apart(nn.Module):
    def __init__(self, convs: list[nn.Module], **options) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(CrossIterationBatchNorm2d(c.out_channels, **options).bind(c) for c in convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)], 1)

    @torch.no_grad()
    def begin_as(self, norm: nn.Module) -> None:
        """Takes γ, β and statistics over from one layer for all."""
        sizes = [own.num_features for own in self.norms]
        for name in STATISTICS:
            for own, part in zip(self.norms, getattr(norm, name).split(sizes), strict=True):
                getattr(own, name).copy_(part)


def train(model: nn.Module, norms: list[nn.Module], shape: tuple[int, ...]) -> list[Tensor]:
    """Outputs, gradients and running statistics over a few steps of SGD, those of several norms side by side."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(3)
    seen: list[Tensor] = []
    for _ in range(STEPS):
        y = model(torch.randn(shape, generator=generator).double())
        target = torch.randn(y.shape, generator=generator)
        optimizer.zero_grad()
        (y * target).sum().backward()
        optimizer.step()
        parts = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        seen += [y.detach()] + [p.grad.clone() for m in parts for p in m.parameters()]
        for name in STATISTICS:
            seen.append(torch.cat([getattr(norm, name).detach().clone() for norm in norms]))
    return seen


@pytest.mark.parametrize("options", [
    {"window": 4}, {"window": 4, "moments_positions": 40}, {"window": 1}, {"window": 4, "momentum": None},
    {"window": 4, "compensation": "taylor", "gradient": "current"}, {"window": 4, "compensation": "none"},
    {"window": 16, "history": "ema", "moments_every": 1}, {"window": 16, "history": "ema", "gradient": "current"},
    {"window": 16, "history": "ema", "moments_every": 2, "moments_positions": 40},
    {"window": 16, "history": "ema", "compensation": "none", "moments_every": 2},
], ids=str)  # fmt: skip
def test_concatenated_convs_are_norms_of_their_own(options: dict) -> None:
    torch.manual_seed(0)
    convs = joined_convs()
    together = Together(copy.deepcopy(convs), **options).double().train()
    apart = Apart(copy.deepcopy(convs), **options).double().train()
    apart.begin_as(together.norm)
    got = train(together, [together.norm], (2, 4, 7, 6))
    expected = train(apart, list(apart.norms), (2, 4, 7, 6))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert together.norm.num_batches_tracked == STEPS
    assert together.norm.history_bytes == sum(norm.history_bytes for norm in apart.norms)


@pytest.mark.parametrize("options", [
    {"window": 4}, {"window": 4, "compensation": "taylor"}, {"window": 16, "history": "ema", "moments_every": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_part_of_the_channels_is_a_smaller_module(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    conv = kind == "conv"
    whole = nn.Conv2d(4, 7, 3, padding=1) if conv else nn.Linear(4, 7)
    part = nn.Conv2d(4, 3, 3, padding=1) if conv else nn.Linear(4, 3)
    part.load_state_dict({k: v[2:5] for k, v in whole.state_dict().items()})
    kind_of_norm = CrossIterationBatchNorm2d if conv else CrossIterationBatchNorm1d
    norms = [randomize_norms(kind_of_norm(3, **options)) for _ in range(2)]
    norms[1].load_state_dict(norms[0].state_dict())

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = whole
            self.norm = norms[0].bind(OutputChannels(whole, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.made(x)[:, 2:5])

    cut = Cut().double().train()
    alone = nn.Sequential(part, norms[1].bind(part)).double().train()
    shape = (2, 4, 7, 6) if conv else (6, 4)
    got, expected = train(cut, [cut.norm], shape), train(alone, [alone[1]], shape)
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape:  # a gradient of the whole module: nothing reaches the other channels
            assert one[:2].abs().sum() == one[5:].abs().sum() == 0
            one = one[2:5]
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [
    {"window": 5}, {"window": 3, "compensation": "none"}, {"window": 1}, {"window": 16, "history": "ema"},
    {"window": 16, "history": "ema", "compensation": "none"},
], ids=str)  # fmt: skip
def test_history_bytes_are_those_of_the_tensors(options: dict) -> None:
    model = Together(joined_convs(), **options).train()
    for _ in range(6):
        model(torch.randn(2, 4, 7, 6))
    assert model.norm.history_bytes == sum(t.numel() * t.element_size() for t in model.norm.history_tensors())


@pytest.mark.parametrize("options", [{"window": 4}, {"window": 16, "history": "ema", "moments_every": 2}], ids=str)
def test_a_resumed_history_goes_on_and_another_number_of_modules_is_refused(options: dict) -> None:
    torch.manual_seed(0)
    model = Together(joined_convs(), **options)
    x = torch.randn(2, 4, 7, 6)
    for _ in range(2):
        model(x)
    twin = Together(joined_convs(), **options)
    twin.load_state_dict(model.state_dict())
    twin.norm.load_history_state(copy.deepcopy(model.norm.history_state()))
    for _ in range(2):
        assert torch.equal(model(x + 1), twin(x + 1))
    alone = CrossIterationBatchNorm2d(9, **options)
    with pytest.raises(ValueError, match="3 modules"):
        alone.load_history_state(model.norm.history_state())


def test_a_batch_with_nan_in_one_part_counts_in_none_of_them() -> None:
    torch.manual_seed(0)
    model = Together(joined_convs(), window=4)
    x = torch.randn(2, 4, 7, 6)
    model(x)
    with torch.no_grad():
        model.convs[1].weight[0, 0] = float("nan")
    model(x)
    assert model.norm.num_batches_tracked == 1
    assert torch.isfinite(model.norm.running_mean).all()


def test_what_cannot_be_bound_is_refused() -> None:
    norm = CrossIterationBatchNorm2d(4)
    grouped = nn.Conv2d(4, 8, 1, groups=2)
    for made, match in (
        ((nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)), "5 output channels"),
        ((OutputChannels(grouped, 0, 4),), "with groups"),
        ((OutputChannels(nn.Conv2d(3, 5, 1), 2, 4),), "channels 2 to 6 of 5"),
    ):
        with pytest.raises(ValueError, match=match):
            norm.bind(*made)
    assert norm.producers == ()
