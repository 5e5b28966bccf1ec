"""Errors that a user can cause. Each message is one sentence: what is wrong, where, and what to do."""


class CbnError(Exception):
    """Base of all errors that end in one sentence on the command line."""


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


class CbnWarning(UserWarning):
    """Something that a user should know of, in one sentence; the command goes on."""
