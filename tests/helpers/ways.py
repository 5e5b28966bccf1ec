"""A small network with everything that matters in it, and steps of its training; for tests of the layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin, history_state
from helpers.models import randomize_norms

X = torch.randn(1, 3, 12, 12)


class Net(nn.Module):
    """Three convs with norms, a residual sum with a norm of its own, and a head; `around` wraps the middle part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.last = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.around = lambda function, x: function(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.around(self.stem, x)
        x = x + self.around(self.body, x)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def converted(seed: int = 0, double: bool = True, new: bool = False, **options) -> Net:
    """A converted `Net` in training, by default with a ring of 4; with history="ema" it has statistics to carry.

    `new` leaves its norms as they are made.
    """
    torch.manual_seed(seed)
    net = Net().double() if double else Net()
    if not new:
        randomize_norms(net)
    if options.get("history", "ring") == "ring":
        options = {"window": 4, **options}
    cbn.convert(net, example_input=X.to(net.head.weight.dtype), **options)
    return net.train()


def batch(seed: int, n: int = 2, size: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(net: nn.Module, x: Tensor, lr: float = 0.05) -> Tensor:
    net.zero_grad()
    out = net(x)
    out.pow(3).mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return out.detach()


def layers(net: nn.Module) -> list[CrossIterationMixin]:
    return [m for m in net.modules() if isinstance(m, CrossIterationMixin)]


def assert_same_state(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for key, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[key], **tolerance)
    for one, other in zip(history_state(a).values(), history_state(b).values(), strict=True):
        assert one["sources"][0]["kind"] == other["sources"][0]["kind"]
        assert one["sources"][0]["seen"] == other["sources"][0]["seen"]
        assert one["sources"][0]["slots"].keys() == other["sources"][0]["slots"].keys()
        for key, value in one["sources"][0]["slots"].items():
            torch.testing.assert_close(value, other["sources"][0]["slots"][key], **tolerance)
