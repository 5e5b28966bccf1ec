"""torch.compile and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torch._dynamo
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.models import randomize_norms
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin, Window, folded, graph
from cbn_convert.norm.folded import scales_output
from cbn_convert.refusals import refuse_capture

pytestmark = pytest.mark.usefixtures("turns")  # so that there are steps without a look


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


def trained(models: list[tuple[nn.Module, nn.Module]], steps: int = 7, size: int = 12, rate: float = 0.05) -> None:
    """Steps of SGD on pairs of a callable and the model whose parameters it has; all stay the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(2, 3, size, size, generator=generator).to(next(models[0][1].parameters()).dtype)
        outputs = []
        for call, model in models:
            model.zero_grad()
            out = call(x)
            out.square().mean().backward()
            outputs.append(out.detach())
            with torch.no_grad():
                for p in model.parameters():
                    p -= rate * p.grad
        for out in outputs[1:]:
            torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)
    for _, model in models[1:]:
        torch.testing.assert_close(model.state_dict(), models[0][1].state_dict(), rtol=1e-4, atol=1e-5)


class Counted:
    """A backend that runs graphs as they are, or by another one, and counts those in which something is computed."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += any(node.op == "call_function" for node in graph.graph.nodes)
        return self.backend(graph, inputs)


@pytest.mark.parametrize(("way", "graphs"), [("ring", 3), ("carried", 1)])
def test_compiled_training_has_the_same_numbers(way: str, graphs: int) -> None:
    """One graph where layers train folded; else one before, between and behind the two norms, each compiled once."""
    net, twin, counted = converted(way), converted(way), Counted()
    trained([(twin, twin), (torch.compile(net, backend=counted), net)])
    assert counted.graphs == graphs
    if way == "carried":
        for layer in ("bn_a", "bn_b"):
            mine, theirs = (m.get_submodule(layer).history_state()["sources"][0] for m in (net, twin))
            torch.testing.assert_close(mine.pop("slots"), theirs.pop("slots"), rtol=1e-4, atol=1e-5)
            assert mine == theirs
            assert net.get_submodule(layer).iteration == 7


def test_a_momentum_encoder_is_followed() -> None:
    """That its weights move without a gradient is found out behind the graph, which is compiled once."""
    nets, counted = [converted("carried").double().requires_grad_(False) for _ in range(2)], Counted("aot_eager")
    call = torch.compile(nets[1], backend=counted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(24):
        x = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(call(x), nets[0](x), rtol=1e-9, atol=1e-9)
        change = 0.05 * torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64)
        for net in nets:
            net.a.weight.add_(change)
    assert nets[1].bn_a.compensated
    assert not nets[1].bn_b.compensated
    assert counted.graphs == 1


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_network_trains_in_one_graph(name: str) -> None:
    """Steps that look, and that do not, in the graph that the first one was compiled to."""
    net = randomize_norms(timm.create_model(name, num_classes=4)).double()
    cbn.convert(net, window=Window(every=2), example_input=torch.randn(1, 3, 48, 48, dtype=torch.float64))
    twin, counted = copy.deepcopy(net.train()), Counted("aot_eager")
    trained([(twin, twin), (torch.compile(net, backend=counted, fullgraph=True), net)], 10, 32, 1e-3)
    assert counted.graphs == 1
    states = [m._sources[0].state for m in net.modules() if isinstance(m, CrossIterationMixin)]
    assert {(state.seen, state.looks) for state in states} <= {(10, 5), (10, 6)}


def test_inductor_trains_a_network() -> None:
    net, twin = converted("carried"), converted("carried")
    trained([(twin, twin), (torch.compile(net, backend="inductor", fullgraph=True), net)], 4)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_inductor_trains_layers_of_all_kinds(layout: str) -> None:
    """It chooses the order in memory of what comes between operators, and insists on that of what they return."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.ConvTranspose2d(4, 6, 2, 2, groups=2)]
        norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm1d(5)]
        parts += [nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 5))]
        order = torch.channels_last if layout == "last" else torch.contiguous_format
        model = nn.Sequential(*[m for pair in zip(parts, norms, strict=True) for m in pair])
        model = randomize_norms(model).double().to(memory_format=order)
        cbn.convert(model, example_input=torch.randn(2, 3, 3, 3, dtype=torch.float64))
        return model.train()

    net, twin = made(), made()
    trained([(twin, twin), (torch.compile(net, backend="inductor", fullgraph=True), net)], 3, 3, 1e-3)


