"""What a training step costs with each norm: measured side by side in one process."""

from .steps import COLUMNS, BenchResult, StepSettings, bench_inference, bench_step

__all__ = ["COLUMNS", "BenchResult", "StepSettings", "bench_inference", "bench_step"]
