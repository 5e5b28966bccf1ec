"""Processes that run cells, one at a time each."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from ..errors import RunError
from .plan import Cell

# the same package as here, whatever lies in the current folder
_ROOT = str(Path(__file__).parents[2])
# seconds; a run that is told to stop finishes its step and writes a checkpoint
LONGEST_STOP, LONGEST_EXIT = 300.0, 30.0
_PROGRAM = f"import sys; sys.path[0] = {_ROOT!r}; from {__package__}.worker import main; main()"


class WorkerDiedError(RunError):
    """A process has ended in the middle of a run."""


class Workers:
    """Up to `count` processes that share the processor cores; what they print goes to `log`.

    They are no part of the terminal's group: Ctrl-C reaches them through `stop`, which lets each save its run.
    """

    def __init__(self, count: int, log: Path) -> None:
        self.count, self.log = count, log
        self.threads = max(1, torch.get_num_threads() // count)
        self.running: dict[Cell, subprocess.Popen[str]] = {}
        self._idle: list[subprocess.Popen[str]] = []
        self._answers: queue.Queue[tuple[Cell, str]] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [*self._idle, *self.running.values()]
        for process in processes:
            if kind is not None:
                _kill(process)
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            _ended(process, LONGEST_EXIT)

    @property
    def free(self) -> bool:
        """Whether another cell can start."""
        return len(self.running) < self.count

    def start(self, cell: Cell, settings: dict[str, Any], tested: bool) -> None:
        """Runs a cell with these settings in a process that is free; `tested`: there are test images."""
        process = self._idle.pop() if self._idle else self._new()
        self.running[cell] = process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"settings": settings, "tested": tested}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, which reading its answer tells
        threading.Thread(target=self._listen, args=(cell, process), daemon=True).start()

    def _new(self) -> subprocess.Popen[str]:
        try:
            log = self.log.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {self.log}: {error.strerror}; allow it, and go on with --resume") from error
        with log:
            return subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, encoding="utf-8", start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            )  # fmt: skip

    def _listen(self, cell: Cell, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._answers.put((cell, process.stdout.readline()))

    def finished(self, timeout: float) -> tuple[Cell, dict[str, Any]] | None:
        """The next outcome, None if there is none within so many seconds.

        Raises WorkerDiedError if the process has ended, RunError if a run met what ends the comparison.
        """
        try:
            cell, line = self._answers.get(timeout=timeout)
        except queue.Empty:
            # the processes that load images may hold a dead one's pipe open, which then never ends
            dead = [cell for cell, process in self.running.items() if process.poll() is not None]
            if not dead:
                return None
            cell, line = dead[0], ""
        process = self.running.pop(cell)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            code = _ended(process, LONGEST_EXIT)
            _kill(process)  # what it has started
            raise WorkerDiedError(
                f"the process that ran {cell.name} has ended (exit code {code}), perhaps for want of memory; see "
                f"{self.log}, and go on with --resume"
            ) from None
        self._idle.append(process)
        if "top1" not in answer and "error" not in answer:
            raise RunError(f"{cell.name}: {answer.get('failed', 'its process was stopped; go on with --resume')}")
        return cell, answer

    def stop(self) -> None:
        """Lets every run save a checkpoint, and ends the processes; one that hangs goes on from its last checkpoint."""
        for process in self.running.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self.running.values():
            _ended(process, LONGEST_STOP)


def _ended(process: subprocess.Popen[str], seconds: float) -> int:
    """The exit code of a process that ends within so many seconds; after them it is killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        return process.wait(LONGEST_EXIT)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process with those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
