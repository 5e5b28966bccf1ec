"""Moments of the input patches of a conv or linear layer, without autograd: p̄, C = mean((x - μ) p), Σ = cov(p).

p̄ is a strided mean of the input per kernel position, two small matrix products and no convolution. C is a weight
gradient: that of the layer for the output gradient (x - μ) / m. Σ is a product of the unfolded input with itself.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

Producer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

_EXACT_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2dSame)


def is_producer(module: nn.Module) -> TypeGuard[Producer]:
    """Whether the module's output is θ·p + b with θ its own Parameter `weight`, in a way known here."""
    return type(module) in _EXACT_TYPES and isinstance(module.weight, nn.Parameter)


def _padded_input(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, y: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the zero padding still to be applied to it, after any padding that is not symmetric zeros."""
    none = (0,) * len(conv.kernel_size)
    if isinstance(conv, Conv2dSame):
        return pad_same(y, list(conv.kernel_size), list(conv.stride), list(conv.dilation)), none
    if conv.padding_mode != "zeros":
        return F.pad(y, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), none
    if isinstance(conv.padding, str):
        return F.pad(y, conv._reversed_padding_repeated_twice), none
    return y, conv.padding


def _patch_mean(
    y: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, padding: tuple[int, ...], out_size: torch.Size
) -> Tensor:
    """Mean input patch [C_in, K_1, K_2, ...] over all output positions."""
    total = y.sum(0)
    rank = len(conv.kernel_size)
    for d in reversed(range(rank)):
        size, k, s, p, dil, out = (
            y.shape[2 + d],
            conv.kernel_size[d],
            conv.stride[d],
            padding[d],
            conv.dilation[d],
            out_size[d],
        )
        # selector[i, o] = 1 where input index i is read by kernel position o, for any of the output positions
        first = torch.arange(k, device=y.device) * dil - p
        offset = torch.arange(size, device=y.device)[:, None] - first[None, :]
        selector = (offset >= 0) & (offset <= s * (out - 1)) & (offset % s == 0)
        # contracts the last of the untouched axes; the kernel axes collect at the end, first dimension first
        total = torch.tensordot(total, selector.to(y.dtype), dims=([1 + d], [0]))
    positions = y.shape[0] * out_size.numel()
    order = [0, *reversed(range(1, rank + 1))]
    return total.permute(order) / positions


def _depthwise_covariance(y: Tensor, xc: Tensor, conv: nn.Conv2d, padding: tuple[int, ...]) -> Tensor:
    """mean(xc p) [C, 1, K_h, K_w] for one input channel per group, one kernel position at a time."""
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


def _patches(y: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, padding: tuple[int, ...]) -> Tensor:
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


def exact_is_smaller(module: nn.Module) -> bool:
    """Whether Σ costs less than C: depthwise convs up to 5x5, and convs and linears that widen.

    For a depthwise conv Σ has K²·K² entries per channel, a few hundred bytes; elsewhere it has F² per group, fewer than
    the F·C/G of C.
    """
    if not is_producer(module):
        return False
    fan_in = module.weight[0].numel()
    return fan_in <= max(module.weight.shape[0] // getattr(module, "groups", 1), 25)


@torch.no_grad()
def patch_covariances(module: Producer, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(p̄ [G, F], Σ [G, F, F]) of `module` with input y, in dtype."""
    y = y.to(dtype)
    if isinstance(module, nn.Linear):
        patches = y.reshape(1, -1, module.in_features)
    else:
        y, padding = _padded_input(module, y)
        patches = _patches(y, module, padding)
    mean = patches.mean(1)
    centred = patches - mean[:, None]
    return mean, torch.bmm(centred.transpose(1, 2), centred) / patches.shape[1]


@torch.no_grad()
def patch_moments(module: Producer, y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(p̄ [G, F], C [C, F]) of `module` with input y, output x [N, C, ...] and x's mean [C], in mean's dtype."""
    y = y.to(mean.dtype)
    xc = x.to(mean.dtype) - mean.view(1, -1, *[1] * (x.dim() - 2))
    positions = x.numel() // x.shape[1]
    if isinstance(module, nn.Linear):
        rows = y.reshape(-1, module.in_features)
        return rows.mean(0, keepdim=True), (xc.transpose(0, 1).flatten(1) @ rows) / positions
    y, padding = _padded_input(module, y)
    patch_mean = _patch_mean(y, module, padding, x.shape[2:]).reshape(module.groups, -1)
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and not y.is_cuda:
        covariance = _depthwise_covariance(y, xc, module, padding)
    else:
        rank = len(module.kernel_size)
        covariance = torch.ops.aten.convolution_backward(
            xc, y, module.weight.to(y.dtype), None, module.stride, padding, module.dilation, False, [0] * rank,
            module.groups, [False, True, False],
        )[1]  # fmt: skip
    return patch_mean, covariance.flatten(1) / positions
