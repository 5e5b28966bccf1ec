"""python tests/norm/compile_triton.py: compiles the Triton kernels for GPUs that need not be there; prints their names.

In a process of its own, since TRITON_INTERPRET holds for a process as a whole.
"""

from __future__ import annotations

import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cbn_convert.norm.kernels import triton_passes

INTEGERS, CONSTANTS = ("C", "F", "K", "per_group"), {"EPS": 1e-5, "LEAST": 1e-24}
OPTIONAL = ("bias", "gamma", "beta", "patch_mean", "patch_rest", "patch_axes", "running_mean", "running_var", "rows")

DEPTHWISE = ("bias", "F", "K", "per_group")


def source(kernel: triton.JITFunction, dtype: str, without: tuple[str, ...], block: int, axes: int) -> ASTSource:
    # an integer that is 1 is a constant
    constants = {
        **CONSTANTS,
        "BLOCK": block,
        "AXES": axes,
        **{name: 1 if name in INTEGERS else None for name in without},
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "i32" if name in INTEGERS else f"*{dtype}" for name in kernel.arg_names}
    return ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)


if __name__ == "__main__":
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        for kernel in (triton_passes.fold, triton_passes.folded_gradient):
            for dtype in ("fp32", "fp64"):
                for without, block, axes in (((), 512, 8), (OPTIONAL, 16, 1), (DEPTHWISE, 1, 1)):
                    made = triton.compile(
                        source(kernel, dtype, without, block, axes), target=GPUTarget("cuda", capability, 32)
                    )
                    found = {float(number) for number in re.findall(r"arith.constant (\S+) : f64", made.asm["ttir"])}
                    if found & {float(torch.tensor(value)) for value in CONSTANTS.values()}:
                        raise SystemExit(f"{made.metadata.name} has rounded a constant to float32:\n{made.asm['ttir']}")
                    print(f"sm_{capability} {made.metadata.name} {dtype} {len(made.asm['cubin'])}")
