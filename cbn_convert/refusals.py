"""What a converted layer cannot go through, each an error that says what to do instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INSTEAD = "take cbn.fold(model), a plain copy for inference, or call cbn.revert(model) before"


def refuse_replica(module: nn.Module) -> None:
    """Raises RuntimeError for a copy that nn.DataParallel made of a module for one step of training."""
    if module.training and module.__dict__.get("_is_replica"):
        raise RuntimeError(
            "a converted layer cannot train in nn.DataParallel, whose copies lose what they learn; use "
            "torch.nn.parallel.DistributedDataParallel"
        )


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where a step of training is transformed, or recorded, which would repeat what it counts."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None and any(
        t is not None and functorch.is_functorch_wrapped_tensor(t) for t in tensors
    ):
        raise RuntimeError(
            "a converted layer cannot train under torch.func's transforms, such as grad or vmap; use torch.autograd, "
            "or put the norm layers into eval mode"
        )
    refuse_capture(tensors[0])
    refuse_export()


def refuse_capture(x: Tensor | None) -> None:
    """Raises RuntimeError where a step of training is captured as a CUDA graph."""
    if x is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a converted layer in training mode cannot be captured as a CUDA graph, which would repeat what one step "
            "counted; use torch.compile without CUDA graphs, or capture what does not train"
        )


def refuse_export() -> None:
    """Raises RuntimeError where a step of training is recorded to be run elsewhere."""
    # torch 2.6 does not tell of an export
    if torch._C._is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
        raise RuntimeError(
            "a converted layer in training mode cannot be recorded by torch.export or torch.jit.trace; call "
            f"model.eval() for a graph that does not train, {INSTEAD}"
        )


def refuse_proxy(x: Any) -> None:
    """Raises RuntimeError for what torch.fx puts in the place of tensors."""
    if isinstance(x, torch.fx.Proxy):
        raise RuntimeError(
            "torch.fx, and with it feature extractors and quantisation, cannot trace a converted layer; call "
            f"cbn.convert on the traced model, {INSTEAD}"
        )


def refuse_script(module: nn.Module) -> nn.Module:
    """Raises RuntimeError; torch.jit.script calls it."""
    raise RuntimeError(f"a {type(module).__name__} cannot be scripted; {INSTEAD}")


def _no_qconfig(module: nn.Module) -> Any:
    raise AttributeError("qconfig")


def _refuse_qconfig(module: nn.Module, qconfig: Any) -> None:
    if qconfig is not None:  # which leaves a layer as it is
        raise RuntimeError(f"torch's quantisation would pass converted layers by; {INSTEAD}")


# what quantisation sets on every module that it prepares, to swap those whose exact class it knows
qconfig = property(_no_qconfig, _refuse_qconfig)
