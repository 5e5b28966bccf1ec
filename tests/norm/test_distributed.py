"""Two processes over gloo. One spawn runs every scenario, since each process has to import torch anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.models import randomize_norms
from helpers.waiting import wait_until
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cbn_convert as cbn

pytestmark = pytest.mark.xdist_group("distributed")  # of which one spawn serves all

STEPS = 5
SIZES = {"even": (2, 2), "uneven": (3, 1), "one empty": (4, 0)}


WAYS = {
    "projection": {"window": 3},
    "taylor": {"window": 3, "compensation": "taylor"},
    "none": {"window": 3, "compensation": "none"},
    "carried": {"window": 64, "history": "ema", "moments_every": 2, "moments_positions": None},
    "new": {"history": "ema", "start": "empty", "moments_positions": None},
    "carried, none": {"window": 64, "history": "ema", "moments_every": 2, "compensation": "none"},
}


def build(way: str, sync: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(36, 3),
    ).double()  # fmt: skip
    cbn.convert(
        randomize_norms(net), sync=sync, example_input=torch.randn(1, 3, 8, 8, dtype=torch.float64), **WAYS[way]
    )
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


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for way in WAYS:
        for kind, sizes in SIZES.items():
            model = build(way, sync=True)
            wrapped = DistributedDataParallel(model)
            for i in range(STEPS):
                # DDP averages over ranks: the mean over the joined batch of 4 is half of the sum over ranks
                grads = step(wrapped, images(i).split(list(sizes))[rank], 2 / 4)
            results[f"sync {way} {kind}"] = outcome(model, grads)
    for way in ("projection", "carried", "carried, none"):
        for same in (True, False):
            model = build(way, sync=False)
            wrapped = DistributedDataParallel(model)
            for i in range(STEPS):
                grads = step(wrapped, images(i) if same else images(i).chunk(2)[rank], 1.0)
            results[f"local {way} {same}"] = outcome(model, grads)
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


def assert_same_outcome(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("grads", "state"):
        for key, value in expected[part].items():
            torch.testing.assert_close(got[part][key], value, rtol=1e-9, atol=1e-11)
    for name, state in expected["history"].items():
        own, wanted = got["history"][name]["sources"][0], state["sources"][0]
        assert own["seen"] == wanted["seen"]
        assert own["slots"].keys() == wanted["slots"].keys()
        for key, value in wanted["slots"].items():
            torch.testing.assert_close(own["slots"][key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_sync_is_one_process_with_the_joined_batch(ranks, way: str, kind: str) -> None:
    model = build(way, sync=True)
    for i in range(STEPS):
        grads = step(model, images(i), 1 / 4)
    for rank in range(2):
        assert_same_outcome(ranks[rank][f"sync {way} {kind}"], outcome(model, grads))


@pytest.mark.parametrize("way", ["projection", "carried"])
def test_ranks_that_see_the_same_are_one_process(ranks, way: str) -> None:
    """The running statistics that DistributedDataParallel hands out before every step are a step behind the weights."""
    model = build(way, sync=False)
    for i in range(STEPS):
        grads = step(model, images(i), 1.0)
    for rank in range(2):
        assert_same_outcome(ranks[rank][f"local {way} True"], outcome(model, grads))


@pytest.mark.parametrize("way", ["projection", "carried"])
def test_without_sync_gradients_agree_and_what_is_remembered_is_each_ranks_own(ranks, way: str) -> None:
    one, other = (rank[f"local {way} False"] for rank in ranks)
    for name, grad in one["grads"].items():
        torch.testing.assert_close(grad, other["grads"][name], rtol=0, atol=0)
    for name, state in one["history"].items():
        own, others = state["sources"][0], other["history"][name]["sources"][0]
        assert own["seen"] == others["seen"] == STEPS
        for key, value in own["slots"].items():
            assert torch.isfinite(value).all()
            # the running statistics are handed out by the first rank, and a carried window goes on from those
            if way == "projection" or key.startswith("patch"):
                assert not torch.equal(value, others["slots"][key])


def test_statistics_of_the_first_rank_are_everybodys(ranks) -> None:
    """As BatchNorm's are under DistributedDataParallel; seen in a layer that did not look at its last batch."""
    one, other = (rank["local carried, none False"]["history"]["4"]["sources"][0]["slots"] for rank in ranks)
    for key, value in one.items():
        assert torch.equal(value, other[key])


@pytest.mark.parametrize("way", ["projection", "carried"])
def test_sync_without_a_process_group_is_plain(way: str) -> None:
    results = []
    for sync in (True, False):
        model = build(way, sync)
        for i in range(3):
            grads = step(model, images(i), 1.0)
        results.append(grads)
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name])
