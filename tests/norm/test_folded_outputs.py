"""Where the output of a conv that trains folded goes: who sees it, what changes it, whose norm is gone."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import conv_pair, gradients, inputs, shake
from helpers.models import randomize_norms
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cbn_convert as cbn
from cbn_convert.bench.steps import kept_bytes
from cbn_convert.norm import CrossIterationMixin


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_of_others_see_what_they_would_see(where: int, kind: str) -> None:
    """A hook on the conv finds the conv's output, not the norm's; and training goes on folded when it is gone."""
    watched, free = conv_pair(), conv_pair()
    seen: list[Tensor] = []

    def note(module: nn.Module, *tensors: object) -> None:
        seen.append(tensors[0][0])  # type: ignore[index]

    register = {
        "forward": nn.Module.register_forward_hook,
        "pre": nn.Module.register_forward_pre_hook,
        "backward": nn.Module.register_full_backward_hook,
    }[kind]
    handle = register(watched[where], note)  # type: ignore[operator]
    for step in range(3):
        x = inputs((2, 3, 8, 8), step)
        for a, b in zip(gradients(watched, x), gradients(free, x), strict=True):
            torch.testing.assert_close(a, b)
        if where == 1 and kind != "backward":
            torch.testing.assert_close(seen[-1], F.conv2d(x, *watched[0].parameters()))
        shake(watched, free)
    assert len(seen) == 3
    handle.remove()
    assert kept_bytes(watched, inputs((2, 3, 8, 8), 9)) == kept_bytes(free, inputs((2, 3, 8, 8), 9))


def test_an_output_that_goes_elsewhere_too_is_not_folded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.alone, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(self.alone(self.norm(y) + self.other(y)))

    model = randomize_norms(Branching())
    report = {row.name: row for row in cbn.convert(model, example_input=torch.randn(2, 3, 8, 8))}
    assert [report[n].form for n in ("norm", "other", "last")] == ["unfolded", "unfolded", "folded"]
    assert "not folded: its output goes elsewhere" in report["norm"].reason


def test_stored_weights_only() -> None:
    model = randomize_norms(nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    nn.utils.parametrizations.weight_norm(model[2])
    reasons = [row.reason for row in cbn.convert(model, example_input=torch.randn(2, 3, 8, 8))]
    assert all("not folded: its weight is not applied as it is stored" in reason for reason in reasons)


def test_a_conv_that_is_parametrised_later_trains_unfolded() -> None:
    model, twin = conv_pair(), conv_pair()
    for net in (model, twin):
        nn.utils.parametrizations.weight_norm(net[0])
    twin[1].bind(twin[0])
    for step in range(3):
        x = inputs((2, 3, 8, 8), step)
        for a, b in zip(gradients(model, x), gradients(twin, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("where", "name"), [(0, "weight"), (0, "bias"), (1, "weight"), (1, "bias")])
def test_parameters_that_are_plain_attributes_train_unfolded(where: int, name: str) -> None:
    """As where somebody keeps them in one flat parameter, of which they are views."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomize_norms(nn.BatchNorm2d(4)))
    cbn.convert(model, example_input=torch.randn(2, 3, 6, 6))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    flat = getattr(model[where], name).detach().flatten().clone().requires_grad_()
    shape = getattr(model[where], name).shape
    delattr(model[where], name)
    setattr(model[where], name, flat.view(shape))
    for m in (model, twin):
        m(x).square().sum().backward()
    torch.testing.assert_close(flat.grad, getattr(twin[where], name).grad.flatten(), rtol=1e-3, atol=1e-3)


def test_what_changes_the_output_on_its_way_is_an_error() -> None:
    model = conv_pair()
    net = nn.Sequential(model[0], nn.Identity(), model[1])
    net(inputs((2, 3, 8, 8), 0))
    net[1] = nn.Hardtanh()
    with pytest.raises(RuntimeError, match="bound to a Conv2d whose output is changed"):
        net(inputs((2, 3, 8, 8), 1))


def test_an_output_that_never_comes_to_the_norm_is_an_error() -> None:
    """Its values would be normalised ones, where those of the conv are expected."""
    model = conv_pair()
    for _ in range(3):
        model[0](inputs((2, 3, 8, 8), 0))
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):
        model[0](inputs((2, 3, 8, 8), 0))


def test_a_norm_that_somebody_keeps_elsewhere_does_nothing_in_evaluation() -> None:
    """It is not told of model.eval(), and goes on as in training."""
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    kept = model[1]
    model[1] = nn.Identity()
    x = inputs((2, 3, 8, 8), 1)
    torch.testing.assert_close(model.eval()(x), F.conv2d(x, *model[0].parameters()))
    model.train()
    for _ in range(3):
        model(x)
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):
        model(x)
    assert kept.training


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_norm_that_is_gone_is_noticed_in_the_first_step(
    duplicate: Callable[[nn.Module], nn.Module], folded: bool
) -> None:
    model = conv_pair()
    if not folded:
        model[1].bind(model[0])
    model(inputs((2, 3, 8, 8), 0))
    model[1] = nn.BatchNorm2d(4).double()
    model = duplicate(model)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    plain.load_state_dict(model.state_dict())
    x = inputs((2, 3, 8, 8), 1)
    model.eval()(x)  # as in a check before training begins
    with pytest.warns(UserWarning, match="a norm layer was taken out of the model after its conversion"):
        y = model.train()(x)
    torch.testing.assert_close(y, plain(x), rtol=0, atol=0)
    assert type(model[0]) is nn.Conv2d
    assert not model[0]._forward_hooks
    assert not model[0]._load_state_dict_post_hooks
    model(x)


