"""Which images a step sees, and how they get there.

Everything random about an image depends on the seed, the epoch and its place in the epoch alone. So a run that goes on
after an interruption sees the same images, changed in the same way, with any number of worker processes.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..errors import CbnWarning, DataError, RunError, first_line, printable
from .channels import MODES, blank
from .config import FinetuneConfig
from .settings import DataSettings
from .splits import Split
from .transforms import PlainTransform

Item = tuple[int, int | None]  # the index of an image, and the seed of its changes

IGNORED = -100  # the label of an image that could not be read, as torch's losses know it
PREFETCH = 4  # batches that each worker is ahead; at one or two images a batch torch's 2 are soon used up
LONGEST_WAIT = 600.0  # seconds without a batch, after which a run takes its loading processes for stuck
LONGEST_GOODBYE = 10.0  # seconds; torch looks every five whether its processes live
POLL = 0.2  # seconds between two looks at whether a wait should end
# Activations without gradients of so many images of 224 px fit wherever two of a training step do.
EVALUATION_PIXELS = 32 * 224**2


class Batch(NamedTuple):
    """Images [N, C, H, W], labels [N], and the files among them that could not be read."""

    images: Tensor
    labels: Tensor
    bad: list[str]


Answers = queue.SimpleQueue[tuple[Batch | None, BaseException | None]]


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
                bad.append(printable(path))
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
) -> tuple[ImageLoader, StepSampler]:
    """The loader of one process's share, and the sampler that says which epoch it is.

    Raises DataError as `StepSampler` does, and for an augmentation that timm does not make; RunError for changes of
    colours in images that have none.

    Args:
        split: the training images.
        data_config: as timm's resolve_model_data_config gives it.
        config: the settings of the run.
        rank, ranks: which process it is, and of how many.
    """
    weights = None
    if config.class_balance == "sample":
        counts = torch.tensor(split.counts(), dtype=torch.float64)
        weights = (1 / counts)[[label for _, label in split.samples]]
    sampler = StepSampler(
        len(split.samples), config.batch_size, config.seed, accumulate=config.accumulate, rank=rank, ranks=ranks,
        weights=weights,
    )  # fmt: skip
    channels = data_config["input_size"][0]
    images = ImageList(split, _training_transform(data_config, config), channels, config.skip_bad_images)
    return _loader(images, config.workers, batch_sampler=sampler), sampler


def _training_transform(data_config: dict[str, Any], settings: DataSettings) -> Any:
    """timm's random changes of an image. Raises DataError for a policy that there is not."""
    if settings.no_aug:
        return PlainTransform(data_config)
    jitter = _color_jitter(settings, data_config["input_size"][0])
    try:
        return create_transform(
            **data_config, is_training=True, color_jitter=jitter, auto_augment=settings.auto_augment,
            scale=(settings.min_scale, 1.0), hflip=settings.hflip, vflip=settings.vflip,
            re_prob=settings.random_erasing, re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"timm makes no augmentation of auto_augment {settings.auto_augment!r} ({error}); "
            "give a policy such as rand-m9-mstd0.5"
        ) from error


def _color_jitter(settings: DataSettings, channels: int) -> float | None:
    """Its strength; None, with a CbnWarning, for images of which nobody knows what their channels are.

    Raises RunError if it was asked for, or a policy of colour changes.
    """
    if channels in MODES or not (settings.color_jitter or settings.auto_augment):
        return settings.color_jitter or None
    for name in ("auto_augment", "color_jitter"):
        if getattr(settings, name) not in (0, getattr(DataSettings, name)):
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
    indices: Iterable[int] | None = None,
) -> ImageLoader:
    """Images once each, unchanged, in order.

    Args:
        split: the images.
        data_config: as in `training_loader`.
        batch_size: images per batch.
        workers: processes that load; 0 for none beside this one.
        skip_bad: whether an image that cannot be read is labelled IGNORED, in place of a DataError.
        indices: places in `split.samples`, in the order that is wanted; None for all.
    """
    images = ImageList(split, PlainTransform(data_config), data_config["input_size"][0], skip_bad)
    chosen = range(len(split.samples)) if indices is None else indices
    return _loader(images, workers, batch_size=batch_size, sampler=[(i, None) for i in chosen])


