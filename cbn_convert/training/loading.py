"""Which images a step sees, and how they get there.

Everything random about an image depends on the seed, the epoch and its place in the epoch alone. So a run that goes on
after an interruption sees the same images, changed in the same way, with any number of worker processes.
"""

from __future__ import annotations

import random
import signal
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import CbnWarning, DataError, RunError
from .channels import MODES, blank
from .config import FinetuneConfig
from .data import Split

Item = tuple[int, int | None]  # the index of an image, and the seed of its changes

IGNORED = -100  # the label of an image that could not be read, as torch's losses know it
PREFETCH = 4  # batches that each worker is ahead; at one or two images a batch torch's 2 are soon used up
# Activations without gradients of so many images of 224 px fit wherever two of a training step do.
EVALUATION_PIXELS = 32 * 224**2


class Batch(NamedTuple):
    """Images [N, C, H, W], labels [N], and the files among them that could not be read."""

    images: Tensor
    labels: Tensor
    bad: list[str]


class StepSampler(Sampler[list[Item]]):
    """The batches of one process in one epoch: all images in a random order, the incomplete last step left out.

    With `weights`, one for each image, images are drawn with replacement in proportion to them. The processes take
    neighbouring batches of the same order, so that all of them have as many. Raises DataError if there are fewer images
    than one step of all processes takes; a single process then makes a smaller step of all of them.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        seed: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        if ranks > 1 and images < batch * ranks * accumulate:
            raise DataError(
                f"{images} training images are not enough for one update of {ranks} processes with {accumulate} x "
                f"{batch} images each; use fewer processes"
            )
        self.images, self.seed, self.rank, self.ranks, self.weights = images, seed, rank, ranks, weights
        self.batch = min(batch, images)
        self.accumulate = min(accumulate, images // self.batch)
        self.updates = images // (self.batch * ranks * self.accumulate)  # of the weights, in an epoch
        self.epoch = self.first = 0

    def start(self, epoch: int, update: int = 0) -> None:
        """The next iteration is that of `epoch`, from the update with this number on."""
        self.epoch, self.first = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        if self.weights is None:
            order = torch.randperm(self.images, generator=generator).tolist()
        else:
            order = torch.multinomial(self.weights, self.images, replacement=True, generator=generator).tolist()
        for step in range(self.first * self.accumulate, self.updates * self.accumulate):
            start = (step * self.ranks + self.rank) * self.batch
            yield [(order[i], _mixed(self.seed, self.epoch, i)) for i in range(start, start + self.batch)]


class ImageList(Dataset[Any]):
    """A split with a transform; items are a tensor, a label and the paths of files that could not be read.

    Images have as many `channels` before they are transformed.
    """

    def __init__(self, split: Split, transform: Any, channels: int, skip_bad: bool = False) -> None:
        self.split, self.transform, self.channels, self.skip_bad = split, transform, channels, skip_bad

    def __len__(self) -> int:
        return len(self.split.samples)

    def __getitem__(self, item: Item) -> tuple[Tensor, int, list[str]]:
        index, seed = item
        bad: list[str] = []
        for place in range(index, index + len(self)):
            path, label = self.split.samples[place % len(self)]
            try:
                image = self.split.open(path, channels=self.channels)
            except DataError:
                if not self.skip_bad:
                    raise
                bad.append(path)
                if seed is not None:
                    continue  # another image in its place, so that every step has as many
                image, label = blank(self.channels), IGNORED
            with seeded(seed):
                return self.transform(image), label, bad
        raise DataError(f"none of the {len(self)} images can be read, the first is {self.split.samples[0][0]}")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Runs with the random states of Python, numpy and torch's CPU at `seed`, and puts them back."""
    if seed is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def training_loader(
    split: Split, data_config: dict[str, Any], config: FinetuneConfig, rank: int = 0, ranks: int = 1
) -> tuple[DataLoader[Any], StepSampler]:
    """The loader of one process's share, and the sampler that says which epoch it is."""
    weights = None
    if config.class_balance == "sample":
        counts = torch.tensor(split.counts(), dtype=torch.float64)
        weights = (1 / counts)[[label for _, label in split.samples]]
    sampler = StepSampler(
        len(split.samples), config.batch_size, config.seed, accumulate=config.accumulate, rank=rank, ranks=ranks,
        weights=weights,
    )  # fmt: skip
    channels = data_config["input_size"][0]
    changes = {} if config.no_aug else {
        "scale": (config.min_scale, 1.0), "hflip": config.hflip, "vflip": config.vflip,
        "color_jitter": _color_jitter(config, channels), "auto_augment": config.auto_augment,
        "re_prob": config.random_erasing, "re_mode": "pixel",
    }  # fmt: skip
    try:
        transform = create_transform(**data_config, is_training=not config.no_aug, **changes)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"timm makes no augmentation of auto_augment {config.auto_augment!r} ({error}); "
            "give a policy such as rand-m9-mstd0.5"
        ) from error
    images = ImageList(split, transform, channels, config.skip_bad_images)
    return _loader(images, config.workers, batch_sampler=sampler), sampler


