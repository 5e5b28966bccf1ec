"""Which modules compute x = θ·p + b over patches p of their input, and what their θ and b are at this moment.

θ is the weight that the module applies: standardised, parametrised or as stored. It is rebuilt here with autograd, so
that a gradient for θ reaches the parameters behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import TypeIs

from ..modes import modes_kept

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Producer = Conv | TransposedConv | nn.Linear

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
_STANDARDISED = (StdConv2d, StdConv2dSame, *_SCALED)
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, TimmLinear, Conv2dSame, *_TRANSPOSED, *_STANDARDISED)
# Compute as nn.Linear does, but are no subclasses of it.
_LINEAR_BY_NAME = ("torch_geometric.nn.dense.linear.Linear",)
_linear: dict[type[nn.Module], bool] = {}
# What a call of these classes goes through: a subclass, or an instance, with one of these of its own may compute
# anything.
_FORWARD = (
    "forward", "_conv_forward", "_output_padding", "_call_impl", "_wrapped_call_impl", "__call__", "weight", "bias",
    "__getattr__", "__getattribute__",
)  # fmt: skip


def is_producer(module: nn.Module) -> TypeIs[Producer]:
    """Whether the module's output is θ·p + b in a way known here.

    It is for the classes in `_KINDS` and for those subclasses that compute as they do, but not for subclasses and
    instances with a forward pass of their own.
    """
    own = plain_class(module)
    kind = next((cls for cls in own.__mro__ if cls in _KINDS or _name(cls) in _LINEAR_BY_NAME), None)
    if kind is None or not module.__dict__.keys().isdisjoint(_FORWARD[:3]):
        return False
    return all(getattr(own, name, None) is getattr(kind, name, None) for name in _FORWARD)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a layer had before it was parametrised, or trained folded."""
    own = type_before_parametrizations(module)
    return cast(type[nn.Module], getattr(own, "folded_class", own))


def _name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_linear(module: nn.Module) -> TypeIs[nn.Linear]:
    """Whether the module is a linear layer, of torch or another library."""
    if isinstance(module, nn.Linear):
        return True
    cls = type(module)
    if cls not in _linear:  # a cache of functools would be no part of a compiled graph
        _linear[cls] = any(_name(base) in _LINEAR_BY_NAME for base in cls.__mro__)
    return _linear[cls]


def own_forward(module: nn.Module) -> str | None:
    """The class of a conv or linear layer that computes in a way of its own; None for all other modules."""
    own = (isinstance(module, _KINDS) or is_linear(module)) and not is_producer(module)
    return plain_class(module).__name__ if own else None


def is_conv(module: nn.Module) -> bool:
    """Whether the module is a convolution of any class, transposed or not, whatever its forward pass does."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED))


def is_transposed(module: nn.Module) -> TypeIs[TransposedConv]:
    """Whether the module is a transposed convolution."""
    return isinstance(module, _TRANSPOSED)


def applies_stored_weight(module: nn.Module) -> bool:
    """Whether the module applies its weight as it is stored, so that a factor can be multiplied into it."""
    # tensors that hooks compute, as in prune and the older weight_norm, are no parameters
    stored = {"weight", "bias"} <= module._parameters.keys()
    return is_producer(module) and not isinstance(module, _STANDARDISED) and stored


def groups_of(module: Producer) -> int:
    """The number of groups, 1 for a linear layer."""
    return 1 if is_linear(module) else module.groups


def out_channels(module: Producer) -> int:
    """The number of channels that a norm layer behind the module sees."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


class OutputChannels(NamedTuple):
    """Output channels of a producer: `channels` of them from `first` on."""

    module: Producer
    first: int
    channels: int

    @property
    def whole(self) -> bool:
        """Whether these are all."""
        return self.channels == out_channels(self.module)


def per_axis(conv: nn.Module, name: str) -> tuple[int, ...]:
    """A conv's kernel_size, stride, padding or dilation, with a number for each spatial axis.

    torch's functions take one for all as well, which whoever sets the attribute after the constructor may leave there.
    """
    value: Any = getattr(conv, name)
    return (value,) * (cast(Tensor, conv.weight).dim() - 2) if isinstance(value, int) else tuple(value)