class Clamped(nn.Module):
    """Convs whose norms end in ReLU6, as MobileNetV2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 16, 3, bias=False), BatchNormAct2d(16, act_layer=nn.ReLU6)
        self.b, self.bn_b = nn.Conv2d(16, 16, 3, bias=False), BatchNormAct2d(16, act_layer=nn.ReLU6)
        self.c, self.bn_c = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn_b(self.b(self.bn_a(self.a(4 * x))))
        return self.bn_c(self.c(x)).mean((2, 3))


def test_a_graph_keeps_no_mask_of_a_clamp_whose_output_it_keeps() -> None:
    net = randomize_norms(Clamped())
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12))
    twin, kept = copy.deepcopy(net.train()), []

    def forward(graph, inputs):
        kept.extend(one.meta["val"] for one in graph.graph.find_nodes(op="output")[0].args[0] if one is not None)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
    )  # fmt: skip
    trained([(twin, twin), (torch.compile(net, backend=backend, fullgraph=True), net)])
    activations = [t for t in kept if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[0] == 2]
    assert [t.dtype for t in activations] == 3 * [torch.float32]  # the inputs of the convs


@pytest.mark.skipif(not graph._tags("flexible_layout"), reason="this torch's inductor copies inputs in any case")
def test_inductor_gives_a_step_its_input_in_the_order_in_which_the_conv_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomize_norms(Clamped())
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(graph, "refuse_capture", seen.append)
    torch.compile(net.train(), fullgraph=True)(torch.randn(2, 3, 12, 12)).sum().backward()
    inner = [x for x in seen if x.shape[1] == 16]
    assert len(inner) == 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inner)


def test_a_graph_is_differentiated_when_its_model_is_gone() -> None:
    net, x = converted("carried"), torch.randn(2, 3, 12, 12)
    twin, weight = copy.deepcopy(net), net.a.weight
    out = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    cbn.revert(net)
    del net
    out.square().mean().backward()
    twin(x).square().mean().backward()
    torch.testing.assert_close(weight.grad, twin.a.weight.grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [Window(gradient="current"), Window.TUNE], ids=str)
def test_windows_of_other_kinds_train_in_one_graph(window: Window, bias: bool) -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers += [nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), randomize_norms(nn.BatchNorm2d(6)), nn.ReLU(True))]
        cbn.convert(layers[-1], window=window, example_input=torch.randn(1, 3, 12, 12))
    trained([(layers[0], layers[0]), (torch.compile(layers[1], backend="aot_eager", fullgraph=True), layers[1])])


def test_a_linear_and_a_transposed_layer_train_in_one_graph() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        up = nn.Sequential(nn.ConvTranspose2d(3, 6, 3, 2, groups=3), nn.BatchNorm2d(6), nn.SiLU())
        model = nn.Sequential(up, nn.Flatten(), nn.Linear(6 * 25 * 25, 8), nn.BatchNorm1d(8), nn.ReLU())
        cbn.convert(randomize_norms(model), example_input=torch.randn(2, 3, 12, 12))
        return model.train()

    net, twin = made(), made()
    trained([(twin, twin), (torch.compile(net, backend="aot_eager", fullgraph=True), net)], 3)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_with_more_weights_than_outputs(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which, in float32 and float64, the output is scaled and not the weight; a γ of 0 has a gradient as well."""
    monkeypatch.setattr(folded, "FEW_WEIGHTS", 0)

    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn_a = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.b, self.bn_b = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
            self.up, self.bn_up = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6)
            self.c, self.bn_c = nn.Linear(24, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn_b(self.b(torch.relu(self.bn_a(self.a(x))))))
            x = torch.relu(self.bn_up(self.up(x)))
            return self.bn_c(self.c(x.flatten(1)))

    sizes = []
    monkeypatch.setattr(folded, "scales_output", lambda *of: sizes.append(scales_output(*of)) or sizes[-1])
    torch.manual_seed(0)
    net = randomize_norms(Few())
    net.bn_b.weight.data[1] = 0
    net.to(dtype, memory_format=torch.channels_last if layout == "last" else torch.contiguous_format)
    cbn.convert(net, example_input=torch.randn(1, 3, 5, 5, dtype=dtype))
    twin = copy.deepcopy(net.train())
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    for i in range(3):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        got, want = compiled(x), twin(y)
        got.square().mean().backward()
        want.square().mean().backward()
        torch.testing.assert_close(got, want, **tolerance)
        grads = [[x.grad, *(p.grad for p in net.parameters())], [y.grad, *(p.grad for p in twin.parameters())]]
        torch.testing.assert_close(*grads, **tolerance)
        with torch.no_grad():
            for model in (net, twin):
                for p in model.parameters():
                    p -= 0.05 * p.grad
                model.zero_grad()
    assert any(sizes) == (dtype is torch.float64)


