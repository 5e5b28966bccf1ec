"""Runs of fine-tuning: a new one, and one that goes on."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import RunError
from . import checkpoint
from .config import FinetuneConfig, FinetuneResult, read_run
from .environment import compare_environment, make_accelerator
from .loop import Trainer
from .parallel import Ranks
from .setup import build, check_new, owned, prepare_folder


def finetune(
    config: FinetuneConfig, *, overwrite: bool = False, quiet: bool = False, resume: bool = False
) -> FinetuneResult:
    """Fine-tunes a model on an image folder; writes and returns the outcome.

    The run folder holds config.json, metrics.jsonl, curves.png, results.json, checkpoints/ (for `resume`) and best/
    (the weights with the highest validation top-1, a folder that plain timm loads). Under torchrun or `accelerate
    launch` all processes call this.

    The first SIGINT or SIGTERM ends the run after the step that is under way, or before it where its images have to be
    waited for, with a checkpoint and TrainingInterrupted, a KeyboardInterrupt. Raises RunError, DataError, ModelError
    or ConversionError, each naming the argument or the file; RunError also if a gradient is not finite, the memory of
    the GPU is not enough, or nothing can be written.

    Args:
        config: data, model, run folder and settings.
        overwrite: whether a run that is in the folder may be replaced.
        quiet: no progress bar.
        resume: deprecated: call `resume`.
    """
    if resume:
        warnings.warn("finetune(config, resume=True) is now resume(run)", DeprecationWarning, stacklevel=2)
    return run(config, resumed=resume, overwrite=overwrite, quiet=quiet)


def resume(
    run_folder: str | Path, *, data: str | None = None, workers: int | None = None, device: str | None = None,
    quiet: bool = False,
) -> FinetuneResult:  # fmt: skip
    """Goes on with a run of `finetune` that was interrupted, from its newest checkpoint and with its own settings.

    On a CPU it ends in the same weights as without the interruption. Raises what `finetune` does; RunError also for a
    folder that is no run, and for other classes or numbers of images than it began with.

    Args:
        run_folder: what `finetune` wrote.
        data: where the images are now; default: where they were.
        workers: as in FinetuneConfig; default: as it was.
        device: as workers.
        quiet: no progress bar.
    """
    place = {"data": data, "workers": workers, "device": device}
    changes = {name: value for name, value in place.items() if value is not None}
    config = replace(FinetuneConfig.of_run(run_folder), output=str(run_folder), **changes)  # type: ignore[arg-type]
    return run(config, resumed=True, quiet=quiet)


def run(config: FinetuneConfig, *, resumed: bool, overwrite: bool = False, quiet: bool = False) -> FinetuneResult:
    """A run of `finetune`, from the beginning or from its newest checkpoint.

    Args:
        config: its settings.
        resumed: from its newest checkpoint, or from the beginning if there is none.
        overwrite, quiet: as in `finetune`.
    """
    folder = Path(config.output)
    config.check()
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # of a run before this one in the same process
    ranks = Ranks()
    if resumed:
        read_run(folder)
    else:
        ranks.told(lambda: check_new(folder, config.data, overwrite))
    # a run that was killed before its first checkpoint starts again
    setup = build(config, resumed=resumed and bool(checkpoint.checkpoints(folder)))
    if resumed:
        stored = read_run(folder)
        compare_environment(str(folder), stored.get("environment"))
        if (stored["classes"], stored["images"]) != (setup.training.classes, setup.images):
            raise RunError(
                f"{config.data} has other images than the run in {folder}; resume with the data it was started with"
            )
    trainer = Trainer(config, folder, setup, accelerator, ranks)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(owned(folder))
            if not resumed:
                prepare_folder(folder, config, setup, ranks.count)

        ranks.told(begin)
        return trainer.train(resumed, quiet or not ranks.main)