def test_a_model_that_is_let_go_says_nothing() -> None:
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    gone, conv = weakref.ref(model[1]), model[0]
    del model
    assert gone() is None
    conv.eval()(inputs((2, 3, 8, 8), 0))


def test_the_input_may_be_named() -> None:
    model, twin = conv_pair(), conv_pair()
    x = inputs((2, 3, 8, 8), 0)
    torch.testing.assert_close(model[1](input=model[0](input=x)), twin(x))


def test_an_output_that_goes_to_another_norm_now_and_then_is_an_error() -> None:
    """As with norms of their own for two domains, of which the example showed one."""
    model = conv_pair()
    other = nn.BatchNorm2d(4).double()
    with pytest.raises(RuntimeError, match="its output goes elsewhere"):  # noqa: PT012
        for step in range(8):
            x = inputs((2, 3, 8, 8), step)
            (model if step % 2 else nn.Sequential(model[0], other))(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_conv_that_is_computed_once_more_without_its_norm_is_no_loss(reentrant: bool) -> None:
    model = conv_pair()
    for step in range(6):
        y = checkpoint(model[0], inputs((2, 3, 8, 8), step).requires_grad_(), use_reentrant=reentrant)
        model[1](y).sum().backward()
        assert not model[1]._sources[0].tap.lost


def test_one_pass_that_broke_off_is_none() -> None:
    model, twin = conv_pair(), conv_pair()
    model[0](inputs((2, 3, 8, 8), 0))
    # all that is left of it is that its batch was looked at
    torch.testing.assert_close(model(inputs((2, 3, 8, 8), 1)), twin(inputs((2, 3, 8, 8), 1)), rtol=0, atol=1e-2)


def test_a_pass_that_broke_off_before_one_with_hooks_is_none() -> None:
    """Nothing is left of it that would let the conv's own output pass for a normalised one."""
    model = conv_pair()
    model[0](inputs((2, 3, 8, 8), 0))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = inputs((2, 3, 8, 8), 1)
    y = model(x)
    torch.testing.assert_close(seen[0], F.conv2d(x, *model[0].parameters()))
    state = model[1]._sources[0].state.last
    M, S, gamma, beta = (t.view(1, -1, 1, 1) for t in (state.mean, state.var, model[1].weight, model[1].bias))
    torch.testing.assert_close(y, gamma * (seen[0] - M) / torch.sqrt(S + model[1].eps) + beta)


def test_a_conv_whose_norm_was_replaced_is_itself_in_evaluation() -> None:
    """The norm that is gone heard of no eval()."""
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    model[1] = nn.Identity()
    x = inputs((2, 3, 8, 8), 1)
    torch.testing.assert_close(model.eval()(x), F.conv2d(x, *model[0].parameters()))


def test_a_conv_that_is_parametrised_later_is_pickled_as_torch_does() -> None:
    """By an error of torch's: what is made of the class alone would lack the weight."""
    model = conv_pair()
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(model)


def test_autocast_leaves_float64_alone() -> None:
    model = conv_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs((2, 3, 8, 8), 0)).dtype == torch.float64


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("wanted", ["parameters", "input"])
def test_transforms_of_functions_are_refused(wanted: str, folded: bool) -> None:
    model = conv_pair()
    if not folded:
        model[1].bind(model[0])
    parameters, x = {k: v.detach() for k, v in model.named_parameters()}, inputs((2, 3, 8, 8), 0)
    with pytest.raises(RuntimeError, match=r"cannot train under torch\.func's transforms"):
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).sum(), wanted == "input")(parameters, x)
    model.eval()
    torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).sum(), wanted == "input")(parameters, x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_fold_into_their_own_norm(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = conv_pair()
    model(inputs((2, 3, 8, 8), 0))
    twin = duplicate(model)
    assert twin[0].__dict__["folds_into"].norm is twin[1]
    before = copy.deepcopy(model.state_dict())
    twin(inputs((2, 3, 8, 8), 1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_revert_gives_the_conv_its_class_back() -> None:
    model = conv_pair()
    before = {id(p) for p in model.parameters()}
    model(inputs((2, 3, 8, 8), 0))
    cbn.revert(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d]
    assert {id(p) for p in model.parameters()} == before
    assert not model[0]._forward_hooks
    assert not any(isinstance(m, CrossIterationMixin) for m in model.modules())


def test_an_inner_copy_of_data_parallel_is_refused() -> None:
    model = conv_pair()
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(inputs((2, 3, 8, 8), 0))
    norm = model[1]._replicate_for_data_parallel()
    norm._sources = model[1]._sources
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        norm(inputs((2, 4, 6, 6), 0))
