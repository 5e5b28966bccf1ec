"""What a training step costs with each norm: measured side by side in one process."""

from .published import PublishedBatchNorm2d
from .steps import COLUMNS, BenchResult, bench_inference, bench_step

__all__ = ["COLUMNS", "BenchResult", "PublishedBatchNorm2d", "bench_inference", "bench_step"]
