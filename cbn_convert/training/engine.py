"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from .. import __version__
from ..conversion import warm_up
from ..deploy import export
from ..errors import RunError
from ..files import check_output, check_replaceable, read_json, write_json
from ..models import ModelSpec, create_model, reset_head
from ..norm import CrossIterationMixin
from .checkpoint import load_last, save_last
from .config import FinetuneConfig, FinetuneResult, read_run
from .data import Split, batches, make_loader, read_splits
from .evaluation import accuracy, resolve_device
from .metrics import MetricsLog, draw_curves
from .norms import apply_norm
from .progress import Progress

LOG_EVERY = 20  # steps between records of the training loss, the only moments at which the device is waited for


@dataclass
class _Totals:
    """Sums since the last record, kept on the device so that no step waits for it."""

    sums: Tensor
    images: int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach().float() * len(labels), hits.float()])
        self.images += len(labels)

    def take(self) -> tuple[float, float]:
        """Mean loss and top-1 in percent; starts again from zero."""
        loss, hits = (self.sums / max(self.images, 1)).tolist()
        self.sums.zero_()
        self.images = 0
        return loss, 100 * hits


def finetune(
    config: FinetuneConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> FinetuneResult:
    """Fine-tunes a model on an image folder; writes and returns the outcome.

    The run folder holds config.json, metrics.jsonl, curves.png, checkpoints/last (for `resume`) and best/ (the weights
    with the highest validation top-1, a folder that plain timm loads). With `resume`, `config` must be that of the run.

    Raises RunError, DataError, ModelError or ConversionError, each naming the argument or the file; RunError also if
    the loss is no longer finite.
    """
    run = Path(config.output)
    config.check()
    if not resume:
        check_output(run, overwrite)
        for folder in ("best", "checkpoints/last"):
            check_replaceable(run / folder)
    device = resolve_device(config.device)
    model, training, validation, data_config = _build(config, _own_spec(run) if resume else config.model_spec())
    images = {"train": len(training.samples), "val": len(validation.samples)}
    if resume and (read_run(run)["classes"], read_run(run)["images"]) != (training.classes, images):
        raise RunError(
            f"{config.data} has other images than the run in {run}; resume with the data it was started with"
        )
    if not resume:
        _prepare_folder(run, config, training, data_config, images)
    return _Trainer(config, run, model, device, training, validation, data_config).train(resume, quiet)


def plan(config: FinetuneConfig) -> dict[str, Any]:
    """What `finetune` would do, found out by building everything and writing nothing. Raises what it raises."""
    config.check()
    model, training, validation, data_config = _build(config, config.model_spec())
    layers = [m for m in model.modules() if isinstance(m, CrossIterationMixin)]
    return {
        "model": model.pretrained_cfg["architecture"],
        "norm": config.norm,
        "cross_iteration_layers": len(layers),
        "classes": len(training.classes),
        "training_images": len(training.samples),
        "validation_images": len(validation.samples),
        "input_size": list(data_config["input_size"]),
        "steps_per_epoch": max(1, len(training.samples) // config.batch_size),
    }


def _own_spec(run: Path) -> ModelSpec:
    """The model of a run without the weights that it started from, which need not be there any more."""
    path = run / "best" / "config.json"
    if not path.is_file():
        raise RunError(f"{run} has no checkpoint to resume from; start again with --overwrite")
    about = read_json(path, "model settings")
    kwargs = {k: v for k, v in about.get("model_args", {}).items() if k != "num_classes"}
    cfg = about["pretrained_cfg"]
    return ModelSpec(
        about["architecture"],
        pretrained=False,
        model_kwargs=kwargs,
        mean=cfg["mean"],
        std=cfg["std"],
        img_size=cfg["input_size"][-1],
    )


def _build(config: FinetuneConfig, spec: ModelSpec) -> tuple[Any, Split, Split, dict[str, Any]]:
    """The model with its norm layers and a new head, both splits, and timm's data config."""
    training, validation = read_splits(config.data, config.val_fraction, config.seed)
    set_seed(config.seed)
    model = create_model(spec, len(training.classes))
    reset_head(model)
    data_config = resolve_model_data_config(model)
    apply_norm(
        model, config.norm,
        window=config.window, compensation=config.compensation, gradient=config.gradient, history=config.history,
        burn_in=config.burn_in, example_input=torch.zeros(1, *data_config["input_size"]),
    )  # fmt: skip
    return model, training, validation, data_config


def _prepare_folder(
    run: Path, config: FinetuneConfig, training: Split, data_config: dict[str, Any], images: dict[str, int]
) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        # what an overwritten run left must not be taken for this one's
        for name in ("metrics.jsonl", "curves.png", "best/model.safetensors", "checkpoints/last/training.pt"):
            (run / name).unlink(missing_ok=True)
        versions = {"cbn_convert": __version__, "torch": torch.__version__, "timm": timm.__version__}
        write_json(
            run / "config.json",
            {
                "config": config.to_dict(),
                "classes": training.classes,
                "images": images,
                "data_config": data_config,
                "versions": versions,
            },
        )
    except OSError as error:
        raise RunError(
            f"cannot write {run}: {error.strerror}; choose an output folder that you may write to"
        ) from error


class _Trainer:
    def __init__(
        self,
        config: FinetuneConfig,
        run: Path,
        model: nn.Module,
        device: torch.device,
        training: Split,
        validation: Split,
        data_config: dict[str, Any],
    ) -> None:
        assert config.lr is not None
        self.config, self.run, self.classes, self.lr = config, run, training.classes, config.lr
        self.data_config = data_config
        self.order = torch.Generator()
        self.loader = make_loader(
            training, data_config, config.batch_size, config.workers,
            training=True, augment=not config.no_aug, generator=self.order,
        )  # fmt: skip
        self.val_loader = make_loader(validation, data_config, max(config.batch_size, 32), config.workers)
        steps_per_epoch = len(self.loader)
        self.steps = config.epochs * steps_per_epoch
        if config.max_steps is not None:
            self.steps = min(self.steps, config.max_steps)
        self.epochs = math.ceil(self.steps / steps_per_epoch)

        self.accelerator = Accelerator(cpu=device.type == "cpu")
        optimizer = create_optimizer_v2(
            model, opt=config.opt, lr=self.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        warmup = min(round(config.warmup_ratio * self.steps), self.steps - 1)
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=self.steps - warmup,
            warmup_t=warmup,
            warmup_lr_init=self.lr / max(warmup, 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.device = self.accelerator.device
        self.totals = _Totals(torch.zeros(2, device=self.device))
        self.step = self.epoch = 0
        self.best_top1, self.best_epoch, self.last_top1 = -1.0, 0, 0.0
        self.train_seconds = 0.0
        self.step_seconds: list[float] = []

    def train(self, resume: bool, quiet: bool) -> FinetuneResult:
        if resume:
            progress = load_last(self.run, self.model, self.optimizer)
            for name, value in progress.items():
                setattr(self, name, value)
        self.log = MetricsLog(self.run, keep_steps=self.step)
        with Progress(self.steps, self.step, quiet) as progress_bar:
            while self.epoch < self.epochs:
                self._train_epoch(progress_bar)
                self._end_epoch(progress_bar)
        return self._result()

    def _train_epoch(self, progress_bar: Progress) -> None:
        # An epoch depends on its number and the state at its start alone, so a resumed run repeats it exactly.
        seed = self.config.seed + 1000 * (self.epoch + 1)
        set_seed(seed)
        if self.step == 0 and self.config.norm == "cbn":
            self.order.manual_seed(seed)
            warm_up(self.model, islice(batches(self.loader), self.config.window))
        self.order.manual_seed(seed)
        self.model.train()
        started = time.perf_counter()
        for x, y in islice(batches(self.loader), self.steps - self.step):
            self.scheduler.step_update(self.step)
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            logits = self.model(x)
            loss = self.loss(logits, y)
            self.accelerator.backward(loss)
            if self.config.clip_grad:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.totals.add(loss, logits, y)
            now = time.perf_counter()
            self.step_seconds.append(now - started)
            self.train_seconds += now - started
            started = now
            if self.step % LOG_EVERY == 0:
                self._record(progress_bar)
            progress_bar.advance(len(y))
        if self.totals.images:
            self._record(progress_bar)

    def _record(self, progress_bar: Progress) -> None:
        loss, top1 = self.totals.take()
        lr = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is no longer finite at step {self.step} with lr {lr:.2g}; lower --lr (now {self.lr:g})"
            )
        self.log.write(event="train", step=self.step, epoch=self.epoch + 1, lr=lr, loss=loss, top1=top1)
        progress_bar.show(loss, top1)

    def _end_epoch(self, progress_bar: Progress) -> None:
        self.epoch += 1
        result = accuracy(self.model, batches(self.val_loader), self.device)
        self.last_top1 = result.top1
        self.log.write(
            event="eval", step=self.step, epoch=self.epoch, loss=result.loss, top1=result.top1, top5=result.top5,
            train_seconds=self.train_seconds, images_per_second=self.step * self.config.batch_size / self.train_seconds,
        )  # fmt: skip
        progress_bar.line(
            f"epoch {self.epoch}/{self.epochs}: validation top-1 {result.top1:.2f} %, loss {result.loss:.4f}"
        )
        if result.top1 > self.best_top1:
            self.best_top1, self.best_epoch = result.top1, self.epoch
            export(
                self.accelerator.unwrap_model(self.model), self.run / "best", class_names=self.classes,
                model_args=self.config.model_kwargs, data_config=self.data_config,
                metadata={**self.config.summary(), "top1": result.top1, "epoch": self.epoch}, overwrite=True,
            )  # fmt: skip
        names = ("step", "epoch", "best_top1", "best_epoch", "last_top1", "train_seconds")
        save_last(self.run, self.model, self.optimizer, {name: getattr(self, name) for name in names})
        draw_curves({self.config.norm: self.run}, self.run / "curves.png")

    def _result(self) -> FinetuneResult:
        return FinetuneResult(
            output=str(self.run),
            norm=self.config.norm,
            steps=self.step,
            best_top1=self.best_top1,
            best_epoch=self.best_epoch,
            last_top1=self.last_top1,
            train_seconds=self.train_seconds,
            median_step_seconds=statistics.median(self.step_seconds) if self.step_seconds else 0.0,
        )
