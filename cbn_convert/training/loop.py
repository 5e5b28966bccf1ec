"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..conversion import warm_up
from ..deploy import export
from ..errors import CbnWarning, DataError, DivergedError, RunError, first_line
from ..files import write_json
from . import checkpoint
from .advice import advice, measure
from .alternatives import restore_norm
from .config import FinetuneConfig, FinetuneResult
from .evaluation import Evaluation, accuracy
from .faults import StopSignals, TrainingInterrupted, one_value, out_of_memory
from .learner import Learner
from .loading import batches, evaluation_batch, plain_loader, training_loader
from .metrics import MetricsLog, draw_curves
from .parallel import Ranks
from .progress import Progress
from .recalibration import recalibrate
from .setup import Setup, total_steps

WARM_UP_IMAGES = 64  # to see how statistics respond to the weights
LOG_EVERY = 20  # updates between records of the training loss, the only moments at which a GPU is waited for


@dataclass
class RunState:
    """What a run knows beside its weights; in every checkpoint, as a whole."""

    bad_images: list[str]  # files that could not be read
    evaluated: int = -1  # the step of the last evaluation
    best_top1: float = -1.0
    best_top5: float = 0.0
    best_epoch: int = 0
    best_step: int = 0
    last_top1: float = 0.0
    without_best: int = 0  # evaluations since the best
    skipped: int = 0  # updates
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # of these, for images
    shift: float | None = None  # see `advice.measure`


