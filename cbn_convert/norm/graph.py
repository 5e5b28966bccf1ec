"""A step of a layer that trains folded, as torch.compile sees it: an operator forward, and one backward.

What a step counts, remembers and looks at is Python, which would break a graph, or compile it anew in every step. It
runs behind the operator `cbn_convert::step`, which answers with s and β + s (b - M), and with the statistics of which
`cbn_convert::folded_gradient` makes the gradient: the kernels' passes over the weights, as in eager training. The
scaled weight is made in the graph, which can make it again in the backward pass instead of keeping it.
"""

from __future__ import annotations

from inspect import signature
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..modes import what_lasts_may_be_made
from ..refusals import refuse_capture, refuse_export
from .carried import Carried, CarriedWindow
from .distributed import world_size
from .folded import FoldedParameters, FoldedStep, folded_map_gradients, scales_output
from .functional import OptTensor, patch_shapes, per_channel, statistics_dtype
from .kernels import select
from .producers import (
    Convolution,
    LinearMap,
    Producer,
    as_function,
    as_rows,
    channels_last,
    groups_of,
    is_linear,
    is_transposed,
    of_rows,
)

if TYPE_CHECKING:
    from .source import Source

_numbers = count()
_sources: WeakValueDictionary[int, Source] = WeakValueDictionary()


def _tags(*names: str) -> dict[str, Any]:
    """Those of an operator, as keywords, where torch knows them; 2.6 takes none."""
    known = "tags" in signature(torch.library.custom_op).parameters
    return {"tags": [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]} if known else {}


def numbered(source: Source) -> int:
    """A number for a source, which a graph can hold."""
    number = next(_numbers)
    _sources[number] = source
    return number


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_fold(number: int) -> bool:
    """Whether the layer trains folded, decided where a graph is made; see `refuse_export` for one that must not be."""
    refuse_export()
    return _sources[number].can_fold()


