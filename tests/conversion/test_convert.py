"""convert, revert and warm_up on timm backbones and on modules of other origin."""

from __future__ import annotations

import collections
import copy
import pickle
from contextlib import nullcontext

import pytest
import timm
import torch
from helpers.models import randomize_norms
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import cbn_convert as cbn
from cbn_convert.errors import ConversionError
from cbn_convert.norm import CrossIterationBatchNorm2d, CrossIterationMixin

BACKBONES = {
    "resnet18": {},
    "resnext50_32x4d": {"layers": [1, 1, 1, 1]},
    "mobilenetv2_035": {"pad_type": "same"},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "regnety_002": {},
    "regnetx_002": {},
}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(timm.create_model(name, num_classes=5, **BACKBONES[name])).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_conversion_keeps_outputs_and_keys_and_revert_restores_bytes(name: str) -> None:
    model = backbone(name)
    classes = {n: type(m) for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(X)
    report = cbn.convert(model, example_input=X)
    assert report.counts == {"compensated": len(report), "window": 0, "kept": 0}
    assert all(isinstance(model.get_submodule(row.name), CrossIterationMixin) for row in report)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == list(before)
    assert [n for n, _ in model.named_modules()] == list(classes)

    cbn.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert not any(m._forward_hooks for m in model.modules())
    assert not any("window" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "regnety_002"])
def test_pairs_are_those_of_the_autograd_graph(name: str) -> None:
    """Each layer is bound to the conv whose weight the gradient graph shows directly above it."""
    model = backbone(name)
    report = cbn.convert(model, example_input=X)
    owners = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    found: dict[str, str] = {}

    def hook(layer_name):
        def look(module, args):
            inputs = [node for node, _ in args[0].grad_fn.next_functions if node is not None]
            weight = next(n.variable for n in inputs if hasattr(n, "variable"))
            found[layer_name] = owners[id(weight)]

        return look

    for row in report:
        model.get_submodule(row.name).register_forward_pre_hook(hook(row.name))
    model(X)
    assert found == {row.name: row.fed_by for row in report}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_converted_model_trains_and_survives_copies(name: str) -> None:
    model = backbone(name).train()
    cbn.convert(model, window=4, example_input=X)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for _ in range(3):
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        producers = {id(p) for m in twin.modules() if isinstance(m, CrossIterationMixin) for p in m.producers}
        assert producers <= {id(m) for m in twin.modules()}
        torch.manual_seed(3)
        expected = copy.deepcopy(model)(X)
        torch.manual_seed(3)
        assert torch.equal(twin(X), expected)


def test_layers_without_their_own_weight_are_averaged_and_say_so() -> None:
    report = cbn.convert(timm.create_model("densenet121", num_classes=5), example_input=X)
    rows = {row.name: row for row in report}
    assert rows["features.denseblock1.denselayer1.norm2"].fed_by == "features.denseblock1.denselayer1.conv1"
    concat = rows["features.denseblock1.denselayer2.norm1"]
    assert (concat.status, concat.fed_by) == ("window", None)
    assert "cat" in concat.reason


