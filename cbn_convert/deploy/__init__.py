"""From a trained model to one that needs nothing of this package: fold and export."""

from .converted import Conversion
from .exporting import export
from .folding import FOLD_TARGETS, ChannelAffine, FoldTarget, fold
from .loading import load_folded

__all__ = ["FOLD_TARGETS", "ChannelAffine", "Conversion", "FoldTarget", "export", "fold", "load_folded"]
