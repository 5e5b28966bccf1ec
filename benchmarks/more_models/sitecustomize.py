"""On PYTHONPATH it gives timm `mobilenetv1_025`, whose weights there are and whose name there is not."""

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import _gen_mobilenet_v1


@register_model
def mobilenetv1_025(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNet V1 of a quarter of the width, as in Pytorch_Retinaface."""
    model = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pretrained=pretrained, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "mobilenetv1_025"}  # as an export names it
    return model
