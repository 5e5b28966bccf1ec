"""`cbn` as a user calls it, in this process."""

from __future__ import annotations

from cbn_convert.cli.main import app
from typer.testing import CliRunner

SMALL = ["--no-pretrained", "--img-size", "32", "--no-aug", "--workers", "0", "--device", "cpu", "--window", "4"]


def cbn(*arguments: object) -> tuple[int, str, str]:
    """Its exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr
