"""Two processes over gloo. One spawn runs every scenario, since each process has to import torch anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import wait_until
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cbn_convert as cbn

pytestmark = pytest.mark.xdist_group("distributed")  # of which one spawn serves all

STEPS = 5
SIZES = {"even": (2, 2), "uneven": (3, 1), "one empty": (4, 0)}


def build(compensation: str, history: str, sync: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(36, 3),
    ).double()  # fmt: skip
    cbn.convert(
        net, window=3, compensation=compensation, history=history, sync=sync,
        example_input=torch.randn(1, 3, 8, 8, dtype=torch.float64),
    )  # fmt: skip
    return net.train()


def images(i: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) + i % 2


def step(model: nn.Module, x: Tensor, share: float) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).pow(3).sum().mul(share).backward()
    grads = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.02 * p.grad
    return grads


def outcome(model: nn.Module, grads: dict[str, Tensor]) -> dict[str, Any]:
    return {"grads": grads, "state": model.state_dict(), "history": cbn.history_state(model)}


VARIANTS = [(c, h) for c in ("projection", "taylor", "none") for h in ("ring", "ema")]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for compensation, history in VARIANTS:
        for kind, sizes in SIZES.items():
            model = build(compensation, history, sync=True)
            wrapped = DistributedDataParallel(model)
            for i in range(STEPS):
                # DDP averages over ranks: the mean over the joined batch of 4 is half of the sum over ranks
                grads = step(wrapped, images(i).split(list(sizes))[rank], 2 / 4)
            results[f"sync {compensation} {history} {kind}"] = outcome(model, grads)
    model = build("projection", "ema", sync=False)
    wrapped = DistributedDataParallel(model)
    for i in range(STEPS):
        grads = step(wrapped, images(i).chunk(2)[rank], 1.0)
    results["local"] = outcome(model, grads)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(worker, (str(folder),), nprocs=2, join=False, daemon=True)
    wait_until(lambda: processes.join(timeout=1.0), 240)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(("compensation", "history"), VARIANTS)
def test_sync_is_one_process_with_the_joined_batch(ranks, compensation: str, history: str, kind: str) -> None:
    model = build(compensation, history, sync=True)
    for i in range(STEPS):
        grads = step(model, images(i), 1 / 4)
    expected = outcome(model, grads)
    for rank in range(2):
        got = ranks[rank][f"sync {compensation} {history} {kind}"]
        for part in ("grads", "state"):
            for key, value in expected[part].items():
                torch.testing.assert_close(got[part][key], value, rtol=1e-9, atol=1e-11)
        for name, state in expected["history"].items():
            for key, value in state["sources"][0]["slots"].items():
                torch.testing.assert_close(
                    got["history"][name]["sources"][0]["slots"][key], value, rtol=1e-9, atol=1e-11
                )


def test_without_sync_gradients_agree_and_history_is_each_ranks_own(ranks) -> None:
    one, other = (rank["local"] for rank in ranks)
    for name, grad in one["grads"].items():
        torch.testing.assert_close(grad, other["grads"][name], rtol=0, atol=0)
    for name, state in one["history"].items():
        assert state["sources"][0]["seen"] == other["history"][name]["sources"][0]["seen"] == STEPS
        for key, value in state["sources"][0]["slots"].items():
            assert not torch.equal(value, other["history"][name]["sources"][0]["slots"][key])


def test_sync_without_a_process_group_is_plain() -> None:
    results = []
    for sync in (True, False):
        model = build("projection", "ema", sync)
        for i in range(3):
            grads = step(model, images(i), 1.0)
        results.append(grads)
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name])
