"""torch.compile and torch.export."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from conftest import randomize_norms
from torch import nn

import cbn_convert as cbn


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        x = torch.relu(self.bn_b(self.b(x)))
        return self.head(x.mean((2, 3)))


WAYS = {"ring": {"window": 4}, "carried": {"history": "ema", "window": 64, "moments_every": 2}}


def converted(way: str) -> Net:
    torch.manual_seed(0)
    net = randomize_norms(Net())
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12), **WAYS[way])
    return net.train()


@pytest.mark.parametrize("way", WAYS)
def test_compiled_training_has_one_break_per_layer_and_the_same_numbers(way: str) -> None:
    net, twin = converted(way), converted(way)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        x = torch.randn(2, 3, 12, 12, generator=generator)
        outputs = []
        for model, parameters in ((compiled, net), (twin, twin)):
            parameters.zero_grad()
            out = model(x)
            out.pow(3).mean().backward()
            outputs.append(out.detach())
            with torch.no_grad():
                for p in parameters.parameters():
                    p -= 0.05 * p.grad
        assert torch.equal(*outputs)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    # before, between and behind the two norms, each compiled once although the window was filling
    assert len([g for g in graphs if any(node.op == "call_function" for node in g.graph.nodes)]) == 3


@pytest.mark.parametrize("way", WAYS)
def test_compiled_evaluation_has_no_break(way: str) -> None:
    net = converted(way)
    net(torch.randn(2, 3, 12, 12))
    x = torch.randn(2, 3, 12, 12)
    compiled = torch.compile(copy.deepcopy(net).eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net.eval()(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("into", ["bn", "affine", "conv"])
def test_folded_models_can_be_exported(into: str, way: str) -> None:
    net = converted(way)
    for _ in range(3):
        net(torch.randn(2, 3, 12, 12))
    x = torch.randn(2, 3, 12, 12)
    folded = cbn.fold(net, into, example_input=x)
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), net.eval()(x), rtol=1e-4, atol=1e-5)
