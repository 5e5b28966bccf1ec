"""Converting a model and back: who feeds whom, the change of classes, the report."""

from .converting import convert, norm_layers, revert, warm_up
from .example import run
from .report import ConversionReport, ReportRow
from .trace import NormCall, trace_norms

__all__ = [
    "ConversionReport",
    "NormCall",
    "ReportRow",
    "convert",
    "norm_layers",
    "revert",
    "run",
    "trace_norms",
    "warm_up",
]
