"""What all commands share: output for people or machines, errors as one sentence, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from cbn_convert.errors import CbnError, CbnWarning

if TYPE_CHECKING:
    from rich.table import Table

FAILED, INTERRUPTED = 1, 130


class OutputError(Exception):
    """Standard output takes no more; the cause says why."""


@contextmanager
def _output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # it is about a file
            raise
        raise OutputError from error


@contextmanager
def printable() -> Iterator[None]:
    """Context of the program, in which whatever text can be printed: what an encoding lacks is escaped.

    It ends with exit code 1 where standard output takes no more: without a word if it is a pipe that was closed, as by
    `head`, else with a sentence.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        with _output():
            try:
                yield
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
    except OutputError as error:
        # nothing that is left in its buffer, which Python would write at the end
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno != errno.EPIPE:
            _say(f"error: cannot write to standard output: {cause.strerror}; free some space, or let it go elsewhere")
        raise SystemExit(FAILED) from None
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with suppress(OSError, ValueError):  # it may be closed
                stream.reconfigure(errors=errors)


def _say(text: str, fits: bool = True) -> None:
    """A line on standard error, where there is one that takes it; `fits`: broken between words, as no command is."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(fitted(text, sys.stderr) if fits else text, file=sys.stderr)


def fitted(text: str, stream: Any) -> str:
    """The text with its sentences broken between words on a terminal; lines that are set in, as commands are, stay."""
    if not stream.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns - 1)
    return "\n".join(
        line if line.startswith("  ")
        else textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )  # fmt: skip


class Session:
    """Context of one command.

    Text goes to standard output unless quiet. With `as_json`, text goes to standard error and the last line of
    standard output is one JSON object. An error ends the command with one sentence and exit code 1, an interrupt with
    130, or 143 if it was SIGTERM; `debug` adds the traceback.
    """

    def __init__(self, as_json: bool, debug: bool, quiet: bool) -> None:
        # of the processes that torchrun starts, the first one speaks
        self.first = os.environ.get("RANK", "0") == "0"
        self.as_json, self.debug, self.quiet = as_json and self.first, debug, quiet or not self.first

    def __enter__(self) -> Session:
        self._show: Any = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]
        return self

    def _warn(self, message: Any, category: Any, *where: Any) -> None:
        if issubclass(category, CbnWarning):
            if self.first:
                _say(f"warning: {message}")
        else:
            self._show(message, category, *where)

    def print(self, text: str | Table) -> None:
        """Prints a line or a table for people."""
        stream = sys.stderr if self.as_json else sys.stdout
        if not self.quiet and stream is not None:
            from rich.console import Console

            # a file or a pipe has no width to fit into
            console = Console(file=stream, highlight=False, emoji=False, width=None if stream.isatty() else 200)
            shown = fitted(text, stream) if isinstance(text, str) else text
            with _output():
                console.print(shown, markup=False, soft_wrap=isinstance(text, str))

    def result(self, data: dict[str, Any]) -> None:
        """Prints the command's outcome for machines."""
        if self.as_json:
            with _output():
                print(json.dumps(data), flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._show
        if error is None or isinstance(error, (typer.Exit, OutputError)):
            return
        if isinstance(error, KeyboardInterrupt):
            message = str(error) or "interrupted"
            _say(message, fits=False)  # it names the command that goes on
            self.result({"error": message})
            raise typer.Exit(getattr(error, "exit_code", INTERRUPTED))
        if not isinstance(error, Exception) or type(error).__module__.startswith(("click", "typer")):
            return
        if isinstance(error, CbnError):
            message = str(error)
        else:
            detail = str(error).strip().splitlines()
            message = f"unexpected {type(error).__name__}: {detail[0] if detail else 'no details'}"
            if not self.debug:
                message += "; run again with --debug for the traceback"
        if self.debug:
            traceback.print_exception(error)
        _say(f"error: {message}")
        self.result({"error": message})
        raise typer.Exit(FAILED)
