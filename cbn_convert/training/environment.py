"""Where and how a run computes: accelerate's part in it, and environment variables, refused, not used, or stored.

Of accelerate's all are refused or overruled by the run's own settings. Those of torch and timm that choose another
precision or algorithm stand in config.json. Not among them are numbers of threads and NCCL's choices, which like the
machine itself change only the order of sums.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend, GradientAccumulationPlugin

from ..errors import CbnWarning, RunError
from .config import FinetuneConfig
from .evaluation import resolve_device

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_STORED = re.compile(
    r"TIMM_\w+|FORK_LAST3"  # the latter is timm's, in fastvit
    r"|TORCH(DYNAMO|INDUCTOR|_DYNAMO|_COMPILE|_CUDNN|_BLAS|_LINALG|_LINEAR|_MKLDNN|_ROCM)_\w+"
    r"|PYTORCH_(JIT|MIOPEN|MPS|SUM|TENSOREXPR|TUNABLEOP)(_\w+)?|PYTORCH_ENABLE_MPS_FALLBACK"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE|CUBLAS_WORKSPACE_CONFIG|ATEN_CPU_CAPABILITY"
    r"|(ONEDNN|DNNL)_\w+|MKL_(CBWR|DISABLE_FAST_MM|ENABLE_INSTRUCTIONS)"
    r"|TRITON_(F32_DEFAULT|DEFAULT_FP_FUSION|INTERPRET)|CUTLASS_EPILOGUE_FUSION|TORCH_DISABLE_NATIVE_JIT"
)
_NO_NUMBERS = re.compile(r"CACHE|DEBUG|_DIR\b|FILE|LOG(?!UE)|PROFILE|REDIS|RETRIES|THREADS|TIMEOUT|VERBOSE|WORKER")
# what accelerate makes of them is no DistributedDataParallel: parameters are not where a run looks for them
_REFUSED = (
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)  # fmt: skip


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Devices, processes and precision as the run's settings have them, whatever accelerate's variables say.

    Raises RunError for what does not work here or is not one of the ways in which a run trains.
    """
    _check_environment(config)
    device = resolve_device(config.device)
    if config.mixed_precision == "fp16" and device.type != "cuda":
        raise RunError(f"mixed_precision 'fp16' needs a GPU, the device is {device.type}; use bf16 or no")
    shared = AcceleratorState._shared_state
    if shared and (
        shared.get("_mixed_precision") != config.mixed_precision or shared["device"].type != device.type
        or shared["dynamo_plugin"].backend != DynamoBackend.NO
    ):  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision=config.mixed_precision, log_with=config.tracker,
            project_dir=config.output, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), dynamo_backend="no",
        )  # fmt: skip
    except ValueError as error:
        argument = "tracker" if config.tracker and config.tracker in str(error) else "mixed_precision"
        raise RunError(f"{argument} {getattr(config, argument)!r} does not work here: {error}") from error
    kind = accelerator.distributed_type
    if accelerator.device.type != device.type or kind not in _SUPPORTED:
        raise RunError(
            f"accelerate is set up for {accelerator.device.type} ({kind.value}) where the run is to use {device.type}; "
            "give --device, or unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE"
        )
    if config.tracker and config.tracker not in [str(getattr(t, "value", t)) for t in accelerator.log_with]:
        raise RunError(f"tracker {config.tracker!r} is not installed; pip install it, or leave out --tracker")
    return accelerator


def stored_environment() -> dict[str, str]:
    """The variables that are set and may change what torch or timm compute."""
    return {
        name: value for name, value in sorted(os.environ.items())
        if _STORED.fullmatch(name) and not _NO_NUMBERS.search(name)
    }  # fmt: skip


def _check_environment(config: FinetuneConfig) -> None:
    """Raises RunError for a way of training that accelerate would choose; warns of its settings that are not used."""
    for name in _REFUSED:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise RunError(
                f"{name} is set, but a run of several processes is plain data parallel; unset it, or launch with "
                "torchrun or `accelerate launch --multi_gpu`"
            )
    ours: dict[str, tuple[str, Any, tuple[Any, ...]]] = {  # flag, our value, and what asks for nothing else
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--accumulate", config.accumulate, ("1", "auto")),
        "ACCELERATE_MIXED_PRECISION": ("--mixed-precision", config.mixed_precision, ("no",)),
        "ACCELERATE_DYNAMO_BACKEND": ("--compile", "inductor" if config.compile else "no", ("no",)),
    }
    for name, (flag, value, nothing) in ours.items():
        given = os.environ.get(name, str(value)).lower()
        if given not in (str(value), *nothing):
            warnings.warn(f"{name}={given} has no effect on a run; its own setting is {flag}", CbnWarning, stacklevel=3)


def compare_environment(run: str, before: dict[str, str] | None) -> None:
    """Warns if a run goes on under other variables than it began with; older runs have stored none."""
    now = stored_environment()
    if before is None or before == now:
        return
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    was = ", ".join(f"{name}={before[name]}" if name in before else f"without {name}" for name in changed)
    warnings.warn(
        f"the run in {run} began {'with ' if changed[0] in before else ''}{was} in the environment, which is not so "
        "now; its further steps may compute other numbers",
        CbnWarning,
        stacklevel=3,
    )