@torch.library.custom_op(
    "cbn_convert::step",
    mutates_args=("batches",),
    schema="(int number, Tensor(a!)? batches, Tensor input, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "int[]? output_size, bool learned) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # a graph of CUDA's would repeat what its one recorded step did; the input in any order, else inductor copies it
    **_tags("cudagraph_unsafe", "flexible_layout"),
)
def step(
    number: int, batches: OptTensor, input: Tensor, weight: Tensor, bias: OptTensor, gamma: OptTensor, beta: OptTensor,
    output_size: list[int] | None, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts a step; returns s, β + s (b - M) and its `Carried`.

    Patches are zeros where none are known yet, and something of one element where the weights are not learned.
    """
    refuse_capture(input)
    source = _sources.get(number)
    with what_lasts_may_be_made():
        if source is None or not source.can_fold():
            raise RuntimeError(
                "the model was converted, reverted, given hooks or other statistics since it was compiled; call "
                "torch.compiler.reset() and compile it again"
            )
        norm, tap, window = source.norm, source.tap, source.state
        assert tap is not None
        assert isinstance(window, CarriedWindow)
        counts = window.last is None or not norm.is_recomputing
        if counts:
            tap.check_arrivals()
            tap.watch()
        dtype = statistics_dtype(weight)
        running = source.running(dtype)
        assert running is not None, "a carried window has some"
        apply, padded = as_function(tap.module, input, output_size)
        one = _GraphStep(
            norm.eps, dtype, 0 if is_transposed(tap.module) else channels_last(weight), tap.module, apply, window,
            running, norm.iteration, not counts, world_size() if norm.window.sync else 1, tap.followed, None, input,
        )  # fmt: skip
        folded = one.begin(padded, weight, bias, gamma, beta)
        state = folded.state
        if one.looks and counts:
            x = apply.output(padded, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
            state = one.look(x, weight, bias)
            window.write(running)
        if counts:
            norm.took_step()
    if counts and batches is not None:
        batches.add_(1)
    if learned and state.patch_mean is None:  # no batch yet whose patches are finite
        rows = as_rows(weight, tap.module).to(dtype)
        unknown = [rows.new_zeros(shape) for shape in patch_shapes(groups_of(tap.module), rows.shape[1])]
        b = None if bias is None else bias.to(dtype)
        state = Carried(state.table, *unknown).placed(state.mean, state.var, rows, b)
    elif not learned:  # although they may be followed
        state = Carried(state.table[:2])
    # copies, since a graph may use what it gets as memory
    table, mean, rest, axes = [state.table.new_zeros(1) if t is None else t.clone() for t in state]
    return folded.scale.clone(), folded.shift.clone(), table, mean, rest, axes


class _GraphStep(FoldedStep):
    """The scaled weight is made in the graph."""

    applies_scaled_weight = False


@step.register_fake
def _(
    number: int, batches: OptTensor, input: Tensor, weight: Tensor, bias: OptTensor, gamma: OptTensor, beta: OptTensor,
    output_size: list[int] | None, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tap = _sources[number].tap
    assert tap is not None
    theta, dtype = as_rows(weight, tap.module), statistics_dtype(weight)
    patches = patch_shapes(groups_of(tap.module), theta.shape[1]) if learned else ((1,),) * 3
    channels = len(theta)
    shapes = ((channels,), (channels,), (5 if learned else 2, channels), *patches)
    scale, shift, table, mean, rest, axes = [weight.new_empty(shape, dtype=dtype) for shape in shapes]
    return scale, shift, table, mean, rest, axes


@torch.library.custom_op(
    "cbn_convert::folded_gradient",
    mutates_args=(),
    schema="(Tensor weight, Tensor? bias, Tensor? gamma, float eps, Tensor table, Tensor? patch_mean, "
    "Tensor? patch_rest, Tensor? patch_axes, Tensor g, Tensor g_shift) -> (Tensor, Tensor)",
    **_tags("flexible_layout"),  # weight and g in any order: what comes back has that of the weight
)
def folded_gradient(
    weight: Tensor, bias: OptTensor, gamma: OptTensor, eps: float, table: Tensor, patch_mean: OptTensor,
    patch_rest: OptTensor, patch_axes: OptTensor, g: Tensor, g_shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the weight [C, ...] and of γ from g, that of the scaled weight, and that of the shift."""
    own = FoldedParameters(eps, table.dtype, channels_last(weight))
    (theta, b), affine = own.rows(weight, bias), own.affine(gamma, None)
    rows = torch.empty_like(theta).copy_(own.as_rows(g))  # the kernel writes to them
    state = own.ordered(Carried(table, patch_mean, patch_rest, patch_axes))
    found, g_gamma = select(theta).folded_gradient(state, theta, b, affine, rows, g_shift.contiguous())
    g_weight, like = own.of_rows(found).to(weight.dtype), torch.empty_like(weight)
    if g_weight.stride() != like.stride():
        g_weight = like.copy_(g_weight)
    return g_weight, g_gamma.to(table.dtype if gamma is None else gamma.dtype)


@folded_gradient.register_fake
def _(
    weight: Tensor, bias: OptTensor, gamma: OptTensor, eps: float, table: Tensor, patch_mean: OptTensor,
    patch_rest: OptTensor, patch_axes: OptTensor, g: Tensor, g_shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(weight), torch.empty_like(g_shift if gamma is None else gamma)


def scaled(weight: Tensor, scale: Tensor, module: Producer) -> Tensor:
    """s θ in the shape of the module's weight, and in the dtype of s [C]."""
    if is_transposed(module):
        factor = scale.view(module.groups, 1, -1).expand(-1, len(weight) // module.groups, -1).flatten(0, 1)
        factor = factor[(..., *[None] * (weight.dim() - 2))]
    else:
        factor = per_channel(scale, weight)
    return weight.to(scale.dtype) * factor


class FoldedInGraph(torch.autograd.Function):
    """`FoldedMap` in a graph, of what `step` answered.

    forward(input, weight, bias, γ, β, s, shift, *state, eps, module, apply): as there; `Carried` without its patches
    where M and S are to be fixed. It has no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: OptTensor, gamma: OptTensor, beta: OptTensor, scale: Tensor,
        shift: Tensor, table: Tensor, patch_mean: OptTensor, patch_rest: OptTensor, patch_axes: OptTensor, eps: float,
        module: Producer, apply: LinearMap | Convolution,
    ) -> Tensor:  # fmt: skip
        """See the class."""
        ctx.save_for_backward(input, weight, bias, gamma, beta, scale, table, patch_mean, patch_rest, patch_axes)
        ctx.eps, ctx.module, ctx.apply = eps, module, apply
        ctx.scales_output = scales_output(apply, input, as_rows(weight, module).to(scale.dtype))
        if ctx.scales_output:
            y, axis = apply.output(input, weight, None), input.dim() - 1 if is_linear(module) else 1
            return y * per_channel(scale, y, axis) + per_channel(shift, y, axis)
        return apply.output(input, scaled(weight, scale, module).to(input.dtype), shift.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[OptTensor, ...]:
        """See the class."""
        (g,) = grads
        input, weight, bias, gamma, beta, scale, *state = ctx.saved_tensors
        applied = None if ctx.scales_output else scaled(weight, scale, ctx.module).to(input.dtype)
        at = (ctx.apply, input, weight, applied, scale)
        g_input, g_folded, g_shift = folded_map_gradients(g, *at, ctx.needs_input_grad[0])
        transposed = is_transposed(ctx.module)
        theta, g_rows = [as_rows(t, ctx.module) if transposed else t for t in (weight, g_folded)]
        g_theta, g_gamma = folded_gradient(theta, bias, gamma, ctx.eps, *state, g_rows, g_shift)
        g_weight = of_rows(g_theta, ctx.module) if transposed else g_theta
        g_bias = None
        if bias is not None:
            g_bias = (scale * g_shift).to(bias.dtype) if state[1] is None else torch.zeros_like(bias)
        g_beta = None if beta is None else g_shift.to(beta.dtype)
        return (g_input, g_weight, g_bias, None if gamma is None else g_gamma, g_beta, *[None] * 9)
