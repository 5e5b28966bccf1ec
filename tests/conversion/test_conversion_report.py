"""What a report says: a line for logs, and a page that fits a terminal and names the next step."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import randomize_norms
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import cbn_convert as cbn
from cbn_convert.conversion import ConversionReport, ReportRow, norm_layers
from cbn_convert.errors import CbnWarning


def fits(report: ConversionReport) -> str:
    text = str(report)
    assert max(map(len, text.splitlines())) < 80
    assert "\n" not in report.summary()
    assert report.summary() in " ".join(text.split())
    return " ".join(text.split())


def test_pretrained_layers() -> None:
    report = cbn.convert(randomize_norms(timm.create_model("test_resnet", num_classes=2)))
    assert report.summary().startswith(
        "15 compensated, 0 window, 0 kept of 15 norm layers; 15 train folded; history 0.22 MB"
    )
    assert "Next: train as usual; then cbn.fold(model)" in fits(report)


def test_new_layers_ask_for_weights() -> None:
    report = cbn.convert(timm.create_model("test_resnet", num_classes=2))
    assert "0 train folded" in report.summary()
    assert "Next: load pretrained weights, or train from scratch" in fits(report)


@pytest.mark.parametrize("steps", [1, 10])
def test_new_layers_that_were_tried_in_training_mode_are_told_of(steps: int) -> None:
    """Their running statistics say as good as nothing, and are no zeros and ones any more."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=2).train()
    for _ in range(steps):
        net(torch.randn(2, 3, 64, 64))
    with pytest.warns(CbnWarning, match=r"running statistics of 15 layers \(conv1\.1, \.\.\) are of a few batches"):
        cbn.convert(net)


@pytest.mark.parametrize("steps", [0, 3, 200])
def test_pretrained_layers_that_took_a_few_steps_are_not(steps: int, recwarn: pytest.WarningsRecorder) -> None:
    net = randomize_norms(timm.create_model("test_resnet", num_classes=2)).train()
    for norm in norm_layers(net).values():
        norm.running_var.log_normal_()  # as far apart as those of trained networks
    for _ in range(steps):
        net(torch.randn(2, 3, 48, 48))
    cbn.convert(net)
    assert not [w for w in recwarn if issubclass(w.category, CbnWarning)]


def test_layers_are_named_by_the_reason() -> None:
    report = cbn.convert(randomize_norms(timm.create_model("densenet121", num_classes=2)))
    text = fits(report)
    assert "window, input comes from cat, not directly from a conv or linear layer: features.denseblock1" in text
    assert "norm1 and 59 more" in text


def test_kept_and_frozen_layers_say_what_comes_first() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    text = fits(cbn.convert(Net(), example_input=torch.randn(1, 3, 8, 8)))
    assert "kept, not reached on the example input: other" in text
    assert "Next: if training reaches the kept layers, convert with an example_input that does so; make the opt" in text
    assert "with the new parameters of frozen layers (1)" in text


def test_long_names_and_many_reasons_fit() -> None:
    rows = [ReportRow("a" * 200, "BatchNorm2d", 4, None, "kept", f"reason {i}") for i in range(9)]
    assert "and 3 more reasons" in str(ConversionReport(tuple(rows)))
    assert max(map(len, str(ConversionReport(tuple(rows))).splitlines())) < 80
