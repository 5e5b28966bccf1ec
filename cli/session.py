"""What all commands share: output for people or machines, errors as one sentence, exit codes."""

from __future__ import annotations

import json
import sys
import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from cbn_convert.errors import CbnError

if TYPE_CHECKING:
    from rich.table import Table

FAILED, INTERRUPTED = 1, 130


class Session:
    """Context of one command.

    Text goes to standard output unless quiet. With `as_json`, text goes to standard error and the last line of
    standard output is one JSON object. An error ends the command with one sentence and exit code 1, an interrupt with
    130; `debug` adds the traceback.
    """

    def __init__(self, as_json: bool, debug: bool, quiet: bool) -> None:
        self.as_json, self.debug, self.quiet = as_json, debug, quiet

    def __enter__(self) -> Session:
        return self

    def print(self, text: str | Table) -> None:
        """Prints a line or a table for people."""
        if not self.quiet:
            from rich.console import Console

            stream = sys.stderr if self.as_json else sys.stdout
            # a file or a pipe has no width to fit into
            console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
            console.print(text, markup=False, soft_wrap=isinstance(text, str))

    def result(self, data: dict[str, Any]) -> None:
        """Prints the command's outcome for machines."""
        if self.as_json:
            print(json.dumps(data, ensure_ascii=False), flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, typer.Exit):
            return
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED)
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