class Tricky(nn.Module):
    """Names and registration order are wrong on purpose; outputs are changed in place, shared and reused."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_a, self.bn_b, self.bn_c, self.bn_d, self.bn_e = (nn.BatchNorm2d(4) for _ in range(5))
        self.never = nn.BatchNorm2d(4)
        self.conv_b, self.conv_a = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.twice, self.changed = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.bn_a(self.conv_b(x))
        x = self.bn_b(self.conv_a(x))
        x = self.bn_c(self.twice(x)) + self.twice(x)
        changed = self.changed(x)
        changed += 1
        x = self.bn_d(changed)
        return self.bn_e(self.bn_e(x))


def test_pairing_follows_tensors() -> None:
    model = Tricky()
    rows = {r.name: r for r in cbn.convert(model, example_input=torch.randn(1, 3, 8, 8))}
    assert {n: (r.status, r.fed_by) for n, r in rows.items()} == {
        "bn_a": ("compensated", "conv_b"),
        "bn_b": ("compensated", "conv_a"),
        "bn_c": ("window", None),
        "bn_d": ("window", None),
        "bn_e": ("kept", None),
        "never": ("kept", None),
    }
    assert "2 times" in rows["bn_e"].reason
    assert "2 times" in rows["bn_c"].reason
    assert "not reached" in rows["never"].reason
    assert type(model.bn_e) is nn.BatchNorm2d
    out = model.train()(torch.randn(2, 3, 8, 8))
    out.sum().backward()


@pytest.mark.parametrize("write", ["setitem", "view", "slice-add"])
def test_writing_into_the_output_of_a_conv_breaks_the_pair(write: str) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            if write == "setitem":
                y[:, :2] = 1.0
            elif write == "view":
                y[:, :2].mul_(2)
            else:
                y[:, :3] += x
            return self.bn(y)

    assert cbn.convert(Written(), example_input=X).rows[0].status == "window"


def test_a_linear_on_tokens_is_not_what_batchnorm1d_normalises() -> None:
    model = nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Linear(4, 8), nn.BatchNorm1d(5))
    report = cbn.convert(model, example_input=torch.randn(3, 5, 4))
    assert [r.status for r in report] == ["compensated", "window"]


def test_converting_the_rest_later_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    cbn.convert(model, include="1", example_input=X)
    model(X)
    cbn.convert(model, example_input=X, start="empty")
    model(X)
    assert [model[i].history_state()["sources"][0]["seen"] for i in (1, 3)] == [2, 1]


def test_convert_twice_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    first = cbn.convert(model, window=4, example_input=torch.randn(1, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8))
    state = model[1]._sources[0].state
    second = cbn.convert(model, window=16, example_input=torch.randn(1, 3, 8, 8))
    assert model[1].window.size == 4
    assert model[1]._sources[0].state is state
    assert [r.status for r in second] == [r.status for r in first] == ["compensated"]
    assert "already" in second.rows[0].reason


def test_include_and_exclude() -> None:
    def statuses(**selection) -> list[str]:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        return [r.status for r in cbn.convert(model, example_input=torch.randn(1, 3, 8, 8), **selection)]

    assert statuses(include="3") == ["kept", "compensated"]
    assert statuses(exclude=["3", "7"]) == ["compensated", "kept"]
    assert statuses(include=lambda name, module: name == "1") == ["compensated", "kept"]
    assert statuses(include="9") == ["kept", "kept"]


def test_refusals_leave_the_model_alone() -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ConversionError, match="Linear has no BatchNorm"):
        cbn.convert(nn.Linear(3, 4))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), SplitBatchNorm2d(4, num_splits=2))
    with pytest.raises(ConversionError, match="'2' is a SplitBatchNorm2d"):
        cbn.convert(model, example_input=x)
    assert type(model[1]) is nn.BatchNorm2d
    assert [r.status for r in cbn.convert(model, exclude="2*", example_input=x)] == ["compensated", "kept", "kept"]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ConversionError, match=r"cannot run on the example input of shape \(1, 7, 8, 8\)"):
        cbn.convert(model, example_input=torch.randn(1, 7, 8, 8))
    with pytest.raises(ConversionError, match="window must be"):
        cbn.convert(model, window=0, example_input=x)
    assert type(model[1]) is nn.BatchNorm2d
    assert model.training


def test_example_input_may_be_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), BatchNormAct2d(4)

        def forward(self, a, scale):
            return self.bn(self.conv(a) if scale is None else self.conv(a * scale))

    a, scale = torch.randn(1, 3, 8, 8), torch.ones(1)
    for example in ((a, scale), {"a": a, "scale": scale}):
        assert cbn.convert(Two(), example_input=example).counts["compensated"] == 1


def test_tracing_leaves_buffers_modes_and_random_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cbn.convert(model)
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_warm_up_fills_the_history_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    cbn.convert(model, window=4, history="ring", exclude="3", example_input=torch.randn(1, 3, 8, 8))
    before = copy.deepcopy(model.state_dict())
    cbn.warm_up(model, [(torch.randn(2, 3, 8, 8), torch.zeros(2)), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)])
    assert isinstance(model[1], CrossIterationBatchNorm2d)
    (state,) = model[1].history_state()["sources"]
    assert len(state["slots"]["mean"]) == state["seen"] == 3
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_warm_up_says_which_keys_a_model_does_not_take() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    cbn.convert(model)
    batch = {"input": torch.randn(2, 3, 8, 8), "label": torch.zeros(2)}
    with pytest.raises(ConversionError, match=r"cannot call Sequential with a batch's input, label \(.*pass forward="):
        cbn.warm_up(model, [batch])
    cbn.warm_up(model, [{"input": batch["input"]}])
    cbn.warm_up(model, [batch], forward=lambda m, b: m(b["input"]))
    assert cbn.history_state(model)["1"]["iteration"] == 2


def test_warm_up_makes_the_first_step_that_of_the_joined_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    cbn.convert(model, window=4, example_input=torch.randn(1, 3, 8, 8))
    images = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    cbn.warm_up(model, images[:3])
    expected = nn.functional.batch_norm(model[0](torch.cat(images)), None, None, training=True)[-2:]
    torch.testing.assert_close(model(images[3]), expected, rtol=1e-4, atol=1e-5)


class Restless(nn.Module):
    """Changes buffers and parameters in every way that a forward pass in training mode may."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(3, 4, 3))
        self.bn, self.instance = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)
        self.excluded, self.dropout = nn.BatchNorm2d(4), nn.Dropout()
        self.teacher = nn.Parameter(torch.ones(4), requires_grad=False)
        for name in ("rebound", "written", "hidden"):
            self.register_buffer(name, torch.zeros(4))
        self.register_buffer("center", torch.zeros(4), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.excluded(self.instance(self.bn(self.conv(images))))
        if self.training:
            mean = x.detach().mean((0, 2, 3)) + 1
            self.rebound, self.center = self.rebound + mean, mean
            self.written[:2] += 1
            self.hidden.data.copy_(mean)
            self.teacher.data = 0.9 * self.teacher.data + 0.1 * mean
        return self.dropout(x)


@pytest.mark.parametrize("fails", [False, True])
def test_warm_up_restores_every_parameter_and_buffer_and_mode(fails: bool) -> None:
    model = Restless()
    model.dropout.eval()
    cbn.convert(model, exclude="excluded")
    tensors = {name: (t, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="channels") if fails else nullcontext():
        cbn.warm_up(model, [X, X + 1, *([X[:, :2]] if fails else [])])
    assert model.bn.history_state()["sources"][0]["seen"] == 2
    assert [m.training for m in model.modules()] == modes
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == tensors.keys()
    for name, (t, value) in tensors.items():
        assert after[name] is t, name
        assert torch.equal(t, value), name


class Batch(collections.UserDict):
    """A mapping that is no dict, as transformers' BatchEncoding."""


Pair = collections.namedtuple("Pair", ["inputs", "labels"])


@pytest.mark.parametrize("form", ["mapping", "nested", "named", "forward"])
def test_warm_up_moves_containers_to_the_models_device(form: str) -> None:
    """On the meta device, which takes no tensors of another one."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.sums = nn.Conv2d(3, 4, 3, device="meta"), []

        def forward(self, images: torch.Tensor, masks: list[torch.Tensor]) -> None:
            self.sums.append(sum(masks, self.conv(images)))

    inputs = {"images": X, "masks": [torch.ones(1), torch.ones(62)]}
    batches = {
        "mapping": (Batch(inputs), None),
        "nested": ([inputs, torch.zeros(2)], None),
        "named": (Pair(inputs, torch.zeros(2)), None),
        "forward": ((X, {"rest": (inputs["masks"], "text")}), lambda model, b: model(b[0], masks=b[1]["rest"][0])),
    }
    batch, forward = batches[form]
    model = Two()
    cbn.warm_up(model, [batch, batch], forward=forward)
    assert [t.shape for t in model.sums] == [(2, 4, 62, 62)] * 2


def test_torchvision_models_convert_too() -> None:
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(num_classes=4)
    report = cbn.convert(model, example_input=X)
    assert report.counts["compensated"] == len(report) == 34
    assert "34 compensated" in str(report)
    assert report.to_dict()["layers"][0]["fed_by"] == "features.0.0"


@pytest.mark.parametrize(
    ("arrange", "status"),
    [
        (lambda x: x.flatten(0, 1), "compensated"),
        (lambda x: x.transpose(1, 2), "compensated"),
        (lambda x: x.transpose(0, 1).flatten(0, 1), "window"),  # the positions in another order
        (lambda x: x.unflatten(1, (6, -1)).flatten(1, 2)[:, :6] * 1.0, "window"),  # other values
    ],
)
def test_linear_on_tokens_is_paired_where_the_norm_sees_its_output(arrange, status: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(arrange(self.linear(x)))

    model = Tokens().train()
    x = torch.randn(3, 6, 5)
    report = cbn.convert(model, example_input=x)
    assert [row.status for row in report] == [status]
    for _ in range(3):
        model(torch.randn(3, 6, 5)).square().sum().backward()


def test_every_kind_of_producer_is_paired() -> None:
    from timm.layers import ScaledStdConv2d, StdConv2dSame

    convs = [
        nn.ConvTranspose2d(4, 4, 3),
        StdConv2dSame(4, 4, 3),
        ScaledStdConv2d(4, 4, 3),
        spectral_norm(nn.Conv2d(4, 4, 1)),
    ]
    model = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(4)))).train()
    report = cbn.convert(model, example_input=torch.randn(1, 4, 8, 8))
    assert {row.status for row in report} == {"compensated"}
    for _ in range(3):
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()


def test_one_conv_feeding_two_norms_compensates_both() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.a(x) + self.b(x)

    model = Fork().train()
    report = cbn.convert(model, example_input=torch.randn(1, 3, 8, 8))
    assert [row.status for row in report] == ["compensated", "compensated"]
    assert model.a.producers == model.b.producers == (model.conv,)
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert model.a.history_state()["sources"][0]["seen"] == model.b.history_state()["sources"][0]["seen"] == 3


def test_a_norm_that_another_conv_feeds_by_a_flag_is_an_error_at_once() -> None:
    """Its past would be carried along with weights that have nothing to do with what it sees."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs, self.bn = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(2)), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor, which: int = 0) -> torch.Tensor:
            return self.bn(self.convs[which](x))

    model = randomize_norms(Switch()).train()
    assert cbn.convert(model, example_input=X).counts["compensated"] == 1
    for _ in range(2):
        model(X)
    with pytest.raises(RuntimeError, match="bound to a Conv2d that has not run"):
        model(X, 1)


def test_writes_after_the_producer_unpair() -> None:
    class Hidden(nn.Module):
        def __init__(self, write) -> None:
            super().__init__()
            self.conv, self.bn, self.write = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), write

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            self.write(x)
            return self.bn(x)

    for write in (lambda h: h.detach().relu_(), lambda h: h.transpose(1, 2).relu_(), lambda h: h.transpose_(2, 3)):
        report = cbn.convert(Hidden(write), example_input=torch.randn(1, 3, 8, 8))
        assert [row.status for row in report] == ["window"]


def test_exact_for_a_transposed_conv_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ConversionError, match="exact"):
        cbn.convert(model, compensation="exact", example_input=torch.randn(1, 3, 8, 8))
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[0]._forward_hooks
