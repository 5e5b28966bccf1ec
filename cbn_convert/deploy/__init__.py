"""From a trained model to one that needs nothing of this package: fold and export."""

from .converted import Conversion
from .exporting import export
from .folded_weights import load_folded
from .folding import FOLD_TARGETS, ChannelAffine, FoldTarget, fold

__all__ = ["FOLD_TARGETS", "ChannelAffine", "Conversion", "FoldTarget", "export", "fold", "load_folded"]
