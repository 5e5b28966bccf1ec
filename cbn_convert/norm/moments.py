"""Moments of the input patches of a conv or linear layer, without autograd: p̄, C = mean((x - μ) p), Σ = cov(p).

p̄ is a strided mean of the input per kernel position, two small matrix products and no convolution. C is a weight
gradient: that of the layer for the output gradient (x - μ) / m. Σ is a product of the unfolded input with itself. For a
transposed conv the patch of an output position holds the inputs that reach it, with zeros where none does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .producers import (
    Conv,
    Producer,
    TransposedConv,
    as_rows,
    fan_in,
    groups_of,
    is_producer,
    is_transposed,
    out_channels,
    padded_input,
)


def exact_is_possible(module: nn.Module) -> bool:
    """Whether Σ can be had: for every producer but transposed convs."""
    return is_producer(module) and not is_transposed(module)


def exact_is_smaller(module: nn.Module) -> bool:
    """Whether Σ costs less than C: depthwise convs up to 5x5, and convs and linears that widen.

    For a depthwise conv Σ has K²·K² entries per channel, a few hundred bytes; elsewhere it has F² per group, fewer than
    the F·C/G of C.
    """
    if not is_producer(module) or not exact_is_possible(module):
        return False
    return fan_in(module) <= max(out_channels(module) // groups_of(module), 25)


class InputPatches:
    """The patches p [G, m, F] of one input y of a producer, of which only moments are ever computed.

    out_size: spatial size of the output; dtype: that of all results. Moments of no patches at all are zero.
    """

    def __init__(self, module: Producer, y: Tensor, out_size: torch.Size, dtype: torch.dtype) -> None:
        self.module = module
        self.positions = y.numel() // module.in_features if isinstance(module, nn.Linear) else len(y) * out_size.numel()
        self.out_size = out_size
        self.y = y.to(dtype)
        self.padding: tuple[int, ...] = ()
        if is_transposed(module):
            assert not isinstance(module.padding, str)
            self.padding = module.padding
        elif not isinstance(module, nn.Linear):
            self.y, self.padding = padded_input(module, self.y)
        # every input position is the patch of one output position
        self.pointwise = not isinstance(module, nn.Linear) and (
            set(module.kernel_size) == {1} and set(module.stride) == {1} and set(self.padding) == {0}
        )

    def mean(self) -> Tensor:
        """p̄ [G, F]."""
        module, y = self.module, self.y
        if not self.positions:
            return y.new_zeros(groups_of(module), fan_in(module))
        if isinstance(module, nn.Linear):
            return y.reshape(-1, module.in_features).mean(0, keepdim=True)
        if is_transposed(module):
            # the mean over outputs is one more output channel per group: its weight gradient is the mean patch
            ones = y.new_ones(()).expand(len(y), module.groups, *self.out_size)
            total = _weight_gradient(ones, y, module, self.padding, 1)
        elif self.pointwise:
            total = y.sum([0, *range(2, y.dim())])
        else:
            total = _patch_sum(y, module, self.padding, self.out_size)
        return total.reshape(module.groups, -1) / self.positions

    def covariance_with(self, xc: Tensor) -> Tensor:
        """mean(xc p) [C, F] for the centred output xc [N, C, ...]."""
        module, y = self.module, self.y
        if not self.positions:
            return y.new_zeros(out_channels(module), fan_in(module))
        if isinstance(module, nn.Linear):
            return (xc.transpose(0, 1).flatten(1) @ y.reshape(-1, module.in_features)) / self.positions
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and not y.is_cuda:
            total = _depthwise_products(y, xc, module, self.padding)
        else:
            total = as_rows(_weight_gradient(xc, y, module, self.padding), module)
        return total.flatten(1) / self.positions

    def covariance(self, mean: Tensor) -> Tensor:
        """mean((p - mean)(p - mean)ᵀ) [G, F, F]."""
        module, y = self.module, self.y
        assert not is_transposed(module)
        if not self.positions:
            return y.new_zeros(*mean.shape, mean.shape[1])
        if isinstance(module, nn.Linear):
            patches = y.reshape(1, -1, module.in_features)
        elif self.pointwise and module.groups == 1:
            rows = y.flatten(2) - mean.view(1, -1, 1)
            return torch.bmm(rows, rows.transpose(1, 2)).sum(0, keepdim=True) / self.positions
        else:
            patches = _unfolded(y, module, self.padding)
        centred = patches - mean[:, None]
        return torch.bmm(centred.transpose(1, 2), centred) / self.positions


def _patch_sum(y: Tensor, conv: Conv, padding: tuple[int, ...], out_size: torch.Size) -> Tensor:
    """Sum of the input patches [C_in, K_1, K_2, ...] over all output positions."""
    total = y.sum(0)
    rank = len(conv.kernel_size)
    for d in reversed(range(rank)):
        size, out = y.shape[2 + d], out_size[d]
        k, s, p, dil = conv.kernel_size[d], conv.stride[d], padding[d], conv.dilation[d]
        # selector[i, o] = 1 where input index i is read by kernel position o, for any of the output positions
        first = torch.arange(k, device=y.device) * dil - p
        offset = torch.arange(size, device=y.device)[:, None] - first[None, :]
        selector = (offset >= 0) & (offset <= s * (out - 1)) & (offset % s == 0)
        # contracts the last of the untouched axes; the kernel axes collect at the end, first dimension first
        total = torch.tensordot(total, selector.to(y.dtype), dims=([1 + d], [0]))
    return total.permute([0, *reversed(range(1, rank + 1))])


def _depthwise_products(y: Tensor, xc: Tensor, conv: nn.Conv2d, padding: tuple[int, ...]) -> Tensor:
    """Sum of xc p [C, 1, K_h, K_w] for one input channel per group, one kernel position at a time."""
    ph, pw = padding
    y = F.pad(y, (pw, pw, ph, ph)) if ph or pw else y
    y = y.repeat_interleave(conv.out_channels // conv.in_channels, 1) if conv.out_channels != conv.in_channels else y
    (sh, sw), (dh, dw), (kh, kw) = conv.stride, conv.dilation, conv.kernel_size
    ho, wo = xc.shape[2:]
    out = xc.new_empty(conv.out_channels, 1, kh, kw)
    for i in range(kh):
        for j in range(kw):
            window = y[:, :, i * dh : i * dh + sh * (ho - 1) + 1 : sh, j * dw : j * dw + sw * (wo - 1) + 1 : sw]
            out[:, 0, i, j] = (xc * window).sum((0, 2, 3))
    return out


def _weight_gradient(
    g: Tensor, y: Tensor, conv: Conv | TransposedConv, padding: tuple[int, ...], outputs: int | None = None
) -> Tensor:
    """Gradient of the conv's weight for input y and output gradient g, `outputs` per group or as many as it has."""
    transposed = is_transposed(conv)
    inputs, channels = conv.in_channels, outputs or conv.out_channels // conv.groups
    shape = (inputs, channels) if transposed else (conv.out_channels, inputs // conv.groups)
    # only the shape of this weight is read
    weight = y.new_empty(()).expand(*shape, *conv.kernel_size)
    output_padding = [0] * len(conv.kernel_size)
    if transposed:  # as the output is, whatever output_size was asked for
        output_padding = [
            g.shape[2 + d] - (y.shape[2 + d] - 1) * conv.stride[d] + 2 * padding[d]
            - conv.dilation[d] * (conv.kernel_size[d] - 1) - 1
            for d in range(len(conv.kernel_size))
        ]  # fmt: skip
    result: Tensor = torch.ops.aten.convolution_backward(
        g, y, weight, None, conv.stride, padding, conv.dilation, transposed,
        output_padding, conv.groups, [False, True, False],
    )[1]  # fmt: skip
    return result


def _unfolded(y: Tensor, conv: Conv, padding: tuple[int, ...]) -> Tensor:
    """Input patches [G, m, F] of zero-padded input."""
    y = F.pad(y, [p for p in reversed(padding) for _ in range(2)])
    rank = len(conv.kernel_size)
    for d in range(rank):
        span = conv.dilation[d] * (conv.kernel_size[d] - 1) + 1
        y = y.unfold(2 + d, span, conv.stride[d])[..., :: conv.dilation[d]]
    # [N, C_in, out..., kernel...] -> [G, N, out..., C_in / G, kernel...]
    y = y.unflatten(1, (conv.groups, -1))
    order = [1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank)]
    return y.permute(order).flatten(2 + rank).flatten(1, 1 + rank)
