"""A conv or linear layer that trains as one with the norm behind it.

With the batch's own share left out until after the step, M and S of the carried window depend on θ alone, and with
s = γ / sqrt(S + eps)

    y = conv(p; s θ, β + s (b - M))

No pass over x, and nothing of the size of x is kept for the backward pass: the input of the conv is, and what comes
next keeps its own input. sθ is made again in the backward pass. Others train so with frozen statistics, as inductor's
efficient_conv_bn_eval does; here they follow, and the gradient goes through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..refusals import qconfig
from .activation import Activated
from .batch import Batch, RunningStatistics
from .carried import Carried, CarriedWindow
from .functional import FoldGradient, gradients
from .kernels import select
from .producers import Convolution, LinearMap, Producer, as_function, as_rows, of_rows

if TYPE_CHECKING:
    from .source import Source


@dataclass
class FoldedStep:
    """One step of a layer that trains folded.

    Args:
        module: the conv or linear layer.
        apply: what it computes of its weight, its bias and its input.
        window: the norm layer's.
        running: the norm layer's running statistics.
        eps: as in BatchNorm.
        iteration, recomputing, ranks: as in `Batch`.
        follows: whether the window is to follow the weights.
        made_of: how the module's input can be made again, so that it need not be kept.
        patches_of: the module's input before any padding; not kept behind the forward pass.
    """

    module: Producer
    apply: LinearMap | Convolution
    window: CarriedWindow
    running: RunningStatistics
    eps: float
    iteration: int
    recomputing: bool
    ranks: int
    follows: bool
    made_of: Activated | None = None
    patches_of: Tensor | None = None

    def rows(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """θ [C, F] and b in the dtype of statistics."""
        dtype = self.running.dtype
        return as_rows(weight, self.module).to(dtype), None if bias is None else bias.to(dtype)

    def begin(self, theta: Tensor, bias: Tensor | None, images: int) -> tuple[Carried, bool]:
        """The statistics of this step, and whether it is to look at its batch."""
        window = self.window
        if self.recomputing and window.last is not None:
            return window.last, window.last_looked
        carried = window.begin(self.running, *self._followed(theta, bias), images)
        window.last_folded = True
        return carried, window.is_due(self.iteration, self.follows)

    def _followed(self, theta: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (theta, bias) if self.follows else (None, None)

    def look(self, x: Tensor, theta: Tensor, bias: Tensor | None) -> Carried:
        """Takes in what the module made, x, and returns what the step is to normalise by."""
        window = self.window
        if self.recomputing and window.last is not None:
            return window.last
        if isinstance(self.apply, LinearMap):
            x = x.flatten(0, -2)
        return window.look(
            Batch(
                x,
                self.module,
                self.patches_of,
                *self._followed(theta, bias),
                iteration=self.iteration,
                recomputing=False,
                ranks=self.ranks,
            )
        )


class FoldedMap(torch.autograd.Function):
    """y = conv(p; s θ, β + s (b - M)), backpropagated through M and S to θ.

    forward(input, weight, bias, γ, β, step): the module's input, already padded unless by zeros; its parameters as they
    are stored; γ and β [C] or None; `FoldedStep`. With g' and g_b, the gradients of the folded weight and bias, and
    t = θ·g' + (b - M) g_b:

        ∂γ = t / sqrt(S + eps)      ∂β = g_b      g_M = -s g_b      g_S = -½ s t / (S + eps)
        ∂θ = s g' + g_M ∂M/∂θ + g_S ∂S/∂θ          ∂b = 0, since M follows b
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        step: FoldedStep,
    ) -> Tensor:
        """See the class."""
        theta, b = step.rows(weight, bias)
        carried, looks = step.begin(theta, b, len(input))
        x = None
        if looks:
            # what the conv gives under θ itself is looked at, then scaled where it stands
            x = step.apply(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
            carried = step.look(x, theta, b)
        if not step.recomputing:
            step.window.write(step.running)
        scale, shift = _affine(carried, gamma, beta, step.eps)
        if x is None:
            if b is not None:
                shift = shift + scale * b
            folded = of_rows(theta * scale[:, None], step.module).to(input.dtype)
            y = step.apply(input, folded, shift.to(input.dtype))
        else:
            y = step.apply.scaled(x, scale, shift)
        kept = input if step.made_of is None else step.made_of.input
        ctx.save_for_backward(kept, weight, bias, gamma, beta, *carried)
        step.patches_of = None
        ctx.step = step
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class; with create_graph, by the formulas that have derivatives of their own."""
        (g,) = grads
        input, weight, bias, gamma, beta, *saved = ctx.saved_tensors
        step, carried = cast(FoldedStep, ctx.step), Carried(*saved)
        if step.made_of is not None:
            _, input = as_function(step.module, step.made_of._replace(input=input).again())
        if torch.is_grad_enabled():
            return (*gradients(plainly_folded, (input, weight, bias, gamma, beta), g, carried, step), None)
        theta, b = step.rows(weight, bias)
        inv_std = torch.rsqrt(carried.var + step.eps)
        scale = inv_std if gamma is None else gamma.to(inv_std.dtype) * inv_std
        folded = of_rows(theta * scale[:, None], step.module).to(input.dtype)
        g_input, g_folded = step.apply.gradients(g, input, folded, ctx.needs_input_grad[0])
        g_shift = step.apply.bias_gradient(g, scale.dtype)
        g_rows = as_rows(g_folded, step.module).to(scale.dtype)
        through = step.window.window.gradient == "full" and carried.patch_mean is not None
        away = -carried.mean if b is None else b - carried.mean
        slopes = (*carried.slopes, carried.patch_mean, carried.patch_var) if through else (away, away)  # of no use
        fold = FoldGradient(scale, inv_std, away, g_shift, *slopes)
        t, g_theta = select(theta).folded_gradient(theta, g_rows, fold)
        g_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            g_bias = torch.zeros_like(bias) if through else (scale * g_shift).to(bias.dtype)
        return (
            g_input,
            of_rows(g_theta, step.module).to(weight.dtype) if ctx.needs_input_grad[1] else None,
            g_bias,
            None if gamma is None else (t * inv_std).to(gamma.dtype),
            None if beta is None else g_shift.to(beta.dtype),
            None,
        )


def _affine(carried: Carried, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """s and β - s M [C]."""
    scale = torch.rsqrt(carried.var + eps)
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    shift = -scale * carried.mean
    return scale, shift if beta is None else shift + beta.to(scale.dtype)


def plainly_folded(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    carried: Carried,
    step: FoldedStep,
) -> Tensor:
    """The function that `FoldedMap` computes, in operations that can be differentiated as often as one likes."""
    theta, b = step.rows(weight, bias)
    if step.window.window.gradient == "full" and carried.patch_mean is not None:
        carried = carried.moved(theta, b)
    scale, shift = _affine(carried, gamma, beta, step.eps)
    if b is not None:
        shift = shift + scale * b
    folded = of_rows(theta * scale[:, None], step.module)
    return step.apply(input, folded.to(input.dtype), shift.to(input.dtype))


class FoldingMixin(nn.Module):
    """Makes of the conv or linear class behind it one that applies the norm that follows, in training."""

    folded_class: type[nn.Module]
    qconfig = qconfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class does, and normalised where `Source.folds` says so."""
        # the class is given back where the norm is gone
        plain, source = self.folded_class, cast("Source | None", self.__dict__.get("folds_into"))
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
