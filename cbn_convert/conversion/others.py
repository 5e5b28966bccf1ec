"""What others have of a model that a conversion changes: optimizers, hooks, and torch's table of what can be fused."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from ..errors import ConversionError
from ..norm import CrossIterationMixin
from ..norm.folded import FoldingMixin, end_folding
from ..norm.producers import plain_class
from ..norm.tap import InputTap
from ..refusals import INSTEAD


def remove_orphaned_hooks(model: nn.Module) -> None:
    """Gives those modules their class back whose norm layer was taken out of the model after its conversion.

    And those without a norm that somebody made of the class of one that trains folded, as peft makes its adapters.
    """
    for module in model.modules():
        if isinstance(module, FoldingMixin) and "folds_into" not in module.__dict__:
            end_folding(module)
        for hook in [*getattr(module, "_forward_hooks", {}).values()]:
            if isinstance(hook, InputTap) and hook.is_orphan:
                hook.remove()


def lacks_any(parameters: Sequence[nn.Parameter], model: nn.Module) -> bool:
    """Whether there is an optimizer for some of the model's parameters, and none for one of these.

    It may be anywhere, so all objects are looked through, which takes about a tenth of a second.
    """
    if not parameters:
        return False
    own = {id(p) for p in model.parameters()}
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    held = [{id(p) for group in getattr(o, "param_groups", ()) for p in group["params"]} for o in optimizers]
    of_model = set().union(*(ids for ids in held if ids & own))
    return bool(of_model) and any(id(p) not in of_model for p in parameters)


def refuse_fusing(layer: CrossIterationMixin) -> None:
    """Lets torch's fuse_modules, which looks modules up by their exact classes, say what is to be done first."""
    try:
        from torch.ao.quantization import fuser_method_mappings
    except ImportError:  # it is to be removed from torch
        return
    table: dict[Any, Any] = getattr(fuser_method_mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    for kind in {kind for producer in layer.producers for kind in (type(producer), plain_class(producer))}:
        pair = (kind, type(layer))
        table[pair] = table[(*pair, nn.ReLU)] = _refuse_fusing


def _refuse_fusing(is_qat: bool, *modules: nn.Module) -> NoReturn:
    described = next(m.described for m in modules if isinstance(m, CrossIterationMixin))
    raise ConversionError(f"{described} cannot be fused while it is converted; {INSTEAD}")
