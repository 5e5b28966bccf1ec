"""What a run would do, found out without writing anything."""

from __future__ import annotations

from typing import Any

from ..norm import CrossIterationMixin
from .advice import advice, measure
from .config import FinetuneConfig
from .evaluation import resolve_device
from .loading import StepSampler
from .optimization import make_optimizer
from .setup import build, total_steps


def plan(config: FinetuneConfig) -> dict[str, Any]:
    """What `finetune` would do, found out by building everything and writing nothing. Raises what it raises."""
    config.check()
    device = resolve_device(config.device)
    setup = build(config)
    make_optimizer(setup.model, config, config.peak_lr())
    shift = measure(setup.model.to(device), setup, config, device)
    counts = setup.training.counts()
    sampler = StepSampler(len(setup.training.samples), config.batch_size, config.seed, accumulate=config.accumulate)
    return {
        "model": setup.spec["architecture"],
        "norm": config.norm,
        "cross_iteration_layers": sum(isinstance(m, CrossIterationMixin) for m in setup.model.modules()),
        "trained_parameters": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "classes": len(setup.training.classes),
        "training_images": len(setup.training.samples),
        "validation_images": len(setup.validation.samples),
        "largest_class": max(counts),
        "smallest_class": min(counts),
        "input_size": list(setup.data_config["input_size"]),
        "lr": config.peak_lr(),
        "steps_per_epoch": sampler.updates,
        "steps": total_steps(config, sampler),
        "statistics_shift": shift,
        "advice": advice(config, shift),
    }
