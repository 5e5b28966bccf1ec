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
        rows = cbn.convert(timm.create_model(name, **kwargs)).rows
        with torch.device("meta"):
            model = timm.create_model(name, **kwargs)
        assert cbn.convert(model).rows == rows
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
