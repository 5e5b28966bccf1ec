"""Runs of `cbn finetune` that are killed, resumed, and compared with one that nobody has disturbed."""

from __future__ import annotations

import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from benchmarks.robustness.supervised import (
    ALL,
    LOADER,
    MAIN,
    PATIENCE,
    SMALL,
    Command,
    Record,
    check_no_litter,
    checkpoints,
    difference,
    require,
    state,
)

SETTINGS = {
    "cbn": [],
    "EMA, accumulation": ["--batch-size", "1", "--accumulate", "2", "--ema", "0.9", "--recalibrate", "2"],
    "ring, adamw, mixup": [
        "--history", "ring", "--opt", "adamw", "--lr", "1e-3", "--mixup", "0.4", "--eval-every", "11",
    ],
    "bn, class balance": ["--norm", "bn", "--class-balance", "sample", "--on-nan", "skip", "--keep", "1"],
}  # fmt: skip


class Kill(NamedTuple):
    """A signal, who gets it, how often it is drawn, and with which codes the command may end by it."""

    number: signal.Signals
    receiver: str
    weight: int
    codes: tuple[int, ...]


KILLS = {
    f"SIGKILL, {ALL}": Kill(signal.SIGKILL, ALL, 5, (-9,)),
    f"SIGKILL, {MAIN}": Kill(signal.SIGKILL, MAIN, 2, (-9,)),
    f"SIGKILL, {LOADER}": Kill(signal.SIGKILL, LOADER, 1, (1,)),
    # minus the signal: before the command has its own handlers
    f"SIGTERM, {ALL}": Kill(signal.SIGTERM, ALL, 2, (143, -15)),
    f"SIGTERM, {MAIN}": Kill(signal.SIGTERM, MAIN, 1, (143, -15)),
    f"SIGINT, {ALL}": Kill(signal.SIGINT, ALL, 2, (130, -2)),
}


@dataclass
class Reference:
    """A run that nobody has disturbed, and the seconds it took."""

    arguments: list[str]
    run: Path
    seconds: float


def reference(folder: Path, name: str, real: bool = False) -> Reference:
    """Runs it on the images in folder/data; `real` as a user starts it."""
    arguments = [*SMALL, "--epochs", "3", "--save-every", "7", *SETTINGS[name]]
    run = folder / (f"{name}, real" if real else name)
    began = time.monotonic()
    command = Command(
        ["finetune", folder / "data", *arguments, "-o", run, "--workers", "0"], folder / f"{run.name}.log", real
    )
    code = command.wait(PATIENCE)
    seconds = time.monotonic() - began
    command.finish()
    require(code == 0, f"the undisturbed run {name!r} ended with {code}: {command.errors}")
    return Reference(arguments, run, seconds)


def kill_case(record: Record, folder: Path, seed: int, references: dict[str, Reference], starting: float) -> None:
    """Kills a run, resumes it, perhaps kills it again, and compares its end; `starting`: seconds of a start of Python.

    Raises CheckError.
    """
    rng = random.Random(f"{seed} kills {record.number}")
    undisturbed, kill = references[record.about], KILLS[record.kind]
    real = record.number % 10 == 9
    latest = undisturbed.seconds + starting * real
    run, data = folder / "run", undisturbed.run.parent / "data"
    commands: list[Command] = []
    try:
        for kills_left in range(rng.choice((1, 1, 2, 3)), -1, -1):
            # a loading process can only be killed where there is one
            workers = ["--workers", "1" if kill.receiver == LOADER else str((record.number + kills_left) % 2)]
            # what was killed before it wrote its settings is started again, for which nothing must be in the way
            begun = (run / "config.json").is_file()
            what = ["--resume", run] if begun else [*undisturbed.arguments, "-o", run]
            commands.append(
                command := Command(["finetune", data, *what, *workers], folder / f"{len(commands)}.log", real)
            )
            code = command.wait(rng.uniform(0, latest) if kills_left else PATIENCE)
            if code is None and kills_left:
                command.send(kill.number, kill.receiver)
                code = command.wait(PATIENCE)
                check_ending(record, command, kill, run)
            require(code is not None, f"it hangs: {command.errors}")
            require(code == 0 or kills_left, f"code {code} when resumed: {command.errors}")
            if kill.receiver == ALL:
                command.finish()
            if code == 0:
                break
        check_run(run, undisturbed.run)
    finally:
        for command in commands:
            command.finish()


def check_ending(record: Record, command: Command, kill: Kill, run: Path) -> None:
    """Raises CheckError unless the command has ended as it should after the signal."""
    code = command.code
    require(code is not None, f"still there {PATIENCE} s after {record.kind}")
    record.codes.append(code)
    require(code in (0, *kill.codes), f"code {code} after {record.kind}: {command.errors}")
    require(code < 0 or not command.faults, f"after {record.kind}: {command.faults}")
    if stopped := re.search(r"^stopped by \w+ after step (\d+)", command.errors, re.MULTILINE):
        step = int(stopped[1])
        newest = next(iter(checkpoints(run)), None)
        require(newest and newest.name == f"step-{step:08d}", f"stopped after step {step} without a checkpoint of it")


def check_run(run: Path, undisturbed: Path) -> None:
    """Raises CheckError unless the run is as the undisturbed one to the bit, and nothing else is left in it."""
    place = difference(state(run), state(undisturbed))
    require(not place, f"differs from the undisturbed run in {place}")
    check_no_litter(run)
    aside = [path.name for path in (run / "checkpoints").glob("damaged-*")]
    require(not aside, f"{aside} in checkpoints")
    model = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    require(all(torch.isfinite(t).all() for t in model.state_dict().values()), "best/ is not finite")
