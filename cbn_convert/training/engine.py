"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from ..conversion import warm_up
from ..deploy import export
from ..errors import CbnWarning, DataError, DivergedError, RunError
from ..files import write_json
from . import checkpoint
from .advice import advice, measure
from .config import FinetuneConfig, FinetuneResult, read_run
from .environment import compare_environment, make_accelerator
from .evaluation import Evaluation, accuracy
from .faults import StopSignals, TrainingInterrupted, one_value, out_of_memory
from .learner import Learner
from .loading import batches, evaluation_batch, plain_loader, training_loader
from .metrics import MetricsLog, draw_curves
from .norms import restore_norm
from .parallel import Ranks
from .progress import Progress
from .recalibration import recalibrate
from .setup import Setup, build, check_new, owned, prepare_folder, total_steps

WARM_UP_IMAGES = 64  # to see how statistics respond to the weights
LOG_EVERY = 20  # updates between records of the training loss, the only moments at which a GPU is waited for


def finetune(
    config: FinetuneConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> FinetuneResult:
    """Fine-tunes a model on an image folder; writes and returns the outcome.

    The run folder holds config.json, metrics.jsonl, curves.png, results.json, checkpoints/ (for `resume`) and best/
    (the weights with the highest validation top-1, a folder that plain timm loads). With `resume`, `config` must be
    that of the run; on a CPU it then ends in the same weights as without the interruption. Under torchrun or
    `accelerate launch` all processes call this.

    The first SIGINT or SIGTERM ends the run after the step that is under way, or before it where its images have to be
    waited for, with a checkpoint and TrainingInterrupted, a KeyboardInterrupt. Raises RunError, DataError, ModelError
    or ConversionError, each naming the argument or the file; RunError also if a gradient is not finite, the memory of
    the GPU is not enough, or nothing can be written.
    """
    run = Path(config.output)
    config.check()
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # of a run before this one in the same process
    ranks = Ranks()
    if resume:
        read_run(run)
    else:
        ranks.told(lambda: check_new(run, config.data, overwrite))
    # a run that was killed before its first checkpoint starts again
    setup = build(config, resumed=resume and bool(checkpoint.checkpoints(run)))
    if resume:
        stored = read_run(run)
        compare_environment(str(run), stored.get("environment"))
        if (stored["classes"], stored["images"]) != (setup.training.classes, setup.images):
            raise RunError(
                f"{config.data} has other images than the run in {run}; resume with the data it was started with"
            )
    trainer = _Trainer(config, run, setup, accelerator, ranks)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(owned(run))
            if not resume:
                prepare_folder(run, config, setup, ranks.count)

        ranks.told(begin)
        return trainer.train(resume, quiet or not ranks.main)


class _Trainer:
    def __init__(self, config: FinetuneConfig, run: Path, setup: Setup, accelerator: Accelerator, ranks: Ranks) -> None:
        self.config, self.run, self.setup, self.ranks = config, run, setup, ranks
        self.accelerator, self.device = accelerator, accelerator.device
        self.loader, self.sampler = training_loader(setup.training, setup.data_config, config, ranks.rank, ranks.count)
        self.val_loader = plain_loader(
            setup.validation, setup.data_config, evaluation_batch(config.batch_size, setup.data_config), config.workers,
            skip_bad=config.skip_bad_images, rank=ranks.rank, ranks=ranks.count,
        )  # fmt: skip
        self.steps = total_steps(config, self.sampler)
        self.eval_every = config.eval_every or self.sampler.updates
        self.learner = Learner(config, setup, accelerator, ranks, self.steps)
        self.model, self.totals = self.learner.model, self.learner.totals
        self.evaluated = -1  # the step of the last evaluation
        self.best_top1, self.best_top5, self.best_epoch, self.best_step, self.last_top1 = -1.0, 0.0, 0, 0, 0.0
        self.without_best = 0
        self.skipped = 0
        self.shift: float | None = None
        self.bad_images: list[str] = []
        self.train_seconds = self.wait_seconds = 0.0
        self.step_seconds: list[float] = []

    @property
    def step(self) -> int:
        """Updates of the weights that are done."""
        return self.learner.updates

    def train(self, resume: bool, quiet: bool) -> FinetuneResult:
        records = self._restore() if resume else None
        if self.config.tracker:
            self.accelerator.init_trackers("cbn", {k: str(v) for k, v in self.config.to_dict().items()})
        if self.ranks.main:
            track = self.accelerator.log if self.config.tracker else None
            self.log = MetricsLog(self.run, records or 0, track)
        with StopSignals() as self.signals, Progress(self.steps, self.step, quiet) as self.progress:
            if records is None:
                try:
                    self._advise()
                    set_seed(self.config.seed + self.ranks.rank)
                    self._warm_up()
                except DataError as error:
                    if number := self.signals.received:  # it was for the processes that load images, too
                        raise TrainingInterrupted(number, self.step, str(self.run)) from error
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
        if self.best_top1 < 0:
            raise DivergedError(
                f"no evaluation gave a finite loss; start again with a lower --lr (it was {self.learner.lr:g})"
            )
        if self.config.tracker:
            self.accelerator.end_training()
        return self._result()

    def _advise(self) -> None:
        """Says what the study knows of this norm on images like these."""
        with self.accelerator.autocast():
            self.shift = measure(self.model, self.setup, self.config, self.device, self._interrupted)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # which is to be that of training
        if text := advice(self.config, self.shift):
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
        return self.config.patience is not None and self.without_best >= self.config.patience

    def _finished(self) -> bool:
        """Evaluates and saves where that is due; whether the run is at its end. Raises TrainingInterrupted."""
        due = self.step > 0 and (self.step % self.eval_every == 0 or self.step == self.steps)
        if due and self.evaluated != self.step:
            self._record()
            if (result := self._evaluate()) is not None:
                self._after_evaluation(result)
                self._save()
        if number := int(self.ranks.largest(self.signals.received)):
            self._save()
            raise TrainingInterrupted(number, self.step, str(self.run))
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
            self.wait_seconds += time.perf_counter() - started
            self.bad_images += [path for batch in parts for path in batch.bad]
            self.learner.update(parts)
            now = time.perf_counter()
            self.step_seconds.append(now - started)
            self.train_seconds += now - started
            self.progress.advance(self.sampler.batch * self.sampler.accumulate * self.ranks.count)
            if self.step % LOG_EVERY == 0:
                self._record()
            if self._finished():
                break
            if self.config.save_every and self.step % self.config.save_every == 0 and self.evaluated != self.step:
                self._save()
            if self.evaluated == self.step:
                self.learner.wrapped.train()
            started = time.perf_counter()

    def _record(self) -> None:
        """Writes the mean loss and top-1 since the last record."""
        if not self.totals.updates:
            return
        self.learner.stop_if_bad()
        loss, top1, skipped = self.totals.take()
        self.skipped += skipped
        if self.ranks.main:
            more = {"skipped": self.skipped} if self.skipped else {}
            self.log.write(
                event="train", step=self.step, epoch=self._epoch, lr=self.totals.lr, loss=loss, top1=top1, **more
            )
        self.progress.show(loss, top1)

    @property
    def _epoch(self) -> int:
        """The epoch of the last update, from 1 on."""
        return math.ceil(self.step / self.sampler.updates)

    def _evaluate(self) -> Evaluation | None:
        """None if a signal came."""
        self.candidate: Any = self.model
        self.ranks.average_statistics(self.model)
        if self.learner.ema is not None:
            self.candidate = self.learner.ema.module
            self.ranks.average_statistics(self.candidate)
        try:
            with self.accelerator.autocast():
                if self.config.recalibration_batches:
                    self.candidate = deepcopy(self.candidate)
                    restore_norm(self.candidate)
                    recalibrate(self.candidate, self._recalibration_images(), self.setup.frozen)
                images = batches(self.val_loader, self._interrupted)
                return accuracy(self.candidate, images, self.device, self.ranks, self._interrupted)
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

    def _after_evaluation(self, result: Evaluation) -> None:
        self.evaluated = self.step
        self.last_top1 = result.top1
        self.bad_images = self.ranks.union([*self.bad_images, *result.bad_images])
        self.without_best += 1
        better = result.top1 > self.best_top1 and math.isfinite(result.loss)
        if better:
            self.best_top1, self.best_top5, self.without_best = result.top1, result.top5, 0
            self.best_epoch, self.best_step = self._epoch, self.step
        if not self.ranks.main:
            return
        self.log.write(
            event="eval", step=self.step, epoch=self._epoch, loss=result.loss, top1=result.top1, top5=result.top5,
            train_seconds=self.train_seconds, images_per_second=self._images_per_second,
            loader_wait=self.wait_seconds / max(self.train_seconds, 1e-9),
        )  # fmt: skip
        self.progress.line(
            f"epoch {self._epoch}/{math.ceil(self.steps / self.sampler.updates)}, step {self.step}: validation top-1 "
            f"{result.top1:.2f} %, loss {result.loss:.4f}"
        )
        if better:
            export(
                self.candidate, self.run / "best", class_names=self.setup.training.classes,
                data_config=self.setup.data_config,
                metadata={**self.config.summary(), "top1": result.top1, "epoch": self._epoch}, overwrite=True,
            )  # fmt: skip
            write_json(
                self.run / "results.json",
                {
                    **result.to_dict(), "step": self.step, "epoch": self._epoch, "classes": self.setup.training.classes,
                    "confusion": result.confusion,
                },
            )  # fmt: skip
        draw_curves({self.config.norm: self.run}, self.run / "curves.png")

    @property
    def _images_per_second(self) -> float:
        images = self.step * self.sampler.batch * self.sampler.accumulate * self.ranks.count
        return images / max(self.train_seconds, 1e-9)

    _PROGRESS = (
        "evaluated", "best_top1", "best_top5", "best_epoch", "best_step", "last_top1", "without_best",
        "skipped", "train_seconds", "wait_seconds", "shift",
    )  # fmt: skip

    def _save(self) -> None:
        """Writes a checkpoint of this moment."""
        self.learner.stop_if_bad()
        self.bad_images = self.ranks.union(self.bad_images)
        shared = None
        if self.ranks.main:
            shared = {
                **self.learner.state(),
                "progress": {name: getattr(self, name) for name in self._PROGRESS},
                "updates_per_epoch": self.sampler.updates,
                "bad_images": self.bad_images,
                "records": self.log.records,
            }
        checkpoint.save(self.run, self.step, shared, self.learner.own_state(), self.config.keep, self.ranks)

    def _restore(self) -> int | None:
        """Puts everything back as it was at the newest good checkpoint; the records of metrics.jsonl that it knows of.

        None if there is no checkpoint: the run begins anew.
        """
        loaded = checkpoint.load(self.run, self.ranks)
        if loaded is None:
            return None
        records = self.ranks.agreed(lambda: self._put_back(*loaded))
        lost = self.best_step > 0 and not (self.run / "best" / "model.safetensors").is_file()
        if self.ranks.largest(int(lost)):
            self.best_top1, self.evaluated = -1.0, -1
            warnings.warn(f"{self.run}/best is lost; the next evaluation writes it anew", CbnWarning, stacklevel=2)
        return records

    def _put_back(self, shared: dict[str, Any], own: dict[str, Any], count: int) -> int:
        try:
            self.learner.load(shared, own, count == self.ranks.count)
            for name, value in shared["progress"].items():
                setattr(self, name, value)
            self.bad_images = list(shared["bad_images"])
            if count != self.ranks.count:
                self._resume_with_other_ranks(count, shared["updates_per_epoch"])
            return int(shared["records"])
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(self.config.batch_size, self.device) from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint in {self.run} is damaged, or of another model or version "
                f"({str(error).splitlines()[0]}); start again with --overwrite"
            ) from error

    def _resume_with_other_ranks(self, before: int, updates: int) -> None:
        """The same part of the epoch is done, in updates of another number of images."""
        epoch, done = divmod(self.step, updates)
        was_evaluated = self.evaluated == self.step
        self.learner.updates = epoch * self.sampler.updates + round(done / updates * self.sampler.updates)
        self.evaluated = self.step if was_evaluated else -1
        set_seed(self.config.seed + self.ranks.rank + self.step)
        warnings.warn(
            f"the run in {self.run} had {before} processes and goes on with {self.ranks.count}, so that its steps see "
            "other numbers of images",
            CbnWarning,
            stacklevel=2,
        )

    def _result(self) -> FinetuneResult:
        peak = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else None
        return FinetuneResult(
            output=str(self.run),
            norm=self.config.norm,
            steps=self.step,
            best_top1=self.best_top1,
            best_top5=self.best_top5,
            best_epoch=self.best_epoch,
            best_step=self.best_step,
            last_top1=self.last_top1,
            train_seconds=self.train_seconds,
            median_step_seconds=statistics.median(self.step_seconds) if self.step_seconds else 0.0,
            images_per_second=self._images_per_second,
            loader_wait=self.wait_seconds / max(self.train_seconds, 1e-9),
            peak_memory=peak,
            skipped=self.skipped,
            bad_images=self.bad_images,
            stopped_early=self.stopped_early and self.step < self.steps,
            statistics_shift=self.shift,
            advice=advice(self.config, self.shift),
        )
