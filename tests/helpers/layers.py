"""A conv and the norm behind it, and what a test does to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationBatchNorm2d, Window
from helpers.models import randomize_norms
from helpers.ways import Net, X

DOUBLE = torch.float64


def inputs(shape: tuple[int, ...], seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Random numbers by a seed of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_pair() -> nn.Sequential:
    """Converted, training, in float64; the conv applies the norm."""
    torch.manual_seed(3)
    model = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    cbn.convert(model, example_input=inputs((2, 3, 8, 8), 0))
    return model.train()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters of a loss that is curved everywhere."""
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = list(model.parameters())
    return [y.detach(), *torch.autograd.grad(y.pow(3).sin().sum(), [x, *parameters])]


def shake(*models: nn.Module) -> None:
    """The same random change of the weights of all."""
    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            change = 0.05 * torch.randn_like(same[0])
            for p in same:
                p += change


def bound_pair(window: Window | None = None, bias: bool = True, folded: bool = False, dtype: torch.dtype = DOUBLE):
    """A conv and the layer alone, bound to it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=bias).to(dtype)
    norm = CrossIterationBatchNorm2d(4, window=window or Window(every=3, size=20)).to(dtype).bind(conv, folded=folded)
    return conv, randomize_norms(norm)


def perturb(module: nn.Module, size: float = 0.05) -> None:
    """A random change of the weights, in proportion to each one's scatter."""
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p) * p.std()


def normalised(norm: nn.Module, x: Tensor, M: Tensor, S: Tensor) -> Tensor:
    """x [N, C, H, W] by M and S [C], as the formula stands."""
    M, S, gamma, beta = (t.view(1, -1, 1, 1) for t in (M, S, norm.weight, norm.bias))
    return gamma * (x - M) / torch.sqrt(S + norm.eps) + beta


def pretrained(seed: int = 0, **keywords: object) -> Net:
    """A small network with statistics, converted and training."""
    torch.manual_seed(seed)
    net = randomize_norms(Net()).double()
    cbn.convert(net, example_input=X.double(), **keywords)  # type: ignore[arg-type]
    return net.train()


def step(net: nn.Module, x: Tensor, lr: float = 0.002) -> Tensor:
    """A step of plain gradient descent; the output before it."""
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= lr * p.grad
    return out.detach()