def _color_jitter(config: FinetuneConfig, channels: int) -> float | None:
    """Its strength; None, with a CbnWarning, for images of which nobody knows what their channels are.

    Raises RunError if it was asked for, or a policy of colour changes.
    """
    if channels in MODES or not (config.color_jitter or config.auto_augment):
        return config.color_jitter or None
    for name in ("auto_augment", "color_jitter"):
        if getattr(config, name) not in (0, getattr(FinetuneConfig, name)):
            raise RunError(
                f"{name} changes colours, which images with {channels} channels do not have; leave "
                f"--{name.replace('_', '-')} out"
            )
    warnings.warn(
        f"images with {channels} channels have no colours to change, so --color-jitter is left out",
        CbnWarning,
        stacklevel=3,
    )
    return None


def plain_loader(
    split: Split,
    data_config: dict[str, Any],
    batch_size: int,
    workers: int,
    *,
    skip_bad: bool = False,
    rank: int = 0,
    ranks: int = 1,
    indices: list[int] | None = None,
) -> DataLoader[Any]:
    """Every image once, unchanged, in order; each of `ranks` processes gets every so many-th. `indices`: only those."""
    chosen = (range(len(split.samples)) if indices is None else indices)[rank::ranks]
    transform = create_transform(**data_config, is_training=False)
    images = ImageList(split, transform, data_config["input_size"][0], skip_bad)
    return _loader(images, workers, batch_size=batch_size, sampler=[(i, None) for i in chosen])


def evaluation_batch(batch_size: int, data_config: dict[str, Any]) -> int:
    """Images per batch of an evaluation, which keeps no activations: as many as 32 of 224 px, but not fewer."""
    _, height, width = data_config["input_size"]
    return max(batch_size, min(32, EVALUATION_PIXELS // (height * width)))


def _loader(images: ImageList, workers: int, **batching: Any) -> DataLoader[Any]:
    ahead: dict[str, Any] = (
        {"prefetch_factor": PREFETCH, "persistent_workers": True, "worker_init_fn": _in_worker} if workers else {}
    )
    return DataLoader(
        images,
        num_workers=workers,
        collate_fn=_joined,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: the run's random state must not depend on the loader
        **batching,
        **ahead,
    )


def _joined(items: list[tuple[Tensor, int, list[str]]]) -> Batch:
    images, labels, bad = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), [path for paths in bad for path in paths])


def _in_worker(number: int) -> None:
    """Ctrl-C goes to all processes, but the main one needs the images of the step that it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Iterates; an error about an image arrives as one sentence even from a worker process."""
    try:
        yield from _iterator(loader)
    except DataError as error:
        # a worker wraps the message into its traceback
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two if it dies while it hands images over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
        raise DataError(
            f"a process that loads images has died ({reason}), perhaps for want of memory; use fewer --workers"
        ) from error


def _iterator(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Without torch's handler of SIGCHLD, which raises in the middle of whatever is under way; the queue tells, too."""
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    return zlib.crc32(repr(numbers).encode())
