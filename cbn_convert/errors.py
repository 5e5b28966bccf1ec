"""Errors that a user can cause. Each message is one sentence: what is wrong, where, and what to do."""

import os


def printable(text: str) -> str:
    r"""The same with \udcNN for what is no UTF-8 in the name of a file, which can be neither printed nor stored."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_utf8(path: str) -> bool:
    """Whether the name of a file is UTF-8 on the disk, whatever the locale makes of it."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop; the name of its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


class CbnError(Exception):
    """Base of all errors that end in one sentence on the command line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConversionError(CbnError, ValueError):
    """A model cannot be converted, or not with these arguments; it is left as it was."""


class FoldError(CbnError, ValueError):
    """A fold would not give the same outputs."""


class ExportError(CbnError, ValueError):
    """A model cannot be written in the requested form."""


class ModelError(CbnError, ValueError):
    """A model or its weights cannot be loaded."""


class DataError(CbnError, ValueError):
    """An image folder is not what it should be."""


class RunError(CbnError, ValueError):
    """A run folder or a training argument is not usable."""


class DivergedError(RunError):
    """A loss or gradient is not finite."""


class OutOfMemoryError(RunError):
    """The memory of the GPU is not enough."""


class OneValueError(RunError):
    """A step of training has one value per channel, and the norm takes its statistics from the step alone."""


class CbnWarning(UserWarning):
    """Something that a user should know of, in one sentence; the command goes on."""
