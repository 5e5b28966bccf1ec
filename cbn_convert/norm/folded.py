"""A conv or linear layer that trains as one with the norm behind it.

With the batch's own share left out until after the step, M and S of the carried window depend on θ alone, and with
s = γ / sqrt(S + eps)

    y = conv(p; s θ, β + s (b - M))

No pass over x, and nothing of the size of x is kept for the backward pass: the input of the conv is, and what comes
next keeps its own input. sθ is made again in the backward pass. Where x is smaller than θ, and where it is looked at, s
is multiplied into it instead, in place. Others train so with frozen statistics, as inductor's
efficient_conv_bn_eval does; here they follow, and the gradient goes through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..refusals import qconfig
from .batch import Batch, Pass, RunningStatistics
from .carried import Carried, CarriedWindow
from .functional import Affine, OptTensor, cast, gradients, per_channel
from .kernels import KERNELS, Folded, select
from .producers import Convolution, LinearMap, Producer, as_function, as_rows, is_transposed, of_rows

if TYPE_CHECKING:
    from .source import Source

FEW_WEIGHTS = 2**16  # a pass over which costs less than one more call


@dataclass
class FoldedParameters:
    """The parameters of a conv or linear layer and of the norm behind it, as the kernels take them.

    Args:
        eps: as in BatchNorm.
        dtype: that of statistics.
        last: how many input channels of the weight lie last in memory; 0 where they lie first.
    """

    eps: float
    dtype: torch.dtype
    last: int

    def rows(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """θ [C, ...] and b in the dtype of statistics, laid out as the kernels need them."""
        rows = self._vector(self.as_rows(weight))
        assert rows is not None
        return rows, self._vector(bias)

    def as_rows(self, weight: Tensor) -> Tensor:
        """A weight [C, ...], its input channels where they lie in memory."""
        return weight.movedim(1, -1) if self.last else weight

    def of_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `as_rows`."""
        return rows.movedim(-1, 1) if self.last else rows

    def ordered(self, state: Carried) -> Carried:
        """The patches in the order of the weight in memory; windows keep them with input channels first."""
        if not self.last or state.patch_mean is None:
            return state
        patches = [None if t is None else t.unflatten(-1, (self.last, -1)).mT.flatten(-2) for t in state[1:]]
        return Carried(state.table, *patches)

    def affine(self, gamma: Tensor | None, beta: Tensor | None) -> Affine:
        """γ and β likewise."""
        return Affine(self._vector(gamma), self._vector(beta), self.eps)

    def _vector(self, t: Tensor | None) -> Tensor | None:
        if t is None or (t.dtype == self.dtype and t.is_contiguous()):
            return t
        return t.to(self.dtype).contiguous()


