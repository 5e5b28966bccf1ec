"""What learns: the model, its optimizer and all that one update of the weights takes."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..damage import damaged_value
from ..errors import DivergedError
from ..norm import CrossIterationMixin, history_state, load_history_state
from .checkpoint import random_states, restore_random_states
from .config import FinetuneConfig
from .faults import first_non_finite
from .loading import Batch
from .losses import make_loss
from .optimization import FUSED, make_optimizer, make_scheduler, rate
from .parallel import Ranks
from .setup import Setup
from .totals import Totals


class Learner:
    """The model of a run in this process, and how it is updated; `updates` of them are done of `steps` in all."""

    def __init__(
        self, config: FinetuneConfig, setup: Setup, accelerator: Accelerator, ranks: Ranks, steps: int
    ) -> None:
        self.config, self.setup, self.accelerator, self.ranks = config, setup, accelerator, ranks
        self.device = accelerator.device
        self.lr = config.peak_lr(ranks.count)
        self.model = setup.model  # the plain module, without what is wrapped around it
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, config, self.lr)
        self.scheduler = make_scheduler(self.optimizer, config, self.lr, steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped, self.prepared_optimizer = accelerator.prepare(self.model, self.optimizer)
        self._settle_buckets()
        if config.compile:
            self.wrapped = torch.compile(self.wrapped)
        self.ema = None
        if config.ema is not None:
            self.ema = ModelEmaV3(self.model, config.ema, use_warmup=True)
        self.mixup, self.loss = self._loss()
        # CBN does not take in a batch that is not finite, BatchNorm and InstanceNorm do
        self.guarded = [
            b for m in self.model.modules()
            if config.on_nan == "skip" and isinstance(m, _NormBase) and not isinstance(m, CrossIterationMixin)
            for b in (m.running_mean, m.running_var) if b is not None
        ]  # fmt: skip
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.totals = Totals(self.device, ranks)
        self.updates = 0

    def _settle_buckets(self) -> None:
        """DistributedDataParallel orders its buckets anew after the first step, and with them the sums over processes.

        Done before a run begins or goes on, this makes both the same from the first step on.
        """
        if self.ranks.count > 1:
            self.wrapped.eval()
            images = torch.zeros(self.config.batch_size, *self.setup.data_config["input_size"])
            for _ in range(2):
                self.wrapped(self.on_device(images)).sum().backward()
            self.optimizer.zero_grad()

    def _loss(self) -> tuple[Any, nn.Module]:
        config, training = self.config, self.setup.training
        counts = training.counts() if config.class_balance == "weight" else None
        mixup = None
        if config.mixup or config.cutmix:
            mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=0.0 if counts else config.label_smoothing,
                num_classes=len(training.classes),
            )  # fmt: skip
        return mixup, make_loss(config.label_smoothing, mixup is not None, counts).to(self.device)

    def update(self, parts: list[Batch]) -> None:
        """One update of the weights, by the gradient of all parts."""
        self.scheduler.step_update(self.updates)
        self.totals.lr = rate(self.optimizer)
        before = [buffer.clone() for buffer in self.guarded]
        for part, batch in enumerate(parts, 1):
            x, y = self.on_device(batch.images), batch.labels.to(self.device, non_blocking=True)
            target = y
            if self.mixup:
                x, target = self.mixup(x, y)
            with nullcontext() if part == len(parts) else self.accelerator.no_sync(self.wrapped):
                logits = self.wrapped(x)
                loss = self.loss(logits, target)
                # at a logit of -inf the loss is not finite but its gradient is; no process may make a step of that
                known = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
                self.accelerator.backward(loss / len(parts) * known)
            self.totals.add(loss, logits, y)
        bad = self.step_unless_bad()
        for buffer, old in zip(self.guarded, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
        if self.ema is not None:
            self.ema.update(self.model, self.updates)
        self.prepared_optimizer.zero_grad()
        self.updates += 1
        self.totals.note(bad, self.updates)
        self.last_images = x
        if self.device.type == "cpu":
            self.stop_if_bad()

    def step_unless_bad(self) -> Tensor:
        """Steps the optimizer, but not with a gradient that is not finite; whether that was so, on the device."""
        limit = self.config.clip_grad or math.inf
        bad = ~torch.isfinite(self.accelerator.clip_grad_norm_(self.trained, limit))
        if (scaler := self.accelerator.scaler) is not None:
            # too large a loss scale is no fault, the scaler leaves the step out and lowers it; at 1 it is not too large
            bad = self.totals.loss_is_bad() | (bad & (scaler.scale(torch.ones_like(self.totals.bad_losses)) <= 1))
            self.prepared_optimizer.step()
        elif self.config.opt in FUSED and self.optimizer.state:
            # torch's fused optimizers leave a step out by this flag, as GradScaler sets it, without waiting for the GPU
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.prepared_optimizer.step()
        elif not bool(bad):
            self.prepared_optimizer.step()
        return bad

    def on_device(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] where and how the model wants them."""
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=memory_format)

    def stop_if_bad(self) -> None:
        """Raises DivergedError if a gradient since the last record was not finite and the run is to stop then."""
        if self.config.on_nan == "skip" or not self.totals.updates or not (fault := self.totals.first_bad()):
            return
        step, lr = fault
        place = first_non_finite(self.model.train(), self.last_images)
        raise DivergedError(
            f"the loss is no longer finite at step {step} with lr {lr:.2g}, first {place}; lower --lr (now "
            f"{self.lr:g}), or leave such steps out with --on-nan skip; the last checkpoint is good"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what all processes share."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "updates": self.updates,
        }

    def own_state(self) -> dict[str, Any]:
        """For a checkpoint: what this process has of its own."""
        return {
            "history": history_state(self.model), "buffers": dict(self.model.named_buffers()),
            "ema": {} if self.ema is None else dict(self.ema.module.named_buffers()),
            "random": random_states(), "totals": self.totals.state(),
        }  # fmt: skip

    def load(self, shared: dict[str, Any], own: dict[str, Any], same_ranks: bool) -> None:
        """Puts back what `state` and `own_state` gave; random states and sums only for as many processes.

        Raises ValueError, KeyError or RuntimeError if they are of another model or damaged.
        """
        self.model.load_state_dict(shared["model"])
        _load_buffers(self.model, own["buffers"])
        load_history_state(self.model, own["history"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.scheduler.load_state_dict(shared["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(shared["ema"])
            _load_buffers(self.ema.module, own.get("ema", {}))  # older checkpoints have none
        for model in (self.model, *([] if self.ema is None else [self.ema.module])):
            if (fault := damaged_value(model)) is not None:
                raise ValueError(fault)
        self.updates = shared["updates"]
        if same_ranks:
            self.totals.load(own["totals"])
            restore_random_states(own["random"])


def _load_buffers(model: nn.Module, stored: dict[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    for name, buffer in stored.items():
        buffers[name].copy_(buffer)
