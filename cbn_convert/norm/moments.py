"""Moments of the input patches of a conv or linear layer, without autograd: mean, variance, some covariances.

All are weight gradients of the layer: p̄ that for the output gradient 1 / m, with one output channel per group, and the
covariance C = mean((x - μ) p) with an output x that for (x - μ) / m. With weights V in the place of the layer's own it
is ΣV, Σ being the covariance of the patches. For a transposed conv the patch of an output position holds the inputs
that reach it, with zeros where none does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import PatchAxis, batch_statistics, select
from .producers import Conv, Producer, as_rows, fan_in, groups_of, is_linear, is_transposed, padded_input, per_axis


class _Arranged(NamedTuple):
    """An input, and the conv whose patches of it, all of them, are those that were asked for."""

    y: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    pointwise: bool


class InputPatches:
    """The patches p [G, m, F] of one input y of a producer, of which only moments are ever computed.

    out_size: spatial size of the output; dtype: that of all results. With at_most, a regular grid of about so many of
    the positions stands for all; `turn` shifts it, so that consecutive turns see different ones. Moments of no patches
    at all are zero.
    """

    def __init__(
        self,
        module: Producer,
        y: Tensor,
        out_size: torch.Size,
        dtype: torch.dtype,
        at_most: int | None = None,
        turn: int = 0,
    ) -> None:
        self.module, self.dtype, self.at_most, self.out_size = module, dtype, at_most, tuple(out_size)
        self.padding: tuple[int, ...] = ()
        if is_linear(module):
            self.given = y.reshape(-1, fan_in(module))
            self.grid = _grid([len(self.given)], 1, at_most, turn)
            self.positions = len(range(*self.grid[0].indices(len(self.given))))
            return
        if is_transposed(module):
            self.given, self.padding = y, per_axis(module, "padding")
            self.grid = _grid(out_size, len(y), None, 0)
        else:
            self.given, self.padding = padded_input(module, y)
            self.grid = _grid(out_size, len(y), at_most, turn)
            self.out_size = tuple(len(range(*g.indices(n))) for g, n in zip(self.grid, out_size, strict=True))
        self.positions = len(y) * math.prod(self.out_size)

    @cached_property
    def arranged(self) -> _Arranged:
        """The part of the input that the patches are of."""
        module, y, padding = self.module, self.given, self.padding
        if is_linear(module):
            return _Arranged(y[self.grid[0]].to(self.dtype), (), (), (), True)
        stride, dilation, kernel = (per_axis(module, name) for name in ("stride", "dilation", "kernel_size"))
        if is_transposed(module):
            return _Arranged(y.to(self.dtype), stride, padding, dilation, False)
        # every input position is the patch of one output position
        pointwise = set(kernel) == {1} and set(padding) == {0}
        steps, rank = [g.step for g in self.grid], len(kernel)
        stride = tuple(s * step for s, step in zip(stride, steps, strict=True))
        if max(steps) > 1:
            y, padding = _input_of(self.grid, self.out_size, module, y, padding), (0,) * rank
        if pointwise:
            y = y[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
            stride = (1,) * rank
        elif max(steps) > 1 and _apart(module, stride):
            # nothing but the patches, side by side: most of a large map is not looked at
            y = _views(y, kernel, stride, dilation)
            y = y.permute(0, 1, *(2 + i + j for i in range(rank) for j in (0, rank)))
            y = y.reshape(*y.shape[:2], *(n * k for n, k in zip(self.out_size, kernel, strict=True)))
            stride, dilation = kernel, (1,) * rank
        return _Arranged(y.to(self.dtype), stride, padding, dilation, pointwise)

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs x [N, C, ...] at the positions of these patches, [N, C, ...] or [C, m]."""
        if is_linear(self.module):
            return x.transpose(0, 1).flatten(1)[:, self.grid[0]]
        return x[(slice(None), slice(None), *self.grid)]

    @property
    def groups(self) -> int:
        """G, the groups that share their patches."""
        return groups_of(self.module)

    @property
    def width(self) -> int:
        """F, the entries of a patch."""
        return fan_in(self.module)

    def mean(self) -> Tensor:
        """p̄ [G, F]."""
        return self._mean_of(self.arranged.y)

    def moments(self, probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p̄ and the variance of every entry of the patches [G, F], and ΣV [G, K, F] for directions V of that shape."""
        return self._in_one_pass(probes) or (*self.mean_and_var(), self.covariance_along(probes))

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """p̄ and the variance of every entry of the patches [G, F].

        About the mean of each input channel, so that a large one does not hide the variance. Where a patch reaches over
        the edge, or no input reaches it, its entries are 0: they are at minus that mean.
        """
        module, y = self.module, self.arranged.y
        if not self.positions:
            return self._mean_of(y), self._mean_of(y)
        if self.arranged.pointwise:
            mean, var = batch_statistics(y.contiguous())
            return mean.view(self.groups, -1), var.view(self.groups, -1)
        centre = y.mean([0, *range(2, y.dim())], keepdim=True)
        centred = y - centre
        first, square = self._mean_of(centred), self._mean_of(centred.square())
        centre = centre.flatten().repeat_interleave(first.numel() // centre.numel()).view_as(first)
        if is_transposed(module) or any(self.arranged.padding):
            filled = self._mean_of(torch.ones_like(y))
            first, square = first - centre * (1 - filled), square + centre.square() * (1 - filled)
        return centre + first, (square - first.square()).clamp_min(0)

    def _in_one_pass(self, probes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """`moments` where there is a kernel for those of some patches, which need not be arranged first."""
        module, y = self.module, self.given
        if self.at_most is None or not self.positions or is_linear(module) or is_transposed(module):
            return None
        if y.dtype != self.dtype:
            return None
        layers = [per_axis(module, name) for name in ("kernel_size", "stride", "dilation")]
        axes = [
            PatchAxis(size, memory, kernel, stride, padding, dilation, g.start, g.step, count)
            for size, memory, kernel, stride, dilation, padding, g, count in zip(
                y.shape[2:], y.stride()[2:], *layers, self.padding, self.grid, self.out_size, strict=True
            )
        ]
        return select(y, in_any_order=True).patch_moments(y, axes, probes)

    def _mean_of(self, y: Tensor) -> Tensor:
        """The mean patch [G, F] of values y in the place of the input."""
        module = self.module
        if not self.positions:
            return y.new_zeros(groups_of(module), fan_in(module))
        if is_linear(module):
            return y.mean(0, keepdim=True)
        if self.arranged.pointwise:
            total = y.sum([0, *range(2, y.dim())])
        else:
            y = y.double() if y.is_cuda else y  # else it may be rounded to TF32
            # the mean over outputs is one more output channel per group: its weight gradient is the mean patch
            ones = y.new_ones(()).expand(len(y), module.groups, *self.out_size)
            total = self._weight_gradient(ones, y).to(self.dtype)
        return total.reshape(module.groups, -1) / self.positions

    def covariance_with(self, xc: Tensor) -> Tensor:
        """mean(xc p) [C, F] for centred `outputs`, or for some channels of them where there is one group."""
        return self._covariance(xc, self.arranged.y)

    def _covariance(self, xc: Tensor, y: Tensor) -> Tensor:
        module = self.module
        if not self.positions:
            return y.new_zeros(xc.shape[0 if is_linear(module) else 1], fan_in(module))
        if is_linear(module):
            return (xc @ y).div_(self.positions)
        if self.arranged.pointwise and module.groups == 1:
            total = torch.bmm(xc.flatten(2), y.flatten(2).transpose(1, 2)).sum(0)
        else:
            total = as_rows(self._weight_gradient(xc, y), module)
        return total.div_(self.positions)

    def covariance_along(self, probes: Tensor) -> Tensor:
        """ΣV [G, K, F] for directions V [G, K, F]: what the patches have in common with their products with these."""
        module, at = self.module, self.arranged
        shape = probes.shape
        if not (self.positions and probes.numel()):
            return torch.zeros_like(probes)
        # on CUDA float32 may be rounded to TF32, from which axes of nothing would come
        y, probes = (t.double() if t.is_cuda else t for t in (at.y, probes))
        if is_linear(module):
            made = probes[0] @ y.T
        else:
            kernel, transposed = per_axis(module, "kernel_size"), is_transposed(module)
            weight, extra = probes.reshape(-1, module.in_channels // module.groups, *kernel), (0,) * len(kernel)
            if transposed:
                weight = weight.unflatten(0, probes.shape[:2]).transpose(1, 2).flatten(0, 1)
                extra = self._output_padding(self.out_size)
            made = torch.convolution(
                y, weight, None, at.stride, at.padding, at.dilation, transposed, extra, module.groups
            )
        axes = [1] if is_linear(module) else [0, *range(2, made.dim())]
        for _ in range(2):  # what rounding leaves of a large mean would count as often as the mean patch is large
            made = made - made.mean(axes, keepdim=True)
        return self._covariance(made, y).to(self.dtype).contiguous().view(shape)

    def _output_padding(self, out_size: Sequence[int]) -> tuple[int, ...]:
        """That of a transposed conv whose output is of a size, whatever output_size was asked for."""
        kernel, at = per_axis(self.module, "kernel_size"), self.arranged
        steps = zip(out_size, at.y.shape[2:], at.stride, at.padding, at.dilation, kernel, strict=True)
        return tuple(o - (i - 1) * s + 2 * p - d * (k - 1) - 1 for o, i, s, p, d, k in steps)

    def _weight_gradient(self, g: Tensor, y: Tensor) -> Tensor:
        """Gradient of the conv's weight for input y and output gradient g, which may have fewer channels."""
        conv, (_, stride, padding, dilation, _) = self.module, self.arranged
        assert not is_linear(conv)
        transposed, kernel = is_transposed(conv), per_axis(conv, "kernel_size")
        inputs, channels = conv.in_channels, g.shape[1]
        shape = (inputs, channels // conv.groups) if transposed else (channels, inputs // conv.groups)
        # only the shape of this weight is read
        weight = y.new_empty(()).expand(*shape, *kernel)
        output_padding = self._output_padding(g.shape[2:]) if transposed else [0] * len(kernel)
        result: Tensor = torch.ops.aten.convolution_backward(
            g, y, weight, None, stride, padding, dilation, transposed, output_padding, conv.groups,
            [False, True, False],
        )[1]  # fmt: skip
        return result


def _grid(sizes: Sequence[int], n: int, at_most: int | None, turn: int) -> tuple[slice, ...]:
    """Which positions of an output [n, C, *sizes] to look at, so that about at_most are looked at in all.

    Turns take all shifts of the grid once, in an order of which a few see borders and middle as often as all would:
    steps of about the golden section of their number, and prime to it.
    """
    ratio = 1.0 if at_most is None else n * math.prod(sizes) / at_most
    step = max(1, round(ratio ** (1 / max(len(sizes), 1))))
    steps = [max(1, min(step, size)) for size in sizes]
    shifts = math.prod(steps)
    jump = max(1, round(0.618 * shifts))
    while math.gcd(jump, shifts) > 1:
        jump += 1
    shift, grid = turn * jump % shifts, []
    for own in steps:
        shift, first = divmod(shift, own)
        grid.append(slice(first, None, own))
    return tuple(grid)


def _input_of(
    grid: tuple[slice, ...], out_size: Sequence[int], conv: Conv, y: Tensor, padding: Sequence[int]
) -> Tensor:
    """The part of the input, zero-padded where needed, whose patches at stride · step are those of the grid."""
    pads = []
    kernel, stride, dilation = (per_axis(conv, name) for name in ("kernel_size", "stride", "dilation"))
    for d, (g, out) in enumerate(zip(grid, out_size, strict=True)):
        first = g.start * stride[d] - padding[d]
        last = first + (out - 1) * stride[d] * g.step + dilation[d] * (kernel[d] - 1) + 1
        size = y.shape[2 + d]
        start, end = (min(max(i, 0), size) for i in (first, last))
        y = y.narrow(2 + d, start, end - start)
        # what lies outside on either side; all of it on one side where nothing lies inside
        before = min(last, 0) - min(first, 0)
        pads.append((before, last - first - (end - start) - before))
    return F.pad(y, [p for pair in reversed(pads) for p in pair]) if any(map(any, pads)) else y


def _apart(conv: Conv, stride: Sequence[int]) -> bool:
    """Whether patches at this stride share no input."""
    dilation, kernel = per_axis(conv, "dilation"), per_axis(conv, "kernel_size")
    return all(s >= d * (k - 1) + 1 for s, d, k in zip(stride, dilation, kernel, strict=True))


def _views(y: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The input patches as a view [N, C_in, out_1, ..., kernel_1, ...] of y."""
    for d, (k, s, dil) in enumerate(zip(kernel, stride, dilation, strict=True)):
        y = y.unfold(2 + d, dil * (k - 1) + 1, s)[..., ::dil]
    return y
