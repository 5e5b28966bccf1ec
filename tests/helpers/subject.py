"""An architecture of timm on its way through the checks of `promises.py`: how it is built, run and compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models._registry import _model_to_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from cbn_convert.conversion import norm_layers

PX = 64  # at 32 px most architectures have a norm that sees 2 values per channel
# The smallest size that an architecture runs at, where that is not 64 px: a prefix of its name, and the pixels.
SIZES = {
    "inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96,
    "halo2botnet50ts_256": 128, "lamhalobotnet50ts_256": 128,
    "efficientformer_l": 224, "haloregnetz_b": 224,
    "bat_resnext26ts": 256, "eca_halonext26ts": 256, "halonet": 256, "sehalonet33ts": 256,
}  # fmt: skip
# Those that must be built for the size at which they are to run: families, and prefixes of names.
SIZED_FAMILIES = {"efficientformer_v2", "levit", "maxxvit", "vision_transformer_hybrid", "visformer", "volo"}
SIZED_NAMES = ("botnet", "eca_botnext", "halo2botnet", "lambda_resnet26rpt", "lamhalobotnet", "sebotnet")

F64, F32 = 1e-6, 1e-4
CALIBRATION_IMAGES = 14  # beside the two that the checks see
MOST_NOISE = 3e-5  # more than that, and a fold's rounding could be as large as what a wrong fold does
LEAST_VAR = 0.1  # of a channel that hardly varies: division by less would make rounding large
METHODS_OF_TIMM = ("fuse", "reparameterize", "switch_to_deploy")


def family(name: str) -> str:
    """The module of timm.models that registers the architecture."""
    return _model_to_module[name]


def example_size(name: str) -> tuple[dict[str, Any], int]:
    """Keyword arguments for create_model and pixels: the smallest size at which the architecture can be checked."""
    px = next((px for prefix, px in SIZES.items() if name.startswith(prefix)), PX)
    sized = family(name) in SIZED_FAMILIES or name.startswith(SIZED_NAMES)
    return ({"img_size": px} if sized else {}), px


def size_m(name: str, kwargs: dict[str, Any]) -> float:
    """Millions of parameters, without building them."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters()) / 1e6


def build(name: str, kwargs: dict[str, Any], px: int, device: str = "cpu") -> nn.Module:
    """The architecture in eval mode with random weights, `prepared`; its own size is that of the images it will see."""
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name, pretrained=False, **kwargs)
    return prepared(model, px)


def prepared(model: nn.Module, px: int) -> nn.Module:
    """The model in eval mode with random γ and β, and with the statistics of the images that the checks see."""
    # the size that fold and export take by default
    if getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, px, px)}
    return calibrated(model, px).eval()


@torch.no_grad()
def calibrated(model: nn.Module, px: int) -> nn.Module:
    """Gives the norms random γ and β, and the running statistics of what they see.

    With statistics of other inputs, or with γ and β around 1 and 0, deep networks of random weights are chaotic: they
    answer a change of the images in the last bit with another output, so that no tolerance could tell a wrong fold from
    rounding. Where most of what enters an activation is positive they are nearly linear, and `noise` stays at the size
    of rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.25, 0.75)
            norm.bias.normal_(1, 0.3)
    measured = [norm for norm in norms if norm.running_mean is not None and not norm.running_mean.is_meta]
    handles = [norm.register_forward_pre_hook(_measure) for norm in measured]
    if measured:
        model.eval()(torch.cat([images(px), images(px, CALIBRATION_IMAGES, seed=7)]))
    for handle in handles:
        handle.remove()
    return model


def _measure(norm: Any, args: tuple[Tensor, ...]) -> None:
    """Makes the running statistics those of the input, before the norm applies them."""
    var, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var.clamp_min(LEAST_VAR))


def images(px: int, count: int = 2, seed: int = 1, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, px, px, generator=generator).to(device)


class Subject:
    """One architecture on its way through the checks: the model, and what was known before its conversion."""

    def __init__(self, model: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> None:
        self.model = model
        self.x = x
        self.example = x[:1]  # what a trace needs
        self.kwargs = kwargs
        self.classes = {name: type(m) for name, m in model.named_modules()}
        self.norms = list(norm_layers(model))
        self.calls: Counter[str] = Counter()
        with counted_calls(model, self.calls):
            self.expected = outputs(model, x)
        assert self.expected, "the model has no tensor among its outputs"
        assert all(torch.isfinite(t).all() for t in self.expected if not t.is_meta), "outputs are not finite"
        self.noise = noise(model, x, self.expected)
        assert self.noise <= MOST_NOISE, f"a change of the images in the last bit changes outputs by {self.noise:.1e}"
        self.before = {k: v.clone() for k, v in model.state_dict().items()}
        self.report: Any = ()
        self.left_bn: int | None = None  # norm layers that are still BatchNorm in the bare form of the fold

    @property
    def fetches(self) -> bool:
        """Whether timm would fetch weights for a part of the model when it loads an export."""
        return type(self.model).__module__.endswith("vision_transformer") and bool(self.norms)

    @property
    def reparameterizes(self) -> bool:
        """Whether timm has a deployed form of its own for the architecture."""
        return any(
            callable(getattr(kind, method, None)) for kind in self.classes.values() for method in METHODS_OF_TIMM
        )


@contextmanager
def counted_calls(model: nn.Module, calls: Counter[str]) -> Iterator[None]:
    """Counts how often each norm layer runs, which the conversion is to find out by itself."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: calls.update([name])

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in norm_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every tensor that the model returns in eval mode."""
    return [t for t in tree_leaves(model.eval()(x)) if isinstance(t, Tensor)]


def noise(model: nn.Module, x: Tensor, expected: list[Tensor]) -> float:
    """By how much the outputs answer a change of x in the last bit, relative."""
    if x.is_meta:
        return 0.0
    sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return difference(outputs(model, x * (1 + sign * torch.finfo(x.dtype).eps)), expected, math.inf, "noise")


def assert_identical(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want), f"{what}: {len(got)} outputs in place of {len(want)}"
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), f"{what}: outputs are not the same bits"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are; NaN equals itself, since some architectures keep buffers that nothing has written to."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before), "the state_dict has other keys"
    other = [name for name, value in before.items() if not same(value, after[name])]
    assert not other, f"the state_dict has another {other[0]}"


def difference(got: list[Tensor], want: list[Tensor], limit: float, what: str) -> float:
    """The largest relative error of an output, by norms; an AssertionError above the limit."""
    assert len(got) == len(want), f"{what}: {len(got)} outputs in place of {len(want)}"
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, f"{what}: output of shape {tuple(g.shape)} in place of {tuple(w.shape)}"
        error = float((g.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30))
        assert error <= limit, f"{what}: outputs differ by {error:.1e}, at most {limit:.0e} was promised"
        worst = max(worst, error)
    return worst
