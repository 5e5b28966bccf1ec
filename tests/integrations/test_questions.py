"""What docs/recipes.md answers, asked of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from loop import images, network
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin


def pretrained(**options: Any) -> nn.Module:
    net = network().double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        randomize_norms(net.neck)
    if options.pop("converted", True):
        cbn.convert(net, example_input=torch.randn(1, 3, 12, 12, dtype=torch.float64), **options)
    return net.train()


def gradients(net: nn.Module, x: Tensor, y: Tensor, parts: int) -> list[Tensor]:
    net.zero_grad()
    for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
        F.cross_entropy(net(some), labels).div(parts).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.usefixtures("turns")
def test_between_looks_accumulation_is_a_large_batch() -> None:
    x, y = images(8)
    x = x.double()
    whole, parts = pretrained(moments_every=1000), pretrained(moments_every=1000)
    for net in (whole, parts):
        net(x[:2])  # the first step looks
    found = gradients(whole, x, y, 1), gradients(parts, x, y, 4)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    waiting = [layer.history_state()["sources"][0]["waiting"] for layer in (whole.stem[1], parts.stem[1])]
    assert waiting[0] == waiting[1] == 8  # it counts images, whatever the parts
    plain = pretrained(converted=False)
    found = gradients(plain, x, y, 1), gradients(plain, x, y, 4)
    assert not torch.allclose(found[0][0], found[1][0], rtol=0.1)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_frozen_conv_and_its_statistics(evaluating: bool) -> None:
    net = pretrained()
    for p in net.stem.parameters():
        p.requires_grad_(False)
    if evaluating:
        net.stem.eval()
    before = {k: v.clone() for k, v in net.stem.state_dict().items()}
    for i in range(9):
        net(images()[0][2 * i : 2 * i + 2].double()).sum().backward()
    after = net.stem.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["1.running_mean"], after["1.running_mean"]) == evaluating


def test_layers_in_evaluation_are_frozen_batchnorm() -> None:
    x = images(2)[0].double()
    net, plain = pretrained(), pretrained(converted=False)
    for model in (net, plain):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert torch.equal(net(x), plain(x))


def test_sync_batchnorm_becomes_a_synchronised_layer() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(pretrained(converted=False))
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12, dtype=torch.float64))
    layers = [m for m in net.modules() if isinstance(m, CrossIterationMixin)]
    assert len(layers) == 3
    assert all(layer.window.sync for layer in layers)


@pytest.mark.parametrize("new", [False, True])
def test_batch_1_with_one_pixel(new: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    if not new:
        randomize_norms(net)
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(x)
    cbn.convert(net, example_input=x)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for i in range(5):
        out = net(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)))
        optimizer.zero_grad()
        out.pow(2).sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in [*net.parameters(), net[3].running_var])
