"""A `cbn` command as a process that can be killed, and what its run folder must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.provenance import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.images import write_image  # noqa: E402

from cbn_convert.training.checkpoint import checkpoints  # noqa: E402
from cbn_convert.training.metrics import read_metrics  # noqa: E402

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TIMES = ("train_seconds", "wait_seconds", "images_per_second", "loader_wait")
SAID = ("warning: ", "epoch ", "the images' statistics ", "the weights have no statistics ")  # how lines may begin
PATIENCE = 120  # seconds after which a command that should end is said to hang
ALL, MAIN, LOADER = "all processes", "main process", "a loading process"
SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--device", "cpu", "--window", "4")


@dataclass
class Record:
    """What became of a case: exit codes, and the reason if it failed. about: settings of the run, or the file."""

    part: str
    number: int
    kind: str
    about: str
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    reason: str = ""


class CheckError(Exception):
    """Something is not as it must be."""


def require(holds: object, reason: str) -> None:
    if not holds:
        raise CheckError(reason)


class Command:
    """`cbn` with arguments, in a fork that leads a process group of its own; `real` starts Python anew in it.

    memory: bytes that it may allocate.
    """

    def __init__(self, arguments: list[Any], log: Path, real: bool = False, memory: int | None = None) -> None:
        self.arguments, self.log = [str(a) for a in arguments], log
        self.code: int | None = None
        log.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(real, memory)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)  # the child does so, too: whichever is first

    def _run(self, real: bool, memory: int | None) -> None:
        code = 70
        try:
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            os.dup2(os.open(self.log, os.O_WRONLY), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            if real:
                os.chdir(ROOT)  # -m looks for the package there first
                os.execve(
                    sys.executable, [sys.executable, "-m", "cbn_convert.cli", *self.arguments],
                    {**os.environ, **ENVIRONMENT},
                )  # fmt: skip
            from cbn_convert.cli.main import app

            app(self.arguments, prog_name="cbn")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            code = -signal.SIGINT
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            if code == -signal.SIGINT:  # as Python itself ends
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or minus the signal that has ended it; None if it is still there after that time."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.005)
        return self.code

    def send(self, number: signal.Signals, receiver: str) -> None:
        if receiver == ALL:
            os.killpg(self.pid, number)
        elif receiver == MAIN:
            os.kill(self.pid, number)
        else:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for pid in children[:1]:
                os.kill(int(pid), number)

    def finish(self) -> None:
        """Ends what is left of the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(PATIENCE)

    @property
    def errors(self) -> str:
        """What is on standard error."""
        return self.log.read_text(errors="replace")

    @property
    def faults(self) -> str:
        """What is wrong with standard error: it may hold warnings, progress, and one error that was foreseen."""
        text = self.errors
        lines = [line for line in text.splitlines() if not line.startswith(SAID)]
        if "Traceback" in text:
            return f"traceback: {lines[-1]}"
        if odd := next((line for line in lines if line.startswith("error: unexpected ")), None):
            return odd
        one = len(lines) == 1 and lines[0].startswith("error: ")
        return "" if self.code != 1 or one else f"more than one line of error: {' / '.join(lines)}"


def make_images(folder: Path, training: int, validation: int) -> Path:
    """Two classes that a small network tells apart, so many images of each, as PNG and JPEG."""
    for split, count in (("train", training), ("val", validation)):
        for label, color in (("blue", (60, 60, 200)), ("red", (200, 60, 60))):
            for i in range(count):
                suffix = "jpg" if i % 2 else "png"
                write_image(folder / split / label / f"{i}.{suffix}", color, 1000 * (split == "val") + i)
    return folder


def state(run: Path) -> dict[str, Any]:
    """All that a run has come to, without times."""
    newest = checkpoints(run)[0]
    shared = torch.load(newest / "training.pt", weights_only=True)
    shared["state"] = {k: v for k, v in shared["state"].items() if k not in TIMES}
    return {
        **shared,
        "rank-0": torch.load(newest / "rank-0.pt", weights_only=True),
        "newest": newest.name,  # an older one that is kept may be of the step at which a signal came
        "metrics": [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)],
        "best": weights(run / "best/model.safetensors"),
        "results": json.loads((run / "results.json").read_text()),
    }


def weights(path: Path) -> dict[str, Any]:
    """Tensors and metadata; safetensors writes the latter in any order, so that the bytes of the file say nothing."""
    with safe_open(path, "pt") as file:
        return {
            "metadata": dict(sorted(file.metadata().items())),
            **{k: file.get_tensor(k) for k in sorted(file.keys())},
        }


def difference(got: Any, want: Any, path: str = "") -> str:
    """The first place in which two states differ by a bit; empty if there is none."""
    if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor):
        same = got.dtype == want.dtype and got.shape == want.shape
        same = same and got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes()
    elif isinstance(want, dict) and isinstance(got, dict) and list(got) == list(want):
        return next(filter(None, (difference(got[key], want[key], f"{path}/{key}") for key in want)), "")
    elif isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)) and len(got) == len(want):
        pairs = enumerate(zip(got, want, strict=True))
        return next(filter(None, (difference(g, w, f"{path}/{i}") for i, (g, w) in pairs)), "")
    else:
        same = type(got) is type(want) and got == want
    return "" if same else path or "all"


def check_no_litter(run: Path) -> None:
    """Raises CheckError if a temporary file is left."""
    paths = [path for folder in (run, run / "checkpoints") if folder.is_dir() for path in folder.iterdir()]
    litter = sorted(path.name for path in paths if path.name.startswith(".") and path.name != ".lock")
    require(not litter, f"{litter} left")
