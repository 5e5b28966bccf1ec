"""What all commands share: output for people or machines, errors as one sentence, exit codes."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from cbn_convert.errors import CbnError, CbnWarning

if TYPE_CHECKING:
    from rich.table import Table

FAILED, INTERRUPTED = 1, 130


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
        self._show = warnings.showwarning
        warnings.showwarning = self._warn
        return self

    def _warn(self, message: Any, category: Any, *where: Any) -> None:
        if issubclass(category, CbnWarning):
            if self.first:
                print(f"warning: {message}", file=sys.stderr)
        else:
            self._show(message, category, *where)

    def print(self, text: str | Table) -> None:
        """Prints a line or a table for people."""
        if not self.quiet:
            from rich.console import Console

            stream = sys.stderr if self.as_json else sys.stdout
            # a file or a pipe has no width to fit into
            console = Console(file=stream, highlight=False, emoji=False, width=None if stream.isatty() else 200)
            console.print(text, markup=False, soft_wrap=isinstance(text, str))

    def result(self, data: dict[str, Any]) -> None:
        """Prints the command's outcome for machines."""
        if self.as_json:
            print(json.dumps(data, ensure_ascii=False), flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        warnings.showwarning = self._show
        if error is None or isinstance(error, typer.Exit):
            return
        if isinstance(error, KeyboardInterrupt):
            message = str(error) or "interrupted"
            print(message, file=sys.stderr)
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
        print(f"error: {message}", file=sys.stderr)
        self.result({"error": message})
        raise typer.Exit(FAILED)
