"""On PYTHONPATH it gives timm networks of the study that have no name there."""

from typing import Any

from timm.models import register_model
from timm.models.convmixer import _create_convmixer
from timm.models.efficientnet import _gen_mobilenet_v1


@register_model
def mobilenetv1_025(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNet V1 of a quarter of the width, as in Pytorch_Retinaface."""
    model = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pretrained=pretrained, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "mobilenetv1_025"}  # as an export names it
    return model


@register_model
def convmixer_96_6(pretrained: bool = False, **kwargs: Any) -> Any:
    """A small ConvMixer, which normalises behind its activations."""
    model = _create_convmixer("convmixer_768_32", pretrained, dim=96, depth=6, kernel_size=7, patch_size=6, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "convmixer_96_6"}
    return model
