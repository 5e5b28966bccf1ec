"""Activations in front of convs that train folded: one map is kept for the two, and nothing else is different."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize_norms
from helpers.versions import tells_of_hooks
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

import cbn_convert as cbn
from cbn_convert.bench.steps import kept_bytes
from cbn_convert.norm import Window, source
from cbn_convert.norm.folded import FoldingMixin

DOUBLE = torch.float64


class Functional(nn.Module):
    """A call without a module of torch's own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Discarding(nn.Module):
    """An activation in place whose result is thrown away, since its input has become it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self.act(x)
        return x


class Twice(nn.Module):
    """Goes on with the output and, under its old name, with the input of an activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(x)
        return y + x


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": partial(nn.ReLU, True),
    "relu6": nn.ReLU6,
    "relu6 in place": partial(nn.ReLU6, True),
    "silu": nn.SiLU,
    "silu in place": partial(nn.SiLU, True),
    "hardswish": nn.Hardswish,
    "hardswish in place": partial(nn.Hardswish, True),
    "function": lambda: Functional(F.silu),
    "function in place": lambda: Functional(partial(F.hardswish, inplace=True)),
    "result thrown away": lambda: Discarding(nn.SiLU(True)),
}
# those of which nothing is to be gained, or must not
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "hardtanh": lambda: nn.Hardtanh(-1, 6),
    "gelu": nn.GELU,
    "input used as well": lambda: Twice(nn.Hardswish()),
    "output under both names": lambda: Twice(nn.Hardswish(True)),
    "twice in place": lambda: nn.Sequential(nn.SiLU(True), nn.SiLU(True)),
    "scaled in place": lambda: Functional(lambda x: F.silu(x).mul_(2)),
}


def chain(act: Callable[[], nn.Module], conv: type[nn.Module] = nn.Conv2d, every: int = 3) -> nn.Sequential:
    """Conv, norm, activation, conv, norm, the same activation module, conv, norm; all of them folded."""
    torch.manual_seed(1)
    shared = act()
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), shared,
        conv(8, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), shared,
        conv(8, 6, 1), nn.BatchNorm2d(6),
    )  # fmt: skip
    randomize_norms(model).double()
    cbn.convert(model, window=Window(every=every, size=40), example_input=batch(0))
    assert sum(isinstance(m, FoldingMixin) for m in model) == 3
    return model.train()