@dataclass
class FoldedStep(FoldedParameters, Pass):
    """One step of a layer that trains folded.

    Args:
        module: the conv or linear layer.
        apply: what the module computes of its weight, its bias and its input.
        window: the norm layer's.
        running: the norm layer's running statistics.
        iteration, recomputing, ranks: as in `Batch`.
        follows: whether the window is to follow the weights.
        made_of: what the module's input can be made of again, and by which activation; not kept by the step either.
        patches_of: the module's input before any padding; not kept behind the forward pass.
    """

    module: Producer
    apply: LinearMap | Convolution
    window: CarriedWindow
    running: RunningStatistics
    iteration: int
    recomputing: bool
    ranks: int
    follows: bool
    made_of: tuple[Tensor, str] | None = None
    patches_of: Tensor | None = None
    scales_output: bool = field(default=False, init=False)  # whether the output is scaled, being the smaller one

    def as_rows(self, weight: Tensor) -> Tensor:
        """As `FoldedParameters`, of the weight as it is stored; a transposed conv's has input channels first."""
        return as_rows(weight, self.module) if is_transposed(self.module) else super().as_rows(weight)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `as_rows`."""
        return of_rows(rows, self.module) if is_transposed(self.module) else super().of_rows(rows)

    @property
    def applies_scaled_weight(self) -> bool:
        """Whether it is sθ that is applied, and not θ."""
        return not (self.looks or self.scales_output)

    def begin(self, input: Tensor, weight: Tensor, bias: OptTensor, gamma: OptTensor, beta: OptTensor) -> Folded:
        """The norm layer as a part of this one, at the weights; with sθ where that is what is applied.

        Args:
            input, weight, bias, gamma, beta: as in `FoldedMap`.
        """
        (theta, b), affine = self.rows(weight, bias), self.affine(gamma, beta)
        window, kernels = self.window, select(theta)
        self.scales_output = scales_output(self.apply, input, theta)
        if self.recomputing and window.last is not None:
            self.looks = window.last_looked
            folded = kernels.fold(self.ordered(window.last), theta, b, affine, with_weight=self.applies_scaled_weight)
            return folded._replace(state=window.last)
        followed: tuple[OptTensor, OptTensor] = (theta, b) if self.follows else (None, None)
        if self.last and self.running.changed:  # else it matters only whether there is one
            followed = self.followed(weight, bias)
        known = window.begin(self.running, *followed, len(input))
        self.looks = window.is_due(self.running, self.iteration, self.follows)
        written = None if self.looks or window.window.is_fixed else self.running
        folded = kernels.fold(self.ordered(known), theta, b, affine, written, self.applies_scaled_weight)
        if self.last:
            folded = folded._replace(state=known._replace(table=folded.state.table))
        window.arrive(folded.state, folded=True)
        return folded

    def followed(self, weight: Tensor, bias: OptTensor) -> tuple[OptTensor, OptTensor]:
        """θ and b as the window knows them; None where it follows neither."""
        return (self._vector(as_rows(weight, self.module)), self._vector(bias)) if self.follows else (None, None)

    def look(self, x: Tensor, weight: Tensor, bias: OptTensor) -> Carried:
        """Takes in what the module made, x, and returns what the step is to normalise by."""
        window = self.window
        if self.recomputing and window.last is not None:
            return window.last
        if isinstance(self.apply, LinearMap):
            x = x.flatten(0, -2)
        followed = self.followed(weight, bias)
        return window.look(Batch(x, self.module, self.patches_of, *followed, self.iteration, False, self.ranks))


def scales_output(apply: LinearMap | Convolution, input: Tensor, theta: Tensor) -> bool:
    """Whether s is to be multiplied into what the module makes of its input, which is smaller than θ [C, ...]."""
    size = theta.numel()
    # not in half precision, of which θ·p without s may leave the range
    large = size > FEW_WEIGHTS and input.dtype == theta.dtype
    return large and 2 * apply.positions(input) <= size // len(theta)


class FoldedMap(torch.autograd.Function):
    """y = conv(p; s θ, β + s (b - M)), backpropagated through M and S to θ.

    forward(input, weight, bias, γ, β, step): the module's input, already padded unless by zeros; its parameters as they
    are stored; γ and β [C] or None; `FoldedStep`. With g' and g_b, the gradients of the folded weight and bias, and
    t = θ·g' + (b - M) g_b (where the output was scaled, g' is the gradient that θ alone would have of g):

        ∂γ = t / sqrt(S + eps)      ∂β = g_b      g_M = -s g_b      g_S = -½ s t / (S + eps)
        ∂θ = s g' + g_M ∂M/∂θ + g_S ∂S/∂θ          ∂b = 0, since M follows b
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: OptTensor, gamma: OptTensor, beta: OptTensor, step: FoldedStep
    ) -> Tensor:
        """See the class."""
        folded, dtype = step.begin(input, weight, bias, gamma, beta), input.dtype
        if folded.weight is not None:
            y = step.apply.output(input, cast(step.of_rows(folded.weight), dtype), cast(folded.shift, dtype))
        else:
            # what the conv gives under θ itself is looked at, if need be, then scaled where it stands
            seen = bias if step.looks else None  # else it is a part of the shift
            y = step.apply.output(input, cast(weight, dtype), None if seen is None else cast(seen, dtype))
            if step.looks:
                folded = folded._replace(state=step.look(y, weight, bias))  # known only now how statistics respond
                if not step.recomputing:
                    step.window.write(step.running)
            shift = folded.shift if seen is None else folded.shift - folded.scale * seen.to(step.dtype)
            select(y, in_any_order=True).scale(step.apply.by_channel(y), folded.scale, shift)
        kept, ctx.activation = (input, "") if step.made_of is None else step.made_of
        ctx.save_for_backward(kept, weight, bias, gamma, beta, folded.scale, *folded.state)
        step.made_of = step.patches_of = None
        ctx.step = step
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class; with create_graph, by the formulas that have derivatives of their own."""
        (g,) = grads
        input, weight, bias, gamma, beta, scale, *saved = ctx.saved_tensors
        step: FoldedStep = ctx.step
        state = Carried(*saved)
        if step.window.window.gradient != "full":
            state = Carried(state.table)
        if ctx.activation:
            _, input = as_function(step.module, getattr(F, ctx.activation)(input))
        step.ends()
        if torch.is_grad_enabled():
            return (*gradients(plainly_folded, (input, weight, bias, gamma, beta), g, state, step), None)
        theta, b = step.rows(weight, bias)
        scaled = None if step.scales_output else cast(step.of_rows(theta * per_channel(scale, theta)), input.dtype)
        at = (step.apply, input, weight, scaled, scale)
        g_input, g_folded, g_shift = folded_map_gradients(g, *at, ctx.needs_input_grad[0])
        (g_rows, _), affine = step.rows(g_folded, None), step.affine(gamma, None)
        g_theta, g_gamma = select(theta).folded_gradient(step.ordered(state), theta, b, affine, g_rows, g_shift)
        g_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            g_bias = (scale * g_shift).to(bias.dtype) if state.patch_mean is None else torch.zeros_like(bias)
        return (
            g_input,
            cast(step.of_rows(g_theta), weight.dtype) if ctx.needs_input_grad[1] else None,
            g_bias,
            None if gamma is None else cast(g_gamma, gamma.dtype),
            None if beta is None else cast(g_shift, beta.dtype),
            None,
        )


def folded_map_gradients(
    g: Tensor,
    apply: LinearMap | Convolution,
    input: Tensor,
    weight: Tensor,
    scaled: Tensor | None,
    scale: Tensor,
    of_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """∂L/∂input (if wanted), and the gradients of the folded weight and bias as `FoldedMap` has them.

    Args:
        g: the gradient of the output.
        apply, input, weight: as in `FoldedStep` and `FoldedMap`.
        scaled: s θ as it was applied; None where the output was scaled.
        scale: s [C].
        of_input: whether ∂L/∂input is wanted.
    """
    if scaled is not None:
        return apply.gradients(g, input, scaled, of_input, scale.dtype)
    applied = cast(weight, input.dtype)
    g_input = apply.input_gradient(g, input, applied, cast(scale, g.dtype)) if of_input else None
    return g_input, *apply.gradients(g, input, applied, False, scale.dtype)[1:]


def plainly_folded(
    input: Tensor,
    weight: Tensor,
    bias: OptTensor,
    gamma: OptTensor,
    beta: OptTensor,
    state: Carried,
    step: FoldedStep,
) -> Tensor:
    """The function that `FoldedMap` computes, in operations that can be differentiated as often as one likes.

    Args:
        input, weight, bias, gamma, beta: as in `FoldedMap`.
        state: as in `Kernels.fold`.
        step: the layer's.
    """
    folded = KERNELS["plain"].fold(step.ordered(state), *step.rows(weight, bias), step.affine(gamma, beta))
    assert folded.weight is not None
    return step.apply.output(input, step.of_rows(folded.weight).to(input.dtype), folded.shift.to(input.dtype))


class FoldingMixin(nn.Module):
    """Makes of the conv or linear class behind it one that applies the norm that follows, in training."""

    folded_class: type[nn.Module]
    qconfig = qconfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class does, and normalised where `Source.folds` says so."""
        # the class is given back where the norm is gone
        plain = self.folded_class
        source: Source | None = self.__dict__.get("folds_into")
        given = [*args, *kwargs.values()]
        if source is not None:
            if source.folds(self, given[0]):
                return source.folded(self, *given)
            source.passes_by()
        return plain.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not _FOLDING[self.folded_class]:  # parametrised since
            return super().__reduce_ex__(protocol)
        return _new_folding, (self.folded_class,), dict(self.__dict__)


_FOLDING: dict[type[nn.Module], type[FoldingMixin]] = {}


def _folding_class(cls: type[nn.Module]) -> type[FoldingMixin]:
    if cls not in _FOLDING:
        # tools that look at where a class comes from, as torch.fx does, find what they know
        names = {"folded_class": cls, "__module__": cls.__module__}
        _FOLDING[cls] = type(f"Folded{cls.__name__}", (FoldingMixin, cls), names)
    return _FOLDING[cls]


def _new_folding(cls: type[nn.Module]) -> nn.Module:
    made = _folding_class(cls)
    return made.__new__(made)


def begin_folding(module: nn.Module, source: Source) -> None:
    """Lets a conv or linear layer train folded into what `source` belongs to, by a change of its class, in place."""
    if not isinstance(module, FoldingMixin):
        module.__class__ = _folding_class(type(module))
    module.__dict__["folds_into"] = source


def end_folding(module: nn.Module) -> None:
    """Makes the module of the class that it was."""
    module.__dict__.pop("folds_into", None)
    if type(module) is _FOLDING.get(getattr(module, "folded_class", nn.Module)):
        module.__class__ = module.folded_class  # type: ignore[assignment]
