"""Pairing by tensors: what counts as fed by a module, and what must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.errors import ConversionError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Fed(nn.Module):
    """Norms behind what a function makes of two convs of 4 channels each."""

    def __init__(self, feed: Callable[..., Tensor | tuple[Tensor, ...]], *channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in channels)
        self.feed = feed

    def forward(self, x: Tensor) -> list[Tensor]:
        fed = self.feed(self, x)
        return [norm(t) for norm, t in zip(self.norms, fed if isinstance(fed, tuple) else (fed,), strict=True)]


@torch.jit.script
def scripted_shift(x: Tensor) -> Tensor:
    return x.add_(1.0)


CASES: dict[str, tuple[Callable, list[int], list[str | None]]] = {
    "concatenated": (lambda m, x: torch.cat([m.b(x), m.a(x)], 1), [8], ["b, a"]),
    "concatenated along the batch": (lambda m, x: torch.cat([m.a(x), m.a(x + 1)], 0), [4], [None]),
    "concatenated with itself": (lambda m, x: torch.cat([t := m.a(x), t], 1), [8], ["a"]),
    "concatenated with a constant": (lambda m, x: torch.cat([m.a(x), torch.ones(1, 4, 6, 6)]), [4], [None]),
    "concatenated with something else": (lambda m, x: torch.cat([m.a(x), m.b(x).relu()], 1), [8], [None]),
    "concatenated and cut across": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1)[:, 2:7], [5], ["a, b"]),
    "chunk": (lambda m, x: m.a(x).chunk(2, 1), [2, 2], ["a", "a"]),
    "split": (lambda m, x: m.a(x).split([1, 3], 1), [1, 3], ["a", "a"]),
    "narrow, cloned": (lambda m, x: m.a(x).narrow(1, 1, 2).clone(), [2], ["a"]),
    "every second channel": (lambda m, x: m.a(x)[:, ::2], [2], [None]),
    "channels in another order": (lambda m, x: m.a(x).flip(1), [4], [None]),
    "a part of the positions": (lambda m, x: m.a(x)[:, :, 1:], [4], [None]),
    "flattened and back": (lambda m, x: m.a(x).flatten(2).unflatten(2, (6, 6)), [4], ["a"]),
    "detached": (lambda m, x: m.a(x).detach(), [4], ["a"]),
    "in another layout": (lambda m, x: m.a(x).contiguous(memory_format=torch.channels_last), [4], ["a"]),
    "functional conv with a module's weight": (lambda m, x: F.conv2d(x, m.a.weight, m.a.bias), [4], [None]),
    "written to by a scripted function": (lambda m, x: scripted_shift(m.a(x)), [4], [None]),
    "written to through a chunk": (lambda m, x: (t := m.a(x), t.detach().chunk(2, 1)[1].zero_())[0], [4], [None]),
    "added to in place": (lambda m, x: m.a(x).add_(m.b(x)), [4], [None]),
    "dropout, which evaluation does not show": (lambda m, x: F.dropout(m.a(x), 0.5, m.training), [4], [None]),
    "dropout that drops nothing": (lambda m, x: F.dropout(m.a(x), 0.0, m.training), [4], ["a"]),
    "another branch in training": (lambda m, x: m.b(x) if m.training else m.a(x), [4], ["b"]),
    "reached in training alone": (lambda m, x: m.a(x) if m.training else (), [4], ["a"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_fed_by(case: str) -> None:
    feed, channels, expected = CASES[case]
    model = Fed(feed, *channels).train()
    if case == "reached in training alone":
        model.forward = lambda x: [model.norms[0](model.a(x))] if model.training else []
    report = cbn.convert(model, window=4, example_input=X)
    assert [row.fed_by for row in report] == expected
    assert {row.status for row in report} == {"window" if fed is None else "compensated" for fed in expected}
    for _ in range(4):  # each layer checks at run time that it gets what its modules made
        sum(t.square().sum() for t in model(X)).backward()


@pytest.mark.parametrize("name", ["convmixer_768_32", "densenet121", "repghostnet_050"])
def test_memory_that_was_freed_makes_no_false_pairs(name: str) -> None:
    """Matching by id() of freed tensors gave 29 false pairs in convmixer_768_32 (the census, section 6)."""
    model = timm.create_model(name, num_classes=5).eval()
    report = cbn.convert(model, example_input=torch.randn(1, 3, 64, 64))
    owners = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    behind: dict[str, str | None] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            node = args[0].grad_fn
            weights = [n.variable for n, _ in node.next_functions if hasattr(n, "variable")]
            conv = type(node).__name__ == "ConvolutionBackward0"
            behind[name] = owners[id(weights[0])] if conv else None

        return look

    for row in report:
        model.get_submodule(row.name).register_forward_pre_hook(watch(row.name))
    model(torch.randn(1, 3, 64, 64))
    assert behind == {row.name: row.fed_by for row in report}


def test_the_meta_device_shows_the_same_pairs() -> None:
    for name, kwargs in {"mixnet_s": {}, "levit_128s": {}, "lambda_resnet26t": {}, "densenet121": {}}.items():
        rows = cbn.convert(timm.create_model(name, **kwargs), window=16, start="empty").rows
        with torch.device("meta"):
            model = timm.create_model(name, **kwargs)
        assert cbn.convert(model, window=16, start="empty").rows == rows
        assert all(p.is_meta for p in model.parameters())


def test_scripted_norms_are_in_the_report() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(scripted, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    rows = cbn.convert(model, example_input=X).rows
    assert [(row.name, row.norm, row.status) for row in rows] == [
        ("0.1", "BatchNorm2d", "kept"), ("2", "BatchNorm2d", "compensated"),
    ]  # fmt: skip
    assert "scripted" in rows[0].reason
    model(X).sum().backward()


def test_a_compiled_model_is_seen_as_it_is() -> None:
    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), backend="eager")
    assert cbn.convert(model, example_input=X).counts["compensated"] == 1


class OnlyAt(nn.Module):
    """Takes images of one size."""

    def __init__(self, size: int, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.bn, self.size = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), size
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[1:]))
        assert x.shape[-1] == self.size
        return self.bn(self.conv(x))


def test_sizes_are_tried_from_small_to_large() -> None:
    small, own, usual = OnlyAt(64), OnlyAt(96), OnlyAt(256)
    own.pretrained_cfg = {"input_size": (3, 96, 96), "fixed_input_size": True}
    for model in (small, own, usual):
        assert cbn.convert(model).counts["compensated"] == 1
    assert small.seen == [(3, 64, 64)]
    assert own.seen == [(3, 96, 96)]
    assert usual.seen == [(3, n, n) for n in (64, 128, 224, 256)]
    with pytest.raises(ConversionError, match=r"images of shape \(1, 3, 64, 64\).*; pass an example_input"):
        cbn.convert(OnlyAt(77))


def test_models_built_for_other_images_need_no_example() -> None:
    assert cbn.convert(timm.create_model("resnet18", in_chans=2)).counts["compensated"] == 20
    assert cbn.convert(timm.create_model("levit_128s", img_size=96)).counts == {
        "compensated": 50, "window": 2, "kept": 0,
    }  # fmt: skip


def test_a_head_that_was_made_anew_is_converted_by_another_call() -> None:
    """timm's reset_classifier makes a new BatchNorm1d in 47 architectures."""
    model = timm.create_model("levit_128s", num_classes=5, img_size=64)
    cbn.convert(model)
    model.reset_classifier(3)
    assert type(model.head.bn) is nn.BatchNorm1d
    rows = {row.name: row for row in cbn.convert(model)}
    assert rows["head.bn"].status == "window"
    assert "already" not in rows["head.bn"].reason
    assert "already" in rows["stem.conv1.bn"].reason


class Momentum(nn.Module):
    """What a forward pass in training mode may do: write to parameters, to buffers, and put other buffers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slow, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.slow.weight.lerp_(self.conv.weight, 0.5)
            self.mean = 0.9 * self.mean + x.mean()
        return self.bn(self.slow(x)) + self.mean


def test_tracing_in_training_mode_changes_nothing() -> None:
    model = Momentum().eval()
    before, expected, buffer = {k: v.clone() for k, v in model.state_dict().items()}, model(X), model.mean
    assert cbn.convert(model, example_input=X).rows[0].fed_by == "slow"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.mean is buffer
    assert torch.equal(model(X), expected)


def changed_by_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, output: output * 3)


def changed_by_patch(model: nn.Sequential) -> None:
    forward = model[0].forward
    model[0].forward = lambda x: 3 * forward(x)


@pytest.mark.parametrize("change", [changed_by_hook, changed_by_patch])
def test_what_others_make_of_a_conv_is_not_its_output(change: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    change(model)
    assert [row.fed_by for row in cbn.convert(model, example_input=X)] == [None]
    model.train()(X).sum().backward()
    folded = cbn.fold(model, "conv", example_input=X)
    assert torch.equal(folded(X), model.eval()(X))


def test_a_hook_that_changes_the_output_later_is_noticed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    cbn.convert(model, example_input=X)
    changed_by_hook(model)
    with pytest.raises(RuntimeError, match="changed before it arrives"):
        model.train()(X)


def test_the_example_and_the_mode_of_the_caller_are_left_alone() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = X.clone()
    with torch.inference_mode():
        assert cbn.convert(model, example_input=x).counts["compensated"] == 1
    assert torch.equal(x, X)
    for _ in range(3):
        model.train()(X.clone()).sum().backward()


@pytest.mark.parametrize("odd", [
    lambda y: torch.nested.nested_tensor([y[0], y[1]]).to_padded_tensor(0.0),
    lambda y: torch.vmap(lambda t: t * 2)(y),
    lambda y: y.to_sparse().to_dense(),
])  # fmt: skip
def test_tensors_without_memory_of_their_own_kind(odd: Callable) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + odd(y)

    model = Odd().eval()
    assert cbn.convert(model, example_input=X).rows[0].fed_by == "conv"
    assert isinstance(cbn.fold(model, "conv", example_input=X).bn, nn.BatchNorm2d)


def test_an_error_leaves_every_layer_as_it_was() -> None:
    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(()))
            self.register_buffer("running_var", torch.ones(()))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.reward = Reward()
    model.forward = lambda x: model[1](model[0](x))
    assert len(cbn.convert(model, example_input=X)) == 1


def test_selectors_may_be_generators() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    rows = cbn.convert(model, exclude=(str(i) for i in (2, 1)), example_input=X).rows
    assert [row.status for row in rows] == ["kept", "kept"]


def test_a_conv_without_a_batch_axis_has_its_channels_elsewhere() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))  # [6, 6, 6], of which BatchNorm1d takes axis 1 for the channels

    assert cbn.convert(Unbatched(), example_input=X[0]).rows[0].fed_by is None