class Trainer:
    """One run, from its first step or its newest checkpoint to its end."""

    def __init__(
        self, config: FinetuneConfig, folder: Path, setup: Setup, accelerator: Accelerator, ranks: Ranks
    ) -> None:
        self.config, self.folder, self.setup, self.ranks = config, folder, setup, ranks
        self.accelerator, self.device = accelerator, accelerator.device
        self.loader, self.sampler = training_loader(setup.training, setup.data_config, config, ranks.rank, ranks.count)
        self.val_loader = plain_loader(
            setup.validation, setup.data_config, evaluation_batch(config.batch_size, setup.data_config), config.workers,
            skip_bad=config.skip_bad_images,
            indices=range(ranks.rank, len(setup.validation.samples), ranks.count),
        )  # fmt: skip
        self.steps = total_steps(config, self.sampler)
        self.eval_every = config.eval_every or self.sampler.updates
        self.learner = Learner(config, setup, accelerator, ranks, self.steps)
        self.model, self.totals = self.learner.model, self.learner.totals
        self.state = RunState([])
        self.step_seconds: list[float] = []

    @property
    def step(self) -> int:
        """Updates of the weights that are done."""
        return self.learner.updates

    def train(self, resumed: bool, quiet: bool) -> FinetuneResult:
        """All updates that are to come, with their evaluations and checkpoints."""
        records = self._restore() if resumed else None
        if self.config.tracker:
            self.accelerator.init_trackers("cbn", {k: str(v) for k, v in self.config.to_dict().items()})
        if self.ranks.main:
            track = self.accelerator.log if self.config.tracker else None
            self.log = MetricsLog(self.folder, records or 0, track)
        with StopSignals() as self.signals, Progress(self.steps, self.step, quiet) as self.progress:
            if records is None:
                try:
                    self._advise()
                    set_seed(self.config.seed + self.ranks.rank)
                    self._warm_up()
                except DataError as error:
                    if number := self.signals.received:  # it was for the processes that load images, too
                        raise TrainingInterrupted(number, self.step, self.config.data, str(self.folder)) from error
                    raise
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(self.config.batch_size, self.device) from error
                self._save()
            try:
                while not self._finished():
                    self._train_epoch()
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.config.batch_size, self.device) from error
            except ValueError as error:
                if told := one_value(error, "use --norm cbn, or a larger --batch-size or --img-size"):
                    raise told from error
                raise
            finally:
                self.loader.end()
                self.val_loader.end()
        if self.state.best_top1 < 0:
            raise DivergedError(
                f"no evaluation gave a finite loss; start again with a lower --lr (it was {self.learner.lr:g})"
            )
        if self.config.tracker:
            self.accelerator.end_training()
        return self._result()

    def _advise(self) -> None:
        """Says what the study knows of this norm on images like these."""
        with self.accelerator.autocast():
            self.state.shift = measure(self.model, self.setup, self.config, self.device, self._interrupted)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # which is to be that of training
        if text := advice(self.config, self.state.shift):
            self.progress.line(text)

    def _warm_up(self) -> None:
        """Begins the history under the weights that training starts from."""
        if self.config.norm == "cbn" and not self.config.burn_in:  # which would be over before the first update
            self.sampler.start(epoch=-1)
            window = self.config.normalization_window()
            count = -(-WARM_UP_IMAGES // self.config.batch_size)
            if not window.is_carried:
                count = min(count, window.size)
            images = (
                self.learner.on_device(batch.images) for batch in islice(batches(self.loader, self._interrupted), count)
            )
            with self.accelerator.autocast():
                warm_up(self.model, images)

    def _interrupted(self) -> bool:
        """Whether a signal came that this process may heed in the middle: several must agree, after an update."""
        return self.ranks.count == 1 and bool(self.signals.received)

    @property
    def stopped_early(self) -> bool:
        """Whether there were `patience` evaluations without a new best."""
        return self.config.patience is not None and self.state.without_best >= self.config.patience

    def _finished(self) -> bool:
        """Evaluates and saves where that is due; whether the run is at its end. Raises TrainingInterrupted."""
        due = self.step > 0 and (self.step % self.eval_every == 0 or self.step == self.steps)
        if due and self.state.evaluated != self.step:
            self._record()
            if (evaluated := self._evaluate()) is not None:
                self._after_evaluation(*evaluated)
                del evaluated  # with recalibration it holds a second model, for which training may have no memory
                self._save()
        if number := int(self.ranks.largest(self.signals.received)):
            self._save()
            raise TrainingInterrupted(number, self.step, self.config.data, str(self.folder))
        return self.step >= self.steps or self.stopped_early

    def _train_epoch(self) -> None:
        """From the update that the run is at to the end of the epoch or to the next evaluation."""
        self.sampler.start(*divmod(self.step, self.sampler.updates))
        images = batches(self.loader, self._interrupted)
        self.learner.wrapped.train()
        started = time.perf_counter()
        for _ in range(min(self.sampler.updates - self.sampler.first, self.steps - self.step)):
            try:
                parts = list(islice(images, self.sampler.accumulate))
            except DataError:
                if self.signals.received:  # it was for the processes that load images, too
                    return
                raise
            self.state.wait_seconds += time.perf_counter() - started
            self.state.bad_images += [path for batch in parts for path in batch.bad]
            self.learner.update(parts)
            now = time.perf_counter()
            self.step_seconds.append(now - started)
            self.state.train_seconds += now - started
            self.progress.advance(self.sampler.batch * self.sampler.accumulate * self.ranks.count)
            if self.step % LOG_EVERY == 0:
                self._record()
            if self._finished():
                break
            if self.config.save_every and self.step % self.config.save_every == 0 and self.state.evaluated != self.step:
                self._save()
            if self.state.evaluated == self.step:
                self.learner.wrapped.train()
            started = time.perf_counter()

    def _record(self) -> None:
        """Writes the mean loss and top-1 since the last record."""
        if not self.totals.updates:
            return
        self.learner.stop_if_bad()
        loss, top1, skipped = self.totals.take()
        self.state.skipped += skipped
        if self.ranks.main:
            more = {"skipped": self.state.skipped} if self.state.skipped else {}
            self.log.write(
                event="train", step=self.step, epoch=self._epoch, lr=self.totals.lr, loss=loss, top1=top1, **more
            )
        self.progress.show(loss, top1)

    @property
    def _epoch(self) -> int:
        """The epoch of the last update, from 1 on."""
        return math.ceil(self.step / self.sampler.updates)

    def _evaluate(self) -> tuple[Any, Evaluation] | None:
        """The model that may be the best, and what it gives; None if a signal came."""
        candidate: Any = self.model
        self.ranks.average_statistics(self.model)
        if self.learner.ema is not None:
            candidate = self.learner.ema.module
            self.ranks.average_statistics(candidate)
        try:
            with self.accelerator.autocast():
                if self.config.recalibration_batches:
                    candidate = deepcopy(candidate)
                    restore_norm(candidate)
                    recalibrate(candidate, self._recalibration_images(), self.setup.frozen)
                images = batches(self.val_loader, self._interrupted)
                result = accuracy(candidate, images, self.device, self.ranks, self._interrupted)
                return None if result is None else (candidate, result)
        except DataError:
            if self._interrupted():  # the signal was for the processes that load images, too
                return None
            raise

    def _recalibration_images(self) -> Iterator[Tensor]:
        """The same training images in every process and at every evaluation, as evaluation sees them."""
        size = evaluation_batch(self.config.batch_size, self.setup.data_config)
        total = len(self.setup.training.samples)
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(total, generator=generator)[: size * self.config.recalibration_batches].tolist()
        chosen = chosen[: max(1, len(chosen) // size) * size]  # a mean over equal batches, none of them of one image
        loader = plain_loader(
            self.setup.training, self.setup.data_config, size, self.config.workers,
            skip_bad=self.config.skip_bad_images, indices=chosen,
        )  # fmt: skip
        for batch in batches(loader, self._interrupted):
            read = batch.images[batch.labels >= 0]
            if len(read) >= min(size, 2):  # the rest could not be read, and one image is no batch
                yield self.learner.on_device(read)

    def _after_evaluation(self, candidate: Any, result: Evaluation) -> None:
        self.state.evaluated = self.step
        self.state.last_top1 = result.top1
        self.state.bad_images = self.ranks.union([*self.state.bad_images, *result.bad_images])
        self.state.without_best += 1
        better = result.top1 > self.state.best_top1 and math.isfinite(result.loss)
        if better:
            self.state.best_top1, self.state.best_top5, self.state.without_best = result.top1, result.top5, 0
            self.state.best_epoch, self.state.best_step = self._epoch, self.step
        if not self.ranks.main:
            return
        self.log.write(
            event="eval", step=self.step, epoch=self._epoch, loss=result.loss, top1=result.top1, top5=result.top5,
            train_seconds=self.state.train_seconds, images_per_second=self._images_per_second,
            loader_wait=self.state.wait_seconds / max(self.state.train_seconds, 1e-9),
        )  # fmt: skip
        self.progress.line(
            f"epoch {self._epoch}/{math.ceil(self.steps / self.sampler.updates)}, step {self.step}: validation top-1 "
            f"{result.top1:.2f} %, loss {result.loss:.4f}"
        )
        if better:
            export(
                candidate, self.folder / "best", class_names=self.setup.training.classes,
                data_config=self.setup.data_config,
                metadata={**self.config.summary(self.ranks.count), "top1": result.top1, "epoch": self._epoch},
                overwrite=True,
            )  # fmt: skip
            write_json(
                self.folder / "results.json",
                {
                    **result.to_dict(), "step": self.step, "epoch": self._epoch, "classes": self.setup.training.classes,
                    "confusion": result.confusion,
                },
            )  # fmt: skip
        draw_curves({self.config.norm: self.folder}, self.folder / "curves.png")

    @property
    def _images_per_second(self) -> float:
        images = self.step * self.sampler.batch * self.sampler.accumulate * self.ranks.count
        return images / max(self.state.train_seconds, 1e-9)

    def _save(self) -> None:
        """Writes a checkpoint of this moment."""
        self.learner.stop_if_bad()
        self.state.bad_images = self.ranks.union(self.state.bad_images)
        shared = None
        if self.ranks.main:
            shared = {
                **self.learner.state(),
                "state": asdict(self.state),
                "updates_per_epoch": self.sampler.updates,
                "records": self.log.records,
            }
        checkpoint.save(self.folder, self.step, shared, self.learner.own_state(), self.config.keep, self.ranks)

    def _restore(self) -> int | None:
        """Puts everything back as it was at the newest good checkpoint; the records of metrics.jsonl that it knows of.

        None if there is no checkpoint: the run begins anew.
        """
        loaded = checkpoint.load(self.folder, self.ranks)
        if loaded is None:
            return None
        records = self.ranks.agreed(lambda: self._put_back(*loaded))
        lost = self.state.best_step > 0 and not (self.folder / "best" / "model.safetensors").is_file()
        if self.ranks.largest(int(lost)):
            self.state.best_top1, self.state.evaluated = -1.0, -1
            warnings.warn(f"{self.folder}/best is lost; the next evaluation writes it anew", CbnWarning, stacklevel=2)
        return records

    def _put_back(self, shared: dict[str, Any], own: dict[str, Any], count: int) -> int:
        try:
            self.learner.load(shared, own, count == self.ranks.count)
            self.state = RunState(**shared["state"])
            if count != self.ranks.count:
                self._resume_with_other_ranks(count, shared["updates_per_epoch"])
            return int(shared["records"])
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(self.config.batch_size, self.device) from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint in {self.folder} is damaged, or of another model or version "
                f"({first_line(error)}); start again with --overwrite, or delete {self.folder} if a "
                "comparison is to train it again"
            ) from error

    def _resume_with_other_ranks(self, before: int, updates: int) -> None:
        """The same part of the epoch is done, in updates of another number of images."""
        epoch, done = divmod(self.step, updates)
        was_evaluated = self.state.evaluated == self.step
        self.learner.updates = epoch * self.sampler.updates + round(done / updates * self.sampler.updates)
        self.state.evaluated = self.step if was_evaluated else -1
        set_seed(self.config.seed + self.ranks.rank + self.step)
        warnings.warn(
            f"the run in {self.folder} had {before} processes and goes on with {self.ranks.count}, so that its steps "
            "see other numbers of images",
            CbnWarning,
            stacklevel=2,
        )

    def _result(self) -> FinetuneResult:
        peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else None
        return FinetuneResult(
            output=str(self.folder),
            norm=self.config.norm,
            steps=self.step,
            best_top1=self.state.best_top1,
            best_top5=self.state.best_top5,
            best_epoch=self.state.best_epoch,
            best_step=self.state.best_step,
            last_top1=self.state.last_top1,
            train_seconds=self.state.train_seconds,
            median_step_seconds=statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            images_per_second=self._images_per_second,
            loader_wait=self.state.wait_seconds / max(self.state.train_seconds, 1e-9),
            peak_memory=peak,
            skipped=self.state.skipped,
            bad_images=self.state.bad_images,
            stopped_early=self.stopped_early and self.step < self.steps,
            statistics_shift=self.state.shift,
            advice=advice(self.config, self.state.shift),
        )
