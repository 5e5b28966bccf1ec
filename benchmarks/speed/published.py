"""The algorithm as published, as a baseline for its cost; the layer to train with is CrossIterationBatchNorm2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cbn_convert import convert
from cbn_convert.norm import CrossIterationMixin, Window
from cbn_convert.norm.producers import plain_class


class PublishedBatchNorm2d(nn.BatchNorm2d):
    """CBN as in arXiv 2002.05712, section 3, taken literally, and organised as the authors' layer is.

    autograd.grad runs twice in every forward pass, for dμ/dθ and dν/dθ; the past is a list of (μ, ν, their
    derivatives, a copy of the weights) of the last window - 1 iterations; the gradient passes through the current
    batch alone; activations are copied to channels first and normalised one operation at a time. Input [N, C, H, W],
    made by `conv` with its weight requiring a gradient.
    """

    conv: nn.Conv2d
    window: int
    past: list[tuple[Tensor, ...]]

    def bind(self, conv: nn.Conv2d, window: int) -> None:
        """Names the conv that makes the input; not registered as a submodule."""
        self.__dict__.update(conv=conv, window=window, past=[])

    def history_tensors(self) -> list[Tensor]:
        """The tensors of the past."""
        return [t for entry in self.past for t in entry]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the window in training, as BatchNorm in evaluation."""
        if not self.training:
            return super().forward(x)
        weight = self.conv.weight
        swapped = x.transpose(0, 1)
        y = swapped.contiguous().flatten(1)
        mean, square, var = y.mean(1), torch.pow(y, 2).mean(1), y.var(1)
        (d_mean,) = torch.autograd.grad(mean.sum(), weight, retain_graph=True)
        (d_square,) = torch.autograd.grad(square.sum(), weight, retain_graph=True)
        means, squares = [mean], [square]
        for old_mean, old_square, slope_mean, slope_square, old_weight in self.past:
            means.append(old_mean + (slope_mean * (weight.detach() - old_weight)).flatten(1).sum(1))
            squares.append(old_square + (slope_square * (weight.detach() - old_weight)).flatten(1).sum(1))
        every = torch.stack(means)
        M = every.mean(0)
        S = torch.maximum(torch.stack(squares), every * every).mean(0) - M * M
        entry = (mean.detach(), square.detach(), d_mean, d_square, weight.detach().clone())
        self.__dict__["past"] = [entry, *self.past][: self.window - 1]
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(var, self.momentum or 0.0)
        y = y - M[:, None]
        y = y / (S[:, None] + self.eps) ** 0.5
        y = self.weight[:, None] * y + self.bias[:, None]
        return y.view(swapped.shape).transpose(0, 1)


class PublishedBatchNormAct2d(PublishedBatchNorm2d):
    """With timm's drop and act behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """`PublishedBatchNorm2d`, then drop and act."""
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


def use_published(model: nn.Module, example: Tensor) -> None:
    """Puts it, with a window of 8, in place of every norm layer with a conv of its own; others get `Window.PAPER`."""
    convert(model, example_input=example, window=Window.PAPER)
    for module in model.modules():
        if isinstance(module, CrossIterationMixin) and [plain_class(m) for m in module.producers] == [nn.Conv2d]:
            (conv,) = module.producers
            published: Any = module.restore()
            published.__class__ = PublishedBatchNormAct2d if hasattr(module, "act") else PublishedBatchNorm2d
            published.bind(conv, 8)
