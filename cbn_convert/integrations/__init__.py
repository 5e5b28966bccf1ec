"""At home in other people's training loops: one file per framework, each imported by its name only.

    from cbn_convert.integrations.lightning import CbnCallback        huggingface, fastai likewise
    from cbn_convert.integrations.accelerate import CbnState
    from cbn_convert.integrations.ultralytics import CbnTrainerMixin
    from cbn_convert.integrations.mmengine import CbnHook
    from cbn_convert.integrations import training_state, load_training_state        every other loop

The last two need no framework. docs/recipes.md says where the one line goes, and in which order.
"""

from .plain import load_training_state, training_state

__all__ = ["load_training_state", "training_state"]