def fan_in(module: Producer) -> int:
    """F, the number of weights per output channel."""
    if isinstance(module, nn.Linear):
        return module.in_features
    inputs: int = module.in_channels // groups_of(module)
    return inputs if is_linear(module) else inputs * math.prod(per_axis(module, "kernel_size"))


def learns(module: nn.Module) -> bool:
    """Whether θ or b may change; where they do not, past statistics need no compensation."""
    own = any(p is not None and p.requires_grad for p in module._parameters.values())
    if "weight" not in module._parameters:  # views of one flat parameter, or what another network made
        own = own or any(t.requires_grad for t in map(module.__dict__.get, ("weight", "bias")) if isinstance(t, Tensor))
    return own or any(learns(child) for child in module._modules.values() if child is not None)


def is_at_hand(module: Producer) -> bool:
    """Whether its weight can be read between two steps, as not where it is a part of one, spread over processes."""
    weight = module.weight
    return not (is_traceable_wrapper_subclass(weight) or weight.is_meta) and weight.untyped_storage().nbytes() > 0


def as_rows(weight: Tensor, module: Producer) -> Tensor:
    """Views a weight of the module's shape as [C, F]; F runs over input channels first, then kernel positions."""
    if is_transposed(module):
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def channels_last(weight: Tensor) -> int:
    """How many input channels of a conv's weight, not transposed, lie last in memory; 0 where they lie first."""
    if weight.is_contiguous() or weight.dim() not in (4, 5):
        return 0
    order = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.shape[1] if weight.is_contiguous(memory_format=order) else 0


