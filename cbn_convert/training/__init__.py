"""Fine-tuning on an image folder, with CBN or one of the usual alternatives for small batches."""

from .config import FinetuneConfig, FinetuneResult
from .engine import finetune
from .evaluation import evaluate, load_run

__all__ = ["FinetuneConfig", "FinetuneResult", "evaluate", "finetune", "load_run"]
