"""How a norm layer gets the input of a module that feeds it, and checks that it is the one."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .folded import end_folding
from .producers import OutputChannels, is_linear, learns, plain_class

if TYPE_CHECKING:
    from .layer import CrossIterationMixin

# A copy of the output is compared with it in so many iterations only, since the comparison waits for the device.
COMPARISONS = 2
# A forward pass may break off between a conv and its norm, as where memory runs out; not again and again.
MOST_LOST = 2
SUMMED = 8  # steps of which one adds up weights that nobody trains

# where a norm finds that its input is not what it is bound to
CHANGED = "if the model was changed since, as by LoRA, call cbn.revert(model) and cbn.convert(model) once more, else "


class OfNorm:
    """Belongs to a norm layer that it does not keep: one that is taken out of its model is gone."""

    def __init__(self, norm: CrossIterationMixin) -> None:
        self._norm: Any = weakref.ref(norm)

    @property
    def norm(self) -> CrossIterationMixin:
        """The norm layer, which whoever cannot know asks for with `is_orphan` first."""
        return self._norm()  # type: ignore[no-any-return]

    @property
    def is_orphan(self) -> bool:
        """Whether the norm layer is gone."""
        return self._norm() is None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_norm": self._norm()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        norm = state["_norm"]
        self.__dict__.update(state, _norm=type(None) if norm is None else weakref.ref(norm))


class InputTap(OfNorm):
    """Forward hook on a producing module that hands its last input over to the norm layer.

    A plain object, so that the norm layer can refer to the producer without registering it as a submodule.
    """

    def __init__(self, made: OutputChannels, norm: CrossIterationMixin) -> None:
        self.module = made.module
        self.rows = None if made.whole else slice(made.first, made.first + made.channels)
        super().__init__(norm)
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.version: int | None = None
        self.learned = False  # whether the output has a gradient
        self.compared = 0
        self.folded = False  # whether the output that is on its way is normalised already
        self.in_graph = False  # whether a compiled graph has done so, and counted the step
        self.lost = 0.0  # such outputs that never came to the norm
        self.sums: list[float] | None = None  # of weight and bias, as `watch` found them
        self.moves = False  # whether somebody moves them from step to step, be it without a gradient
        # before hooks of others, which may change the output
        self.watching = self.module.register_forward_hook(self, with_kwargs=True, prepend=True)
        self.loading = self.module.register_load_state_dict_post_hook(self.weights_replaced)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Runs behind the module's forward pass."""
        if self.in_graph and torch.compiler.is_compiling():
            return
        if self.is_orphan:
            self.leave()
        elif self.norm.training and (self.folded or self.norm.window.compensation != "none"):
            self.input = (args[0] if args else next(iter(kwargs.values()))).detach()
            self.output = output.detach()
            self.version, self.learned = writes_to(output), output.requires_grad

    def weights_replaced(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Weights that were loaded are too far from those of a ring's iterations; a carried window follows them."""
        if not (self.is_orphan or self.norm.window.is_carried):
            self.norm.reset_history()

    @property
    def followed(self) -> bool:
        """Whether past statistics need compensation: θ or b may change, or could when the past was recorded."""
        if self.norm.window.compensation == "none":
            return False
        return learns(self.module) or self.moves or self.norm.compensated

    def watch(self) -> None:
        """To be called in every step: a momentum encoder moves, too, and not every write counts as one."""
        if self.moves or self.norm.iteration % SUMMED or learns(self.module):
            return
        stored = [p for p in self.module._parameters.values() if type(p) is nn.Parameter and not p.is_meta]
        sums = [float(p.detach().double().sum()) for p in stored]
        self.moves = self.sums not in (None, sums)
        self.sums = sums

    def take(self) -> Tensor | None:
        """The stored input, which is released here so that no activation outlives its step."""
        stored, self.input = self.input, None
        return stored

    def check_arrivals(self) -> None:
        """Raises RuntimeError where normalised outputs, again and again, did not come to the norm."""
        if self.folded:
            self.lost += 1
        if self.lost > MOST_LOST:
            raise RuntimeError(
                f"a {plain_class(self.module).__name__} trains as one with {self.norm.described}, but its output goes "
                "elsewhere; convert again with an example_input that shows what training does, exclude the norm, or "
                "revert the model before its norm layers are replaced by others"
            )

    def take_folded(self, x: Tensor) -> bool:
        """Whether x [N, C, ...] is normalised already. Raises RuntimeError if it is not what the module made."""
        folded, self.folded = self.folded, False
        if folded:
            self.input, self.lost = None, max(0, self.lost - 0.002)  # many arrivals make up for one that broke off
            self.check_output(x)
        return folded

    def made_in_graph(self, output: Tensor) -> None:
        """Notes a normalised output in a graph that is being compiled."""
        self.folded = self.in_graph = True
        self.output, self.version, self.learned = output, None, output.requires_grad

    def take_in_graph(self, x: Tensor) -> bool:
        """`take_folded` where a graph is compiled, which tells tensors apart, but not what was written to them."""
        if not self.in_graph or self.output is not x:
            return False  # which breaks the graph, and `take_folded` looks at what has arrived
        self.output = None
        self.folded = self.in_graph = False
        return True

    def check_output(self, x: Tensor) -> None:
        """Raises RuntimeError unless x [N, C, ...] holds what the module made, its positions in the same order."""
        made, self.output = self.output, None
        if made is None or type(made) is not Tensor:  # what only stands for a tensor has no values to compare
            return
        rows, made = x.detach(), made.detach()
        if is_linear(self.module):
            rows, made = rows.movedim(1, -1).flatten(0, -2), made.flatten(0, -2)
        if self.rows is not None:
            made = made[:, self.rows]
        if rows.shape == made.shape:
            if (rows.data_ptr(), rows.stride()) == (made.data_ptr(), made.stride()):
                if self.version in (None, writes_to(x)):
                    return
            elif not self._joined(x) and (self.compared >= COMPARISONS or _nearly_equal(rows, made)):
                self.compared += 1
                return
        raise RuntimeError(
            f"{self.norm.described} is bound to a {plain_class(self.module).__name__} whose output is changed before "
            f"it arrives; {CHANGED}exclude the layer from the conversion"
        )

    def _joined(self, x: Tensor) -> bool:
        """Whether more than the output is in x, as of an adapter beside the module, which adds zeros at first."""
        made_of = () if x.grad_fn is None else x.grad_fn.next_functions
        return sum(node is not None for node, _ in made_of) > self.learned

    def remove(self) -> None:
        """Takes the hooks off the module, which is of its own class again."""
        self.watching.remove()
        self.loading.remove()
        source = self.module.__dict__.get("folds_into")
        if source is not None and source.tap is self:
            end_folding(self.module)

    def leave(self) -> None:
        """`remove` and a warning, as soon as a module whose norm is gone trains; one fused for inference never does."""
        if self.module.training:
            self.remove()
            warnings.warn(
                "a norm layer was taken out of the model after its conversion, as convert_sync_batchnorm and "
                "freeze_batch_norm_2d do, so what is in its place normalises in its own way; to train with CBN, call "
                "cbn.convert(model) once more, and last",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "input": None,
            "output": None,
            "folded": False,
            "in_graph": False,
            "sums": None,
        }


def is_watched(module: nn.Module) -> bool:
    """Whether hooks of others see what goes into the module or comes out of it."""
    m = module
    if m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return True
    return bool(m._forward_hooks) and any(not isinstance(hook, InputTap) for hook in m._forward_hooks.values())


def _nearly_equal(copy: Tensor, original: Tensor) -> bool:
    """Whether a copy, perhaps in another dtype, has the original's values; the device is waited for."""
    original = original.to(copy.dtype)
    size = float(original.abs().mean().nan_to_num(0))
    return torch.allclose(copy, original, rtol=1e-2, atol=1e-2 * size, equal_nan=True)


def writes_to(t: Tensor) -> int | None:
    """How often the tensor, or what it is a view of, was written to; None where nobody counts."""
    if torch.compiler.is_compiling():
        return None
    try:
        return t._version
    except RuntimeError:  # made in inference mode
        return None
