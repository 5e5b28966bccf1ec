"""Which images a step sees: the same ones however the run is cut into processes, workers and sittings."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import config
from timm.data import resolve_data_config
from torch import Tensor

import cbn_convert as cbn
from cbn_convert.errors import DataError
from cbn_convert.training import loop
from cbn_convert.training.config import FinetuneConfig
from cbn_convert.training.evaluation import accuracy
from cbn_convert.training.loading import (
    IGNORED,
    Batch,
    StepSampler,
    batches,
    evaluation_batch,
    plain_loader,
    training_loader,
)
from cbn_convert.training.splits import Split, read_splits

DATA_CONFIG = resolve_data_config({"img_size": 32})
AUGMENTED = FinetuneConfig(
    "d", "m", "o", batch_size=4, auto_augment="rand-m9-mstd0.5", random_erasing=0.5, vflip=0.5, workers=0
)


def indices(sampler: StepSampler) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in sampler]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch"), [(7, 2), (7, 1), (23, 3), (24, 4)])
def test_the_processes_share_an_epoch_without_overlap(images: int, batch: int, ranks: int) -> None:
    samplers = [StepSampler(images, batch, 5, rank=rank, ranks=ranks) for rank in range(ranks)]
    own = [indices(sampler) for sampler in samplers]
    steps = images // (batch * ranks)
    assert [len(sampler) for sampler in samplers] == [steps] * ranks
    assert [[len(b) for b in share] for share in own] == [[batch] * steps] * ranks
    seen = [index for share in own for b in share for index in b]
    assert len(set(seen)) == len(seen) == steps * batch * ranks
    assert set(seen) <= set(range(images))
    # a step of all processes has the images that one process would take at once
    (alone,) = [indices(StepSampler(images, batch * ranks, 5))]
    assert [list(chain(*parts)) for parts in zip(*own, strict=True)] == alone


def test_order_and_changes_are_of_the_epoch_and_the_seed() -> None:
    def epoch(seed: int, number: int) -> list[list[tuple[int, int | None]]]:
        sampler = StepSampler(40, 4, seed)
        sampler.start(number)
        return list(sampler)

    orders = [epoch(seed, number) for seed in (0, 1) for number in (-1, 0, 1, 2)]
    assert epoch(1, 2) == orders[-1]
    for place, order in enumerate(orders):
        items = list(chain(*order))
        assert sorted(index for index, _ in items) == list(range(40))
        assert len({seed for _, seed in items}) == 40
        for other in orders[:place]:
            assert [i for i, _ in items] != [i for i, _ in chain(*other)]
            assert not {seed for _, seed in items} & {seed for _, seed in chain(*other)}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_begun_in_the_middle_goes_on_as_if_it_were_whole(accumulate: int) -> None:
    for rank in (0, 1):
        sampler = StepSampler(50, 2, 7, accumulate=accumulate, rank=rank, ranks=2)
        assert sampler.updates == 50 // (2 * 2 * accumulate)
        sampler.start(3)
        whole = list(sampler)
        assert len(whole) == sampler.updates * accumulate
        for update in range(sampler.updates + 1):
            sampler.start(3, update)
            assert list(sampler) == whole[update * accumulate :]
            assert len(sampler) == len(whole) - update * accumulate
        sampler.start(4)
        assert list(sampler) != whole


def test_fewer_images_than_an_update_takes() -> None:
    small = StepSampler(3, 8, 0)
    assert (small.batch, small.updates) == (3, 1)
    assert [sorted(batch) for batch in indices(small)] == [[0, 1, 2]]
    parts = StepSampler(7, 2, 0, accumulate=5)  # an update of all whole batches
    assert (parts.batch, parts.accumulate, parts.updates) == (2, 3, 1)
    assert len(indices(parts)) == 3
    with pytest.raises(DataError, match=r"^11 training images are not enough .* 3 processes with 2 x 2 images each"):
        StepSampler(11, 2, 0, accumulate=2, ranks=3)
    assert StepSampler(12, 2, 0, accumulate=2, ranks=3).updates == 1


def test_class_balance_draws_each_class_about_equally_often() -> None:
    sizes = {0: 90, 1: 9, 2: 1}
    split = Split([(f"{label}-{i}", label) for label, n in sizes.items() for i in range(n)], ["a", "b", "c"])
    shares = {}
    for balance in ("none", "sample"):
        _, sampler = training_loader(split, DATA_CONFIG, replace(AUGMENTED, class_balance=balance))
        drawn: Counter[int] = Counter()
        for epoch in range(30):
            sampler.start(epoch)
            drawn.update(split.samples[index][1] for batch in indices(sampler) for index in batch)
        assert drawn.total() == 30 * 100
        shares[balance] = [drawn[label] / drawn.total() for label in sizes]
    assert shares["none"] == [0.9, 0.09, 0.01]
    np.testing.assert_allclose(shares["sample"], [1 / 3] * 3, atol=0.05)  # 5 standard deviations


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and x.bad == y.bad
        for x, y in zip(a, b, strict=True)
    )


def pairs(of: Iterable[Batch]) -> list[tuple[bytes, int]]:
    """Each image and its label."""
    return [(x.numpy().tobytes(), int(y)) for b in of for x, y in zip(b.images, b.labels, strict=True)]


@pytest.fixture
def training(colors: Path) -> Split:
    return read_splits(str(colors), None, 0)[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_same_images_with_any_number_of_workers_and_from_the_middle_on(training: Split) -> None:
    loader, sampler = training_loader(training, DATA_CONFIG, AUGMENTED)
    sampler.start(1)
    whole = list(batches(loader))
    assert len(whole) == 8
    sampler.start(0)
    assert not same(list(batches(loader)), whole)
    torch.manual_seed(99)  # nothing may depend on the state of the process
    random.seed(99)
    np.random.seed(99)
    for workers in (0, 1, 3):
        loader, sampler = training_loader(training, DATA_CONFIG, replace(AUGMENTED, workers=workers))
        sampler.start(1)
        assert same(list(batches(loader)), whole)
        begun: Iterator[Batch] = batches(loader)  # left in the middle, as a run does at its end or at an evaluation
        assert same([next(begun), next(begun)], whole[:2])
        sampler.start(1, 3)
        assert same(list(batches(loader)), whole[3:])


def test_each_image_is_changed_in_its_own_way_and_no_aug_in_none(training: Split) -> None:
    one = Split([training.samples[0]] * 8, training.classes)
    for no_aug, kinds in ((False, 8), (True, 1)):
        loader, _ = training_loader(one, DATA_CONFIG, replace(AUGMENTED, no_aug=no_aug))
        images = torch.cat([batch.images for batch in batches(loader)])
        assert len({image.numpy().tobytes() for image in images}) == kinds


def test_loading_leaves_the_random_states_of_the_process_alone(training: Split) -> None:
    def states() -> tuple[Any, list[int], Tensor]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    before = states()
    loader, _ = training_loader(training, DATA_CONFIG, AUGMENTED)
    assert len(list(batches(loader))) == 8
    list(batches(plain_loader(training, DATA_CONFIG, 4, 0)))
    after = states()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


def test_a_policy_that_timm_does_not_know(training: Split) -> None:
    with pytest.raises(DataError, match=r"auto_augment 'nonsense'.*rand-m9-mstd0\.5"):
        training_loader(training, DATA_CONFIG, replace(AUGMENTED, auto_augment="nonsense"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_plain_loader_shards_are_disjoint_and_complete(ranks: int, training: Split) -> None:
    split = Split(training.samples[10:23], training.classes)
    (whole,) = list(batches(plain_loader(split, DATA_CONFIG, 32, 0)))
    assert whole.labels.tolist() == [label for _, label in split.samples]
    parts = [range(rank, 13, ranks) for rank in range(ranks)]
    shares = [list(batches(plain_loader(split, DATA_CONFIG, 3, 0, indices=part))) for part in parts]
    assert [sum(len(b.labels) for b in share) for share in shares] == [len(part) for part in parts]
    found = pairs(chain(*shares))
    assert sorted(found) == sorted(pairs([whole]))
    assert len(set(found)) == 13
    (chosen,) = list(batches(plain_loader(split, DATA_CONFIG, 32, 0, indices=[7, 2])))
    assert torch.equal(chosen.images, whole.images[[7, 2]])


def damage(split: Split, *places: int) -> list[str]:
    for place in places:
        Path(split.samples[place][0]).write_bytes(b"damaged")
    return sorted(split.samples[place][0] for place in places)


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_bad_trains_on_others_and_names_the_files(workers: int, training: Split) -> None:
    settings = replace(AUGMENTED, skip_bad_images=True, workers=workers, no_aug=True)
    good = set(pairs(batches(training_loader(training, DATA_CONFIG, settings)[0])))
    bad = damage(training, 0, 1, 31)  # neighbours, and the last one, whose place the first good one takes
    loader, sampler = training_loader(training, DATA_CONFIG, settings)
    got = list(batches(loader))
    assert [len(batch.labels) for batch in got] == [4] * 8
    named = [path for batch in got for path in batch.bad]
    assert sorted(set(named)) == bad
    assert set(pairs(got)) <= good
    sampler.start(0, 5)
    assert same(list(batches(loader)), got[5:])


@pytest.mark.parametrize("workers", [0, 1])
def test_skip_bad_counts_no_unreadable_image_in_an_evaluation(workers: int, training: Split) -> None:
    bad = damage(training, 2, 20)
    got = list(batches(plain_loader(training, DATA_CONFIG, 5, workers, skip_bad=True)))
    labels = torch.cat([batch.labels for batch in got]).tolist()
    assert labels == [IGNORED if i in (2, 20) else label for i, (_, label) in enumerate(training.samples)]
    assert [path for batch in got for path in batch.bad] == bad


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_bad_the_file_is_named_in_one_sentence(workers: int, training: Split) -> None:
    (bad,) = damage(training, 9)
    for loader in (
        training_loader(training, DATA_CONFIG, replace(AUGMENTED, workers=workers))[0],
        plain_loader(training, DATA_CONFIG, 5, workers),
    ):
        with pytest.raises(DataError) as error:
            list(batches(loader))
        assert str(error.value).startswith(f"cannot read the image {bad} (UnidentifiedImageError")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_at_all(workers: int, training: Split) -> None:
    damage(training, *range(32))
    loader, _ = training_loader(training, DATA_CONFIG, replace(AUGMENTED, skip_bad_images=True, workers=workers))
    with pytest.raises(DataError, match=r"^none of the 32 images can be read, the first is .*/train/blue/0\.png$"):
        list(batches(loader))
    images = plain_loader(training, DATA_CONFIG, 5, workers, skip_bad=True)
    with pytest.raises(DataError, match="no readable image"):
        accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2)), batches(images), torch.device("cpu"))


class Killer:
    """A transform in whose middle the kernel kills the process, as it does when the memory is used up."""

    def __call__(self, image: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_is_one_sentence_about_memory(training: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = plain_loader(training, DATA_CONFIG, 4, 1)
    monkeypatch.setattr(loader.dataset, "transform", Killer())
    with pytest.raises(DataError) as error:
        list(batches(loader))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("a process that loads images has died (DataLoader worker (pid")
    assert str(error.value).endswith("perhaps for want of memory or of space in /dev/shm; use fewer --workers")


def test_a_worker_killed_while_the_main_process_computes(
    colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[Any] = []
    killed: list[int] = []
    make = loop.training_loader

    def spy(*arguments: Any) -> Any:
        loaders.append(make(*arguments)[0])
        return loaders[0], loaders[0].batch_sampler

    def step(*arguments: Any, **more: Any) -> None:
        """Of the optimizer, which must not be torn by the death of another process."""
        if killed:
            return
        killed.append(loaders[0]._iterator._workers[0].pid)
        os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.2)

    monkeypatch.setattr(loop, "training_loader", spy)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    settings = config(colors, tmp_path / "run", workers=1, norm="bn")
    with pytest.raises(DataError, match=r"a process that loads images has died .* use fewer --workers"):
        cbn.finetune(settings, quiet=True)


def test_other_errors_stay_what_they_are(training: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: Any) -> Tensor:
        raise RuntimeError("a fault of this package")

    loader = plain_loader(training, DATA_CONFIG, 4, 0)
    monkeypatch.setattr(loader.dataset, "transform", broken)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        list(batches(loader))


@pytest.mark.parametrize(
    ("batch", "size", "expected"), [(2, 224, 32), (2, 32, 32), (64, 224, 64), (2, 448, 8), (16, 448, 16), (2, 4096, 2)]
)
def test_an_evaluation_takes_as_many_images_as_fit(batch: int, size: int, expected: int) -> None:
    assert evaluation_batch(batch, {"input_size": (3, size, size)}) == expected
