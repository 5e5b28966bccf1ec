"""torchvision's models for classification, segmentation and detection: converted, trained at batch 1, reverted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torchvision import models
from torchvision.ops.misc import FrozenBatchNorm2d

import cbn_convert as cbn

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def classifier(name: str) -> nn.Module:
    return models.get_model(name, weights=None, num_classes=4)


def segmenter() -> nn.Module:
    return models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


SMALL = {
    "num_classes": 3, "min_size": 64, "max_size": 64, "box_detections_per_img": 5, "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
}  # fmt: skip


def detector() -> nn.Module:
    """Without weights torchvision makes it with BatchNorm2d."""
    return models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **SMALL)


def frozen_detector() -> nn.Module:
    """As torchvision makes it with weights."""
    backbone = models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    return models.detection.FasterRCNN(backbone, **SMALL)


def randomized(model: nn.Module) -> nn.Module:
    """In eval mode, with norms that are no identities, frozen ones too, so that losing them would show."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (_BatchNorm, FrozenBatchNorm2d)):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    """Some loss of one image, in training mode."""
    if isinstance(model, models.detection.FasterRCNN):
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
        return sum(model(list(images), [target]).values())
    out = model(images)
    out = out["out"] if isinstance(out, dict) else out
    return nn.functional.cross_entropy(out, torch.ones(out.shape[:1] + out.shape[2:], dtype=torch.long))


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(model(list(X) if isinstance(model, models.detection.FasterRCNN) else X))


MODELS: dict[str, Any] = {
    "resnet50": lambda: classifier("resnet50"),
    "mobilenet_v3_small": lambda: classifier("mobilenet_v3_small"),
    "deeplabv3_mobilenet_v3_large": segmenter,
    "fasterrcnn_resnet50_fpn": detector,
    "fasterrcnn_frozen": frozen_detector,
}


def example(model: nn.Module) -> Any:
    return ([X[0]],) if isinstance(model, models.detection.FasterRCNN) else X


def norms(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm2d))}


@pytest.mark.parametrize("name", MODELS)
def test_conversion_keeps_outputs_and_revert_restores_all(name: str) -> None:
    model = randomized(MODELS[name]())
    classes = {n: type(m) for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = outputs(model)
    assert all(t.numel() for t in expected)

    report = cbn.convert(model, example_input=example(model))
    assert {row.name for row in report if row.status in ("compensated", "window")} == norms(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(g, e) for g, e in zip(outputs(model), expected, strict=True))

    cbn.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert all(torch.equal(g, e) for g, e in zip(outputs(model), expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_at_batch_one(name: str) -> None:
    """deeplabv3's pooling branch has one value per channel then, at which BatchNorm raises."""
    model = randomized(MODELS[name]())
    # random statistics are not those of the network: from them some activations begin dead
    cbn.convert(model, example_input=example(model), start="empty")
    layers = {n: model.get_submodule(n) for n in norms(model)}
    before = {n: m.weight.detach().clone() for n, m in layers.items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        loss = loss_of(model, torch.rand(1, 3, 64, 64))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [n for n, m in layers.items() if torch.equal(m.weight, before[n])] == []


def test_batchnorm_itself_refuses_one_value_per_channel() -> None:
    """What the test above would otherwise not show."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        loss_of(segmenter().train(), X)


def test_auxiliary_heads_are_in_the_report() -> None:
    model = models.googlenet(weights=None, num_classes=4, aux_logits=True, init_weights=False)
    report = cbn.convert(model, example_input=X)
    rows = {row.name: row for row in report}
    assert set(rows) == norms(model)
    assert rows["aux1.conv.bn"].fed_by == "aux1.conv.conv"  # which only training reaches


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18"])
def test_video_networks_are_compensated_throughout(name: str) -> None:
    """Their convs are subclasses with a constructor of their own."""
    clip = torch.randn(1, 3, 4, 32, 32)
    model = randomized(models.get_model(name, weights=None, num_classes=4))
    assert cbn.convert(model, example_input=clip).counts == {"compensated": 20, "window": 0, "kept": 0}
    folded = cbn.fold(model, "conv", example_input=clip)
    assert not [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    torch.testing.assert_close(folded(clip), model(clip), rtol=1e-3, atol=1e-4)
