"""A network and images for all frameworks, and what they are compared by."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.models import randomize_norms
from nets import Images, Net
from torch import Tensor, nn

from cbn_convert.integrations import training_state


def network(seed: int = 0) -> Net:
    """Not converted yet; the same for the same seed, and nothing else is drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
        randomize_norms(net.stem)
        randomize_norms(net.body)
    return net


def dataset() -> Images:
    """`images` as a dataset."""
    return Images(*images())


def images(n: int = 24, size: int = 12) -> tuple[Tensor, Tensor]:
    """Two classes that differ in their mean."""
    g = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % 2
    return torch.randn(n, 3, size, size, generator=g) + labels.view(-1, 1, 1, 1), labels


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that a run ends with, those of the window included."""
    found = {f"weights.{k}": v.clone() for k, v in model.state_dict().items()}
    state = training_state(model)
    for name, layer in state["ranks"][0].items():
        for i, source in enumerate(layer["sources"]):
            slots: dict[str, Any] = {} if source is None else source["slots"]
            found |= {f"{name}.{i}.{slot}": t for slot, t in slots.items()}
    return found


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that only one has, or that are not the same to the bit."""
    same = {name for name in a.keys() & b.keys() if torch.equal(a[name], b[name])}
    return sorted((a.keys() | b.keys()) - same)


def two_processes(function: Callable[..., None], *args: Any) -> None:
    """Calls function(rank, *args) in two processes, with the environment that torchrun gives them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (port, function, *args), nprocs=2)


def _rank(rank: int, port: int, function: Callable[..., None], *args: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank, *args)
    dist.destroy_process_group()
