"""A step of a layer that trains folded, as torch.compile sees it: one operator, then formulas.

What a step counts, remembers and looks at is Python, which would break a graph, or compile it anew in every step. It
runs behind the operator `cbn_convert::step`, which answers with the statistics at the weights of the step; what
normalises by them is in the graph, and so is its gradient.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..modes import what_lasts_may_be_made
from ..refusals import refuse_capture, refuse_export
from .batch import Batch
from .carried import Carried, CarriedWindow
from .distributed import world_size
from .functional import OptTensor, patch_shapes, statistics_dtype
from .producers import as_function, as_rows, groups_of, is_linear

if TYPE_CHECKING:
    from .source import Source

_numbers = count()
_sources: WeakValueDictionary[int, Source] = WeakValueDictionary()
# a graph of CUDA's would repeat what its one recorded step did
_UNSAFE = [getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)]


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
    schema="(int number, Tensor(a!)? batches, Tensor input, Tensor weight, Tensor? bias, int[]? output_size) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_UNSAFE,
)
def step(
    number: int, batches: OptTensor, input: Tensor, weight: Tensor, bias: OptTensor, output_size: list[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts a step; returns its `Carried`, with something in the place of patches where weights are not followed."""
    refuse_capture(input)
    source = _sources.get(number)
    with what_lasts_may_be_made():
        if source is None or not source.can_fold():
            raise RuntimeError(
                "the model was converted, reverted, given hooks or other statistics since it was compiled; call "
                "torch.compiler.reset() and compile it again"
            )
        assert source.tap is not None
        assert isinstance(source.state, CarriedWindow)
        state = source.state.last
        counts = state is None or not source.norm.is_recomputing
        if state is None or counts:
            source.tap.check_arrivals()
            state = _advanced(source, input, weight, bias, output_size)
    if counts and batches is not None:
        batches.add_(1)
    if source.tap.followed and state.patch_mean is None:  # no batch yet whose patches are finite
        rows = as_rows(weight, source.tap.module).to(state.table.dtype)
        unknown = [rows.new_zeros(shape) for shape in patch_shapes(groups_of(source.tap.module), rows.shape[1])]
        b = None if bias is None else bias.to(rows.dtype)
        state = Carried(state.table, *unknown).placed(state.mean, state.var, rows, b)
    # copies, since a graph may use what it gets as memory
    table, mean, rest, axes = [state.table.new_zeros(1) if t is None else t.clone() for t in state]
    return table, mean, rest, axes


def _advanced(source: Any, input: Tensor, weight: Tensor, bias: OptTensor, output_size: list[int] | None) -> Carried:
    """The statistics at the weights, after a step has been taken; its running statistics are written."""
    norm, window, module, dtype = source.norm, source.state, source.tap.module, statistics_dtype(weight)
    theta: OptTensor = as_rows(weight, module).to(dtype)
    b = None if bias is None else bias.to(dtype)
    if not source.tap.followed:
        theta = b = None

    def batch() -> Batch:
        apply, padded = as_function(module, input, output_size)
        x = apply(padded, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        x = x.flatten(0, -2) if is_linear(module) else x
        return Batch(x, module, input, theta, b, norm.iteration, False, world_size() if norm.window.sync else 1)

    state: Carried = window.advance(source.running(dtype), theta, b, norm.iteration, len(input), batch)
    window.last_folded = True
    norm.took_step()
    return state


@step.register_fake
def _(
    number: int, batches: OptTensor, input: Tensor, weight: Tensor, bias: OptTensor, output_size: list[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tap = _sources[number].tap
    assert tap is not None
    theta, dtype = as_rows(weight, tap.module), statistics_dtype(weight)
    patches = patch_shapes(groups_of(tap.module), theta.shape[1]) if tap.followed else ((1,),) * 3
    shapes = ((5 if tap.followed else 2, len(theta)), *patches)
    table, mean, rest, axes = [weight.new_empty(shape, dtype=dtype) for shape in shapes]
    return table, mean, rest, axes