def test_few_tokens_behind_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """[N, T, F], of which the output is scaled along its last axis; the norm sees it transposed."""
    monkeypatch.setattr(folded, "FEW_WEIGHTS", 0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn = nn.Linear(16, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.a(x).transpose(1, 2))

    torch.manual_seed(0)
    net = randomize_norms(Tokens()).double()
    cbn.convert(net, example_input=torch.randn(2, 3, 16, dtype=torch.float64))
    twin, x = copy.deepcopy(net.train()), torch.randn(2, 3, 16, dtype=torch.float64)
    got, want = torch.compile(net, backend="aot_eager")(x), twin(x)
    torch.testing.assert_close(got, want)
    for out in (got, want):
        out.square().mean().backward()
    torch.testing.assert_close(net.a.weight.grad, twin.a.weight.grad)


def test_autocast_in_a_graph() -> None:
    net, twin = converted("carried"), converted("carried")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for i in range(3):
        x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(i))
        with torch.autocast("cpu", torch.bfloat16):
            got, want = compiled(x), twin(x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("compiled", ["the checkpointed model", "what is checkpointed", "a conv in it"])
def test_activation_checkpointing_counts_every_step_once(compiled: str) -> None:
    """The first breaks the graph, since a checkpoint in a graph must leave nothing behind."""
    net, twin = converted("carried"), converted("carried")
    call: Callable[..., torch.Tensor] = partial(checkpoint, net, use_reentrant=False)
    if compiled == "the checkpointed model":
        call = torch.compile(call, backend="aot_eager")
    else:
        (net if compiled == "what is checkpointed" else net.a).compile(backend="aot_eager")
    trained([(twin, twin), (call, net)])
    assert net.bn_a.iteration == twin.bn_a.iteration == 7


def test_a_conv_that_is_compiled_alone_is_counted_once() -> None:
    net, twin, x = converted("carried"), converted("carried"), torch.randn(2, 3, 12, 12)
    compiled = torch.compile(net.a, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(net.bn_a(compiled(x)), twin.bn_a(twin.a(x)), rtol=1e-4, atol=1e-5)
    assert net.bn_a.iteration == 3
    compiled(x)  # its output is lost
    net.bn_a(net.a(x))
    assert net.bn_a.iteration == 5


def test_a_first_batch_that_is_not_finite() -> None:
    net, twin = converted("carried"), converted("carried")
    x = torch.randn(2, 3, 12, 12)
    x[1, 0, 0, 0] = float("nan")
    got, want = torch.compile(net, backend="aot_eager", fullgraph=True)(x), twin(x)
    torch.testing.assert_close(got[0], want[0])
    trained([(twin, twin), (net, net)], 2)


def test_tokens_behind_a_linear_layer() -> None:
    """As in LeViT: [N, T, F] go to the norm as [N·T, F]."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn = nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x.flatten(1, 2))
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    torch.manual_seed(0)
    net = randomize_norms(Tokens())
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12))
    twin = copy.deepcopy(net.train())
    trained([(twin, twin), (torch.compile(net, backend="aot_eager"), net)])


def test_a_change_between_conv_and_norm_is_noticed_where_a_graph_is_made() -> None:
    class Changed(Net):
        change = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head(self.bn_b(self.b(torch.relu(self.bn_a(x + 1 if self.change else x)))).mean((2, 3)))

    net = randomize_norms(Changed())
    cbn.convert(net, example_input=torch.randn(1, 3, 12, 12))
    net.change = True
    with pytest.raises(RuntimeError, match=r"'bn_a' is bound to a Conv2d whose output is changed"):
        torch.compile(net.train(), backend="eager")(torch.randn(2, 3, 12, 12))


def test_a_branch_beside_a_linear_layer_is_noticed() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.beside = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(5, 4)
            self.on = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.a(x) + self.beside(x) if self.on else self.a(x))

    net, x = randomize_norms(Branched()), torch.randn(6, 5)
    cbn.convert(net, example_input=x)
    net.on = True
    with pytest.raises(RuntimeError, match=r"'bn' is bound to a Linear whose output is changed"):
        torch.compile(net.train(), backend="aot_eager")(x)


def test_an_output_that_never_comes_to_the_norm_is_an_error() -> None:
    net = converted("carried")
    kept, net.bn_a = net.bn_a, nn.Identity()
    compiled, x = torch.compile(net, backend="aot_eager"), torch.randn(2, 3, 12, 12)
    for _ in range(3):
        compiled(x)
    with pytest.raises(RuntimeError, match="but its output goes elsewhere"):
        compiled(x)
    assert kept.training


def test_one_compiled_model_between_training_and_evaluation() -> None:
    net, twin = converted("carried"), converted("carried")
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(2, 3, 12, 12)
    for size in (2, 2, 1):
        trained([(twin, twin), (compiled, net)], 2)
        torch.testing.assert_close(compiled(x[:size]), twin(x[:size]), rtol=1e-4, atol=1e-5)
        for model in (twin, net):
            model.eval()
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
        for model in (twin, net):
            model.train()
        trained([(net, net), (twin, twin)], 2)  # eager in between


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 fails with operators of others there"
)
def test_what_is_seen_under_inference_mode_trains_afterwards() -> None:
    net, x = converted("carried"), torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        torch.compile(net, backend="aot_eager")(x)
    net(x).sum().backward()


def test_a_frozen_conv_compiles_at_most_twice() -> None:
    net, twin, counted = converted("carried"), converted("carried"), Counted("aot_eager")
    for model in (net, twin):
        model.a.weight.requires_grad_(False)
    compiled, x = torch.compile(net, backend=counted, fullgraph=True), torch.randn(2, 3, 12, 12)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counted.graphs <= 2


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_captured_as_a_cuda_graph_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and compiled, on something that says that it is on CUDA, since there may be none."""
    seen = []

    def refuse(x: torch.Tensor) -> None:
        seen.append(x)
        refuse_capture(SimpleNamespace(is_cuda=True))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for place in ("cbn_convert.refusals", "cbn_convert.norm.graph"):
        monkeypatch.setattr(f"{place}.refuse_capture", refuse)
    net, x = converted(way), torch.randn(2, 3, 12, 12)
    for call in (net, torch.compile(net, backend="aot_eager")):
        with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
            call(x)
    assert len(seen) == 2
    net.eval()(x)


def test_a_model_that_is_not_the_compiled_one_any_more_is_an_error() -> None:
    """What began with other statistics trains in another way, of which the graph knows nothing."""
    net = converted("carried")
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(2, 3, 12, 12)
    compiled(x)
    net.bn_a.reset_running_stats()
    with pytest.raises(RuntimeError, match="compile it again"):
        compiled(x)


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