def evaluation_batch(batch_size: int, data_config: dict[str, Any]) -> int:
    """Images per batch of an evaluation, which keeps no activations: as many as 32 of 224 px, but not fewer."""
    _, height, width = data_config["input_size"]
    return max(batch_size, min(32, EVALUATION_PIXELS // (height * width)))


class ImageLoader(DataLoader[Any]):
    """torch's loader, which knows the processes that it has started, and the threads that wait for them."""

    processes: frozenset[Any] = frozenset()
    readers: frozenset[Reader] = frozenset()

    def __iter__(self) -> Any:
        before = multiprocessing.active_children()
        try:
            return super().__iter__()
        finally:  # those of an earlier iteration go on
            self.processes |= frozenset(multiprocessing.active_children()).difference(before)

    def end(self) -> None:
        """Ends the processes at once, even those that do not answer; the loader is of no use after it.

        And the threads: one that is inside of torch when Python ends would abort it.
        """
        for reader in self.readers:
            reader.leave(POLL)
        in_main = threading.current_thread() is threading.main_thread()
        # torch's handler, which another loader of this process may have set, would take it for a fault
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
        try:
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.join(5)
            for reader in self.readers:
                reader.leave(LONGEST_GOODBYE)
        finally:
            if in_main:
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _loader(images: ImageList, workers: int, **batching: Any) -> ImageLoader:
    ahead: dict[str, Any] = (
        {"prefetch_factor": PREFETCH, "persistent_workers": True, "worker_init_fn": _in_worker} if workers else {}
    )
    return ImageLoader(
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
    batch = Batch(torch.stack(images), torch.tensor(labels), [path for paths in bad for path in paths])
    if get_worker_info() is not None:
        # here, where a failure is an exception; the thread that hands batches over would only print it
        try:
            batch.images.share_memory_()
            batch.labels.share_memory_()
        except RuntimeError as error:
            reason = first_line(error)
            if "Too many open files" in reason:
                raise _too_many_files() from error
            raise DataError(
                f"a batch of {len(images)} images does not fit into the shared memory of processes, /dev/shm "
                f"({reason}); use --workers 0, or make it larger, in a container with docker run --shm-size=8g"
            ) from error
    return batch


def _in_worker(number: int) -> None:
    """Ctrl-C goes to all processes, but the main one needs the images of the step that it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(loader: ImageLoader, interrupted: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
    """Iterates; an error about an image arrives as one sentence even from a worker process.

    Raises DataError also where a batch has to be waited for and `interrupted()`, or none comes for LONGEST_WAIT.
    """
    try:
        yield from _awaited(loader, interrupted) if loader.num_workers else loader
    except DataError as error:
        # a worker wraps the message into its traceback
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two if it dies while it hands images over
        reason = first_line(error)
        if "Too many open files" in reason or "ancdata" in reason:  # which is how that arrives from a socket
            raise _too_many_files() from error
        if isinstance(error, RuntimeError) and "DataLoader worker" not in reason:
            raise
        raise DataError(
            f"a process that loads images has died ({reason}), perhaps for want of memory or of space in /dev/shm; "
            "use fewer --workers"
        ) from error


def _too_many_files() -> DataError:
    return DataError(
        "the limit of open files is too low for what loading processes hand over; raise it with ulimit -n, or use "
        "--workers 0"
    )


def _awaited(loader: ImageLoader, interrupted: Callable[[], bool]) -> Iterator[Batch]:
    """The batches of loading processes; a thread waits for them, so that the wait can have an end."""
    reader = Reader(loader)
    loader.readers |= {reader}
    try:
        while True:
            reader.asked.put(True)
            try:
                batch, error = _answer(reader.answers, interrupted)
            except BaseException:
                loader.end()  # for they do not answer
                raise
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        reader.leave(0)
        loader.readers -= {reader}


class Reader(threading.Thread):
    """Answers with a batch each time that one is asked for, with None at the end, or with the error in its place."""

    def __init__(self, loader: ImageLoader) -> None:
        super().__init__(daemon=True)
        self.loader = loader
        self.asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.answers: Answers = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """Until it is told to leave."""
        images = None
        while self.asked.get():
            try:
                if images is None:
                    images = _started(self.loader)
                self.answers.put((next(images, None), None))
            except BaseException as error:
                self.answers.put((None, error))

    def leave(self, seconds: float) -> None:
        """Tells the thread to end as soon as the loader answers, for which it waits so long."""
        self.asked.put(False)
        self.join(seconds)


def _started(loader: ImageLoader) -> Iterator[Batch]:
    try:
        return iter(loader)
    except OSError as error:
        raise DataError(
            f"cannot start {loader.num_workers} processes that load images ({error.strerror or error}; what they share "
            "lies in /dev/shm); use fewer --workers, or --workers 0"
        ) from error


def _answer(answers: Answers, interrupted: Callable[[], bool]) -> tuple[Batch | None, BaseException | None]:
    # in looks, not by the clock, which goes on while all processes are stopped
    for _ in range(round(LONGEST_WAIT / POLL)):
        try:
            return answers.get(timeout=POLL)
        except queue.Empty:
            if interrupted():
                raise DataError("a signal came while images were waited for") from None
    raise DataError(
        f"no images have come from the loading processes for {LONGEST_WAIT / 60:.0f} minutes, though they live; see "
        "whether the disk that holds the images answers, or use --workers 0"
    )


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    return zlib.crc32(repr(numbers).encode())