def theta_and_bias(module: Producer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(θ [C, F], b [C] or None) that the module applies now, in dtype, connected to its parameters by autograd."""
    with _without_side_effects(module) if is_parametrized(module) else nullcontext():
        weight, bias = module.weight, module.bias
    if isinstance(module, _STANDARDISED):
        gain = (module.gain * module.scale).flatten() if isinstance(module, _SCALED) else None
        rows = weight.reshape(1, module.out_channels, -1)
        weight = F.batch_norm(rows, None, None, gain, None, True, 0.0, module.eps).reshape_as(weight)
    return as_rows(weight, module).to(dtype), None if bias is None else bias.to(dtype)


@contextmanager
def _without_side_effects(module: nn.Module) -> Iterator[None]:
    """Lets parametrisations such as spectral_norm answer with what the last forward pass used."""
    parametrizations: Any = module.parametrizations
    with modes_kept(parametrizations):
        parametrizations.eval()
        yield


def padded_input(conv: Conv, y: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the zero padding still to be applied to it, after any padding that is not symmetric zeros."""
    kernel = per_axis(conv, "kernel_size")
    none = (0,) * len(kernel)
    # other classes may have an attribute of that name too
    if isinstance(conv, Conv2dSame) or (isinstance(conv, _STANDARDISED) and getattr(conv, "same_pad", False)):
        return pad_same(y, list(kernel), list(per_axis(conv, "stride")), list(per_axis(conv, "dilation"))), none
    if conv.padding_mode != "zeros":
        return F.pad(y, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), none
    if isinstance(conv.padding, str):
        return F.pad(y, conv._reversed_padding_repeated_twice), none
    return y, per_axis(conv, "padding")


MOST_SUMMED = 2**11  # values for which the operator's sum is the faster one; it is as exact as it need be, too
_convolution_backward = torch.ops.aten.convolution_backward.default
_Gradients = tuple[Tensor | None, Tensor, Tensor]


class LinearMap:
    """x = W·y + b as a function of the weight that is applied, with its gradients; for linear layers and PyG's."""

    def output(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies a weight of the layer's shape and a bias [C] to the last axis of y."""
        return F.linear(y, weight, bias)

    def gradients(self, g: Tensor, y: Tensor, weight: Tensor, of_input: bool, dtype: torch.dtype) -> _Gradients:
        """∂L/∂y (if wanted), ∂L/∂W and, in a dtype of its own, ∂L/∂b from ∂L/∂x.

        Args:
            g: ∂L/∂x, of x's shape.
            y, weight: as they were applied.
            of_input: whether ∂L/∂y is wanted.
            dtype: that of ∂L/∂b.
        """
        rows = g.flatten(0, -2)
        return g @ weight if of_input else None, rows.T @ y.flatten(0, -2), rows.sum(0, dtype=dtype)

    def input_gradient(self, g: Tensor, y: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """∂L/∂y alone, of an output that was multiplied by scale [C].

        Args:
            g: the gradient of that output.
            y, weight: as they were applied.
            scale: in the dtype of g.
        """
        return (g * scale) @ weight

    def positions(self, y: Tensor) -> int:
        """Values per channel that it makes of y."""
        return y.numel() // y.shape[-1]

    def by_channel(self, x: Tensor) -> Tensor:
        """A view of what it made, with channels second."""
        return x.movedim(-1, 1)


class Convolution(NamedTuple):
    """x = W * y + b of a conv, transposed or not, as `LinearMap`; zero padding is all that is left of its padding."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def output(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies a weight of the conv's shape and a bias [C] to y [N, C_in, ...]."""
        return torch.convolution(y, weight, bias, *self)

    def gradients(self, g: Tensor, y: Tensor, weight: Tensor, of_input: bool, dtype: torch.dtype) -> _Gradients:
        """∂L/∂y (if wanted), ∂L/∂W and, in a dtype of its own, ∂L/∂b from ∂L/∂x.

        Args:
            g, y, weight, of_input, dtype: as in `LinearMap.gradients`.
        """
        # the operator sums for the bias in g's dtype, one by one where oneDNN does
        sizes = [g.shape[1]]
        own = g.dtype == dtype and g.numel() <= MOST_SUMMED * g.shape[1]
        found = _convolution_backward(g, y, weight, sizes, *self, [of_input, True, own])
        return found[0], found[1], found[2] if own else g.sum([0, *range(2, g.dim())], dtype=dtype)

    def input_gradient(self, g: Tensor, y: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """∂L/∂y alone, of an output that was multiplied by scale [C].

        Args:
            g, y, weight, scale: as in `LinearMap.input_gradient`.
        """
        g = g * scale.view(-1, *[1] * (g.dim() - 2))
        found: Tensor = _convolution_backward(g, y, weight, None, *self, [True, False, False])[0]
        return found

    def positions(self, y: Tensor) -> int:
        """Values per channel that it makes of y, nearly: borders may make it some more or fewer."""
        apart = math.prod(self.stride)
        inputs = y.numel() // y.shape[1]
        return inputs * apart if self.transposed else inputs // apart

    def by_channel(self, x: Tensor) -> Tensor:
        """A view of what it made, with channels second."""
        return x


def as_function(module: Producer, y: Tensor, output_size: Any = None) -> tuple[LinearMap | Convolution, Tensor]:
    """What the module computes of its weight, bias and input y, and the y that it is to be given, perhaps padded."""
    if is_linear(module):
        return LinearMap(), y
    stride, dilation = per_axis(module, "stride"), per_axis(module, "dilation")
    if is_transposed(module):
        kernel, padding = per_axis(module, "kernel_size"), per_axis(module, "padding")
        extra = module._output_padding(y, output_size, stride, padding, kernel, len(kernel), dilation)  # type: ignore[arg-type]
        return Convolution(stride, padding, dilation, True, tuple(extra), module.groups), y
    y, padding = padded_input(module, y)
    return Convolution(stride, padding, dilation, False, (0,) * len(stride), module.groups), y


def of_rows(rows: Tensor, module: Producer) -> Tensor:
    """A weight [C, F] in the module's shape; the inverse of `as_rows`."""
    shape = module.weight.shape
    if is_transposed(module):
        groups = module.groups
        rows = rows.view(groups, -1, shape[0] // groups, *shape[2:]).transpose(1, 2)
    return rows.reshape(shape)
