"""What the processes of a run send each other in a step, counted for ResNet-50 with two processes of gloo.

    torchrun --nproc-per-node 2 -m benchmarks.speed.communication

Counts the calls of all_reduce by the norm layers and the bytes of their tensors, mean over 16 steps behind the first,
in which all layers look (later they take turns of 8), and the bytes of all gradients, which DistributedDataParallel
sums in every update. Ten classes. Writes benchmarks/results/communication.json.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.provenance import RESULTS, provenance
from cbn_convert import convert, history_state
from cbn_convert.bench.steps import _model

STEPS = 16


def count(sync: bool) -> dict[str, float]:
    """Calls and bytes of a step."""
    torch.manual_seed(0)
    model = _model("resnet50")
    convert(model, sync=sync)
    model.train()
    seen = {"calls": 0, "bytes": 0}
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen["calls"] += 1
        seen["bytes"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **named)

    dist.all_reduce = counted
    try:
        for step in range(STEPS + 1):
            if step == 1:
                seen.update(calls=0, bytes=0)
            model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    finally:
        dist.all_reduce = all_reduce
    leaves = torch.utils._pytree.tree_leaves(history_state(model))
    history = sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    statistics = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "running" in n)
    return {
        "calls_per_step": seen["calls"] / STEPS, "bytes_per_step": seen["bytes"] / STEPS, "history_bytes": history,
        "gradient_bytes": gradients, "statistics_bytes": statistics,
    }  # fmt: skip


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    result = {"own": count(sync=False), "sync": count(sync=True)}
    if dist.get_rank() == 0:
        head = provenance("torchrun --nproc-per-node 2 -m benchmarks.speed.communication")
        (RESULTS / "communication.json").write_text(json.dumps({**head, "arch": "resnet50", **result}, indent=1) + "\n")
        print(json.dumps(result, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
