"""What can go wrong in a run: signals, gradients that are not finite, too little memory."""

from __future__ import annotations

import shlex
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import Self

from ..errors import OneValueError, OutOfMemoryError


class TrainingInterrupted(KeyboardInterrupt):
    """A run was told to stop by a signal, and has saved a checkpoint at `step`."""

    def __init__(self, number: int, step: int, data: str, run: str) -> None:
        name, command = signal.Signals(number).name, shlex.join(["cbn", "finetune", data, "--resume", run])
        super().__init__(f"stopped by {name} after step {step}; go on with {command}")
        self.exit_code = 128 + number


class StopSignals:
    """Context in which the first SIGINT or SIGTERM is only noted, in `received`; the second one interrupts at once.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Where values that are not finite come from: the images, a parameter, or the first layer whose output has some."""
    if not torch.isfinite(images).all():
        return "in the images"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"in the parameter {name}"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and not all(torch.isfinite(t).all() for t in tensors):
                found.append(f"in the output of {name}")

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if not next(m.children(), None)]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "in the loss or its gradient"


def out_of_memory(batch_size: int, device: torch.device) -> OutOfMemoryError:
    """What to do when the memory of the GPU was not enough."""
    if batch_size > 1:
        advice = f"try --batch-size {batch_size // 2}"
    else:
        advice = "try --grad-checkpointing, --mixed-precision bf16 or a smaller --img-size"
    return OutOfMemoryError(f"the memory of {device} is not enough for batch size {batch_size}; {advice}")


def one_value(error: ValueError, remedy: str) -> OneValueError | None:
    """What it means that torch's BatchNorm, or a layer here, refused a single value; None for other errors."""
    if "more than 1 value per channel" not in str(error):
        return None
    return OneValueError(f"a batch has one value per channel, of which there are no statistics; {remedy}")
