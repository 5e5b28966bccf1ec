"""Which weights learn, and how: frozen parts, optimizer, schedule."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

import torch
from timm.models import group_modules
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..classifier import classifiers
from ..errors import RunError
from .settings import OptimizerSettings

FUSED = ("sgd", "adamw")  # the ones of torch that can leave a step out without waiting for the GPU


def frozen_modules(model: Any, parts: str | None) -> list[str]:
    """Names of the modules that `parts` means: "stem", "stage1" and so on as timm groups them, or patterns of names.

    Raises RunError for a part that the model does not have.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for part in filter(None, (p.strip() for p in (parts or "").split(","))):
        if re.fullmatch(r"stem|stage[1-9]\d*", part):
            stages = _stages(model)
            own = stages.get(part, [])
            known = f"it has {', '.join(stages)}" if stages else "timm knows no stages of it, give patterns of names"
        else:
            own = [name for name in names if fnmatchcase(name, part)]
            known = f"its modules are {', '.join(n for n, _ in model.named_children())}"
        if not own:
            raise RunError(f"freeze: {type(model).__name__} has no part {part!r}; {known}")
        found.update(own)
    return [name for name in names if any(name == own or name.startswith(f"{own}.") for own in found)]


def _stages(model: Any) -> dict[str, list[str]]:
    if not hasattr(model, "group_matcher"):
        return {}
    groups = group_modules(model, model.group_matcher(coarse=True))
    numbers = sorted(groups)[: -1 if len(groups) > 1 else None]  # the last one is the head
    return {"stem" if number == 0 else f"stage{number}": groups[number] for number in numbers}


def freeze(model: nn.Module, modules: list[str], head_lr_scale: float = 1.0) -> None:
    """Takes the parameters of the modules out of training.

    Raises RunError if none is left, or none of a classifier that is to have a rate of its own.
    """
    for name in modules:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise RunError("freeze leaves no weight to train; name fewer parts")
    if head_lr_scale != 1 and not any(p.requires_grad for head in classifiers(model) for p in head.parameters()):
        raise RunError("head_lr_scale is for a classifier that learns, and freeze has it; leave one of them out")


def make_optimizer(model: nn.Module, settings: OptimizerSettings, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer of that name, without weight decay for norms and biases. Raises RunError for an unknown name."""
    if settings.opt not in list_optimizers() or settings.opt == "adahessian":  # which needs second derivatives
        raise RunError(f"opt must be sgd, adamw or another of timm's optimizers, got {settings.opt!r}")
    more: dict[str, Any] = {"fused": True} if settings.opt in FUSED else {}
    try:
        optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            layer_decay=settings.layer_decay, **more,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError, ModuleNotFoundError) as error:
        raise RunError(f"optimizer {settings.opt} cannot be made ({error}); take sgd or adamw") from error
    if settings.head_lr_scale != 1:
        _scale_head(optimizer, {p for head in classifiers(model) for p in head.parameters()}, settings.head_lr_scale)
    return optimizer


def _scale_head(optimizer: torch.optim.Optimizer, head: set[nn.Parameter], scale: float) -> None:
    """Gives the parameters of the head groups of their own, behind the others; timm's schedules read their scale."""
    body, scaled = [], []
    for group in optimizer.param_groups:
        own = {part: [p for p in group["params"] if (p in head) == part] for part in (False, True)}
        if own[False]:
            body.append({**group, "params": own[False]})
        if own[True]:
            scaled.append({**group, "params": own[True], "lr_scale": scale * group.get("lr_scale", 1.0)})
    optimizer.param_groups[:] = [*body, *scaled]


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that layers with a scale of 1 have now, whether there are any or not."""
    lr, scale = max(((g["lr"], g.get("lr_scale", 1.0)) for g in optimizer.param_groups), key=itemgetter(1))
    return float(lr / scale)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, lr: float, steps: int) -> Scheduler:
    """timm's schedule over `steps` updates, the warm-up among them; `step_update(n)` sets the rate of update n.

    Args:
        optimizer: whose rates it sets.
        settings: sched and warmup_ratio count.
        lr: the peak rate.
        steps: at least 1.
    """
    warmup = min(round(settings.warmup_ratio * steps), steps - 1)
    common: dict[str, Any] = {
        "warmup_t": warmup, "warmup_lr_init": lr / max(warmup, 1), "warmup_prefix": True, "t_in_epochs": False,
    }  # fmt: skip
    left = steps - warmup
    if settings.sched == "cosine" and left > 1:  # of one update timm says that it is no cosine
        return CosineLRScheduler(optimizer, t_initial=left, **common)
    if settings.sched == "linear":
        return PolyLRScheduler(optimizer, t_initial=left, power=1.0, **common)
    return StepLRScheduler(optimizer, decay_t=left + 1, decay_rate=1.0, **common)