def batch(seed: int, size: int = 2) -> Tensor:
    return torch.randn(size, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@contextmanager
def inputs_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The convs keep their inputs, as they are."""
    with monkeypatch.context() as patch:
        patch.setattr(source, "origin", lambda y: None)
        yield


def gradients(model: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x) if run is None else run(model, x)
    y.pow(3).sin().sum().backward()  # reentrant checkpoints know no autograd.grad
    return [y.detach(), *(p.grad.clone() for p in (x, *model.parameters()) if p.grad is not None)]


def shake(*models: nn.Module) -> None:
    """The same random change of the weights of all."""
    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            change = 0.05 * torch.randn_like(same[0])
            for p in same:
                p += change


@tells_of_hooks
@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_map_is_kept_for_an_activation_of_its_own(name: str, look: bool) -> None:
    model = randomize_norms(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), ACTIVATIONS[name](), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)
        )
    )
    cbn.convert(model, window=Window(every=1 if look else 1000), example_input=torch.randn(1, 3, 40, 40))
    x = torch.randn(2, 3, 40, 40)
    model.train()(x)
    own = x.nbytes + 2 * 16 * 38 * 38 * 4
    assert own <= kept_bytes(model, x) < own + 60_000  # less than one map


@tells_of_hooks
def test_a_block_of_mobilenet_keeps_one_map_per_activation() -> None:
    """torchvision's MobileNetV3, whose activations are modules that overwrite their input."""
    settings = InvertedResidualConfig(16, 3, 64, 16, use_se=False, activation="HS", stride=1, dilation=1, width_mult=1)
    block = randomize_norms(InvertedResidual(settings, nn.BatchNorm2d))
    assert [m.inplace for m in block.modules() if isinstance(m, nn.Hardswish)] == [True, True]
    cbn.convert(block, window=Window(every=1000), example_input=torch.randn(1, 16, 20, 20))
    x = torch.randn(2, 16, 20, 20)
    block.train()(x)
    own = x.nbytes + 2 * (2 * 64 * 20 * 20 * 4)
    assert own <= kept_bytes(block, x) < own + 60_000  # less than one map


class Spy(nn.Module):
    """Remembers what passes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(weakref.ref(x))
        return x

    def alive(self) -> int:
        return sum(t() is not None for t in self.seen)


@tells_of_hooks
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_the_output_goes_with_the_forward_pass_and_the_input_with_the_backward_pass(
    kind: type[nn.Module], inplace: bool
) -> None:
    """Without anybody who counts, and with the loss still there, as in most loops."""
    before, behind = Spy(), Spy()
    model = chain(lambda: nn.Sequential(before, kind(inplace), behind))
    before.seen.clear()  # what the trace saw
    behind.seen.clear()
    loss = model(batch(0)).sum()
    assert (before.alive(), behind.alive()) == (0 if inplace else 2, 0)
    loss.backward()
    assert (before.alive(), len(before.seen)) == (0, 2)


def test_activation_checkpointing_holds_nothing_between_the_passes() -> None:
    spy = Spy()
    model = chain(lambda: nn.Sequential(spy, nn.SiLU()))
    y = checkpoint(model, batch(0).requires_grad_(), use_reentrant=False)
    assert y.requires_grad
    assert spy.alive() == 0


@pytest.mark.parametrize("conv", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *OTHERS])
def test_values_and_gradients_are_those_of_a_chain_that_trains_unfolded(name: str, conv: type[nn.Module]) -> None:
    make = {**ACTIVATIONS, **OTHERS}[name]
    folded, unfolded = chain(make, conv), chain(make, conv)
    for i in (0, 3, 6):
        unfolded[i + 1].bind(unfolded[i])
    for step in range(5):
        for a, b in zip(gradients(folded, batch(step)), gradients(unfolded, batch(step)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        shake(folded, unfolded)


def in_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.float()(x.float()).double()


def in_segments(model: nn.Module, x: Tensor, ends: tuple[int, ...], reentrant: bool) -> Tensor:
    for first, last in zip((0, *ends), (*ends, 8), strict=True):
        x = checkpoint(model[first:last], x, use_reentrant=reentrant)
    return x


def under(hooks: Callable[[], Any], parts: slice, model: nn.Sequential, x: Tensor) -> Tensor:
    """Saved-tensor hooks around some of the layers."""
    for i, layer in enumerate(model):
        with hooks() if i in range(8)[parts] else nullcontext():
            x = layer(x)
    return x


def as_tensors() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda t: t * 4, lambda t: t / 4)


def hooks_in_a_checkpoint(parts: slice, model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(partial(under, as_tensors, parts), model, x, use_reentrant=False)


def hooked(model: nn.Module, x: Tensor) -> Tensor:
    before = model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    behind = model[2].register_forward_hook(lambda module, args, output: output * 2)
    y = model(x)
    before.remove()
    behind.remove()
    return y


def hooked_backward(model: nn.Module, x: Tensor) -> Tensor:
    if not model[2]._backward_hooks:
        model[2].register_full_backward_hook(lambda module, before, behind: (before[0] * 3,))
    return model(x)


def twice_before_backward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) + model(x.flip(-1))


def frozen_first(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.detach()) + 0 * x.sum()


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "as it is": lambda model, x: model(x),
    "bfloat16": in_bfloat16,
    "one segment": partial(in_segments, ends=(), reentrant=False),
    "one segment, reentrant": partial(in_segments, ends=(), reentrant=True),
    "apart from the activation": partial(in_segments, ends=(2, 3, 5, 6), reentrant=False),
    "apart from the activation, reentrant": partial(in_segments, ends=(2, 3, 5, 6), reentrant=True),
    "behind the activation": partial(in_segments, ends=(3, 6), reentrant=False),
    "in front of the activation": partial(in_segments, ends=(2, 5), reentrant=False),
    "saved elsewhere": partial(under, save_on_cpu, slice(None)),
    "saved as something else": partial(under, as_tensors, slice(None)),
    "activation saved as something else": partial(under, as_tensors, slice(2, 3)),
    "conv saved as something else": partial(under, as_tensors, slice(3, 4)),
    "hooks in a checkpoint": partial(hooks_in_a_checkpoint, slice(None)),
    "hooks on the activation in a checkpoint": partial(hooks_in_a_checkpoint, slice(2, 3)),
    "hooks on the conv in a checkpoint": partial(hooks_in_a_checkpoint, slice(3, 4)),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager")(x),
    "hooks on the activation": hooked,
    "hooks on its backward pass": hooked_backward,
    "twice before the backward pass": twice_before_backward,
    "input without a gradient": frozen_first,
}


# in which torch does not let an activation overwrite its input, or takes the gradient of what it became
NOT_IN_PLACE = (
    "apart from the activation", "apart from the activation, reentrant", "in front of the activation",
    "hooks on its backward pass",
)  # fmt: skip


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (way, name)
        for way in WAYS
        for name in ("relu6", "hardswish", "silu in place")
        if not ((name.endswith("in place") and way in NOT_IN_PLACE) or (name != "hardswish" and way == "compiled"))
    ],
)
def test_in_no_way_of_training_does_it_change_anything(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, against the same with the inputs of all convs kept."""
    model, plain = chain(ACTIVATIONS[name]), chain(ACTIVATIONS[name])
    torch._dynamo.reset()
    for step in range(4):
        ours = gradients(model, batch(step), WAYS[way])
        with inputs_kept(monkeypatch):
            expected = gradients(plain, batch(step), WAYS[way])
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
        shake(model, plain)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("through", ["no_grad", "detach"])
def test_what_is_written_to_an_output_behind_autograd_is_what_the_conv_sees(
    through: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(y: Tensor) -> Tensor:
        with torch.no_grad() if through == "no_grad" else nullcontext():
            (y if through == "no_grad" else y.detach())[:, ::2].zero_()
        return y

    model, plain = (chain(lambda: nn.Sequential(nn.SiLU(inplace), Functional(write))) for _ in range(2))
    ours = gradients(model, batch(0))
    with inputs_kept(monkeypatch):
        expected = gradients(plain, batch(0))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_input_that_is_written_to_is_an_error_of_the_backward_pass_only() -> None:
    def act(x: Tensor) -> Tensor:
        y = F.silu(x)
        with torch.no_grad():
            x.zero_()
        return y

    y = chain(lambda: Functional(act))(batch(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["relu6", "silu in place", "hardswish"])
def test_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = batch(0).requires_grad_()
        (g,) = torch.autograd.grad(model(x).pow(3).sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), [x, *model.parameters()]))

    model, plain = chain(ACTIVATIONS[name]), chain(ACTIVATIONS[name])
    ours = penalty(model)
    with inputs_kept(monkeypatch):
        expected = penalty(plain)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_activations_stay_what_they_are(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = chain(ACTIVATIONS["hardswish in place"])
    gradients(model, batch(0))
    for m in (model, duplicate(model), cbn.revert(model)):
        assert type(m[2]) is nn.Hardswish
        assert m[2] is m[5]
        assert not m[2]._forward_hooks
        assert m[2].__dict__.keys() == nn.Hardswish().__dict__.keys()
    assert [type(m) for m in model] == [
        nn.Conv2d, nn.BatchNorm2d, nn.Hardswish, nn.Conv2d, nn.BatchNorm2d, nn.Hardswish, nn.Conv2d, nn.BatchNorm2d,
    ]  # fmt: skip
