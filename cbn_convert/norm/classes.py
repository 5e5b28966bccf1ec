"""The layers: one for each kind of BatchNorm, a drop-in subclass of it; and how a layer that exists becomes one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from .layer import CrossIterationMixin


class CrossIterationBatchNorm1d(CrossIterationMixin, nn.BatchNorm1d):
    """`CrossIterationBatchNorm2d` for input [N, C] or [N, C, L]."""

    PLAIN = nn.BatchNorm1d


class CrossIterationBatchNorm2d(CrossIterationMixin, nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of a window over iterations (arXiv 2002.05712).

    CrossIterationBatchNorm2d(num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, window=8,
    history="ring", compensation="projection", gradient="full", burn_in=0, sync=False), the first five as in
    nn.BatchNorm2d:

        norm = CrossIterationBatchNorm2d(64, window=8).bind(conv)
        y = norm(conv(x))

    window: a `Window`; or a number, of iterations of a ring, the current one included, so that 1 is nn.BatchNorm2d; or
        of images with history "ema", the carried window.
    The rest are the fields of `Window`. A layer that is unbound, or bound to frozen weights, averages without.

    Input and output [N, C, H, W]; statistics and history in float32 (float64 for float64 input). state_dict keys,
    evaluation and, with a ring, the meaning of momentum are nn.BatchNorm2d's; what is remembered beside the running
    statistics is in no state_dict, see `history_state`. Raises ValueError for an argument out of range.
    """

    PLAIN = nn.BatchNorm2d


class CrossIterationBatchNorm3d(CrossIterationMixin, nn.BatchNorm3d):
    """`CrossIterationBatchNorm2d` for input [N, C, D, H, W]."""

    PLAIN = nn.BatchNorm3d


class CrossIterationBatchNormAct2d(CrossIterationMixin, BatchNormAct2d):
    """timm's BatchNormAct2d, normalising like `CrossIterationBatchNorm2d`, then its drop and act."""

    PLAIN = BatchNormAct2d
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N, C, H, W], output like input in shape and dtype."""
        if isinstance(self.drop, nn.Identity):
            return self.normalize(x, self.act)
        y: Tensor = self.act(self.drop(self.normalize(x)))
        return y


class CrossIterationSyncBatchNorm(CrossIterationMixin, nn.SyncBatchNorm):
    """`CrossIterationBatchNorm2d` for nn.SyncBatchNorm in the default process group; to be used with sync=True."""

    PLAIN = nn.SyncBatchNorm


class CrossIterationSyncBatchNormAct(CrossIterationMixin, SyncBatchNormAct):
    """timm's SyncBatchNormAct, normalising like `CrossIterationSyncBatchNorm`, then its drop and act."""

    PLAIN = SyncBatchNormAct

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N, C, ...], output like input in shape and dtype."""
        return drop_and_act(self, self.normalize(x))


# what frozen classes without the attribute have in their code
EPS_IN_USE = (1e-5, 1e-3, 1e-6, 0.0)


class CrossIterationFrozenBatchNorm2d(CrossIterationMixin, nn.BatchNorm2d):
    """A frozen BatchNorm of torchvision, timm or detectron2 that follows its data again; γ and β are parameters.

    Made by `adopt` only, as a subclass of the frozen class too: evaluation is that one's own forward pass, to the bit,
    and state_dict keys are its keys.
    """

    PLAIN = nn.BatchNorm2d
    FROZEN = True
    frozen_class: type[Any]
    frozen_attributes: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [N, C, H, W], output like input in shape and dtype."""
        if self.training:
            return drop_and_act(self, self.normalize(x))
        y: Tensor = self.frozen_class.forward(self, x)
        return y

    @staticmethod
    def thawed(norm: nn.Module) -> CrossIterationFrozenBatchNorm2d:
        """Turns a frozen BatchNorm into one of this class, in place, still without a window."""
        own = {
            "eps": frozen_eps(norm), "momentum": 0.1, "affine": True, "track_running_stats": True,
            "num_features": len(norm.get_buffer("weight")),
        }  # fmt: skip
        attributes = {name: norm.__dict__[name] for name in own if name in norm.__dict__}
        gamma, beta = (norm._buffers.pop(name) for name in ("weight", "bias"))
        frozen_class: type[Any] = type(norm)
        norm.__class__ = _thawed_class(frozen_class)
        assert isinstance(norm, CrossIterationFrozenBatchNorm2d)
        assert gamma is not None
        assert beta is not None
        norm.frozen_attributes = attributes
        norm.__dict__.update(own)
        norm.weight, norm.bias = nn.Parameter(gamma), nn.Parameter(beta)
        norm._buffers.pop("num_batches_tracked", None)
        batches = torch.zeros((), dtype=torch.long, device=gamma.device)
        norm.register_buffer("num_batches_tracked", batches, persistent=False)
        return norm

    def restore(self) -> nn.Module:
        """Freezes the layer again with the statistics that it has now; returns it."""
        attributes, frozen_class = self.frozen_attributes, self.frozen_class
        super().restore()
        tensors = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        tensors |= {name: self.get_buffer(name) for name in ("running_mean", "running_var")}
        del self.num_batches_tracked
        self._parameters.clear()
        self._buffers.clear()
        for name in ("eps", "momentum", "affine", "track_running_stats", "num_features", "frozen_attributes"):
            delattr(self, name)
        self.__class__ = frozen_class
        self.__dict__.update(attributes)
        for name, t in tensors.items():
            self.register_buffer(name, t)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_thawed, (self.frozen_class,), self.__getstate__()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        # as the frozen classes do; version 2, since BatchNorm would add the key for an older one
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *args)


_THAWED: dict[type[Any], type[CrossIterationFrozenBatchNorm2d]] = {}


def _thawed_class(frozen_class: type[Any]) -> type[CrossIterationFrozenBatchNorm2d]:
    if frozen_class not in _THAWED:
        bases = (CrossIterationFrozenBatchNorm2d, frozen_class)
        _THAWED[frozen_class] = type(f"CrossIteration{frozen_class.__name__}", bases, {"frozen_class": frozen_class})
    return _THAWED[frozen_class]


def _new_thawed(frozen_class: type[Any]) -> nn.Module:
    cls = _thawed_class(frozen_class)
    return cls.__new__(cls)


def drop_and_act(norm: nn.Module, y: Tensor) -> Tensor:
    """What timm's norms with an activation do behind their normalisation; nothing for others."""
    for name in ("drop", "act"):
        if (child := norm._modules.get(name)) is not None:
            y = child(y)
    return y


def is_frozen(module: nn.Module) -> bool:
    """Whether the module is a frozen BatchNorm: so named, with the four tensors as buffers."""
    buffers = {"weight", "bias", "running_mean", "running_var"}
    return "FrozenBatchNorm" in type(module).__name__ and buffers <= module._buffers.keys()


@torch.no_grad()
def frozen_eps(norm: nn.Module) -> float:
    """The eps of a frozen BatchNorm of images, which some implementations keep to themselves.

    Raises TypeError if the module computes something else than a BatchNorm with fixed statistics.
    """
    known = norm.__dict__.get("eps")
    if norm.get_buffer("weight").is_meta:
        return 1e-5 if known is None else float(known)
    twin = deepcopy(norm).eval().double().cpu()
    mean, var, gamma, beta = (twin.get_buffer(name) for name in ("running_mean", "running_var", "weight", "bias"))
    var.fill_(0.01)  # at which every usual eps shows
    x = torch.linspace(-3, 3, 4 * len(mean), dtype=torch.float64, device="cpu").view(1, -1, 2, 2)
    try:
        y = twin(x.clone())
        for eps in EPS_IN_USE if known is None else (float(known),):
            expected = drop_and_act(twin, F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps))
            if torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True):
                return eps
    except Exception as error:  # whatever a forward pass may raise
        raise TypeError(f"{type(norm).__name__} does not take images ({error})") from error
    raise TypeError(f"{type(norm).__name__} does not compute a BatchNorm with fixed statistics")


CONVERTED: dict[type[nn.Module], type[CrossIterationMixin]] = {
    converted.PLAIN: converted
    for converted in (
        CrossIterationBatchNorm1d,
        CrossIterationBatchNorm2d,
        CrossIterationBatchNorm3d,
        CrossIterationBatchNormAct2d,
        CrossIterationSyncBatchNorm,
        CrossIterationSyncBatchNormAct,
    )
}


def adopt(norm: nn.Module) -> CrossIterationMixin:
    """Makes a BatchNorm of a class in `CONVERTED`, or a frozen one, a cross-iteration one, in place, without a window.

    Raises TypeError for a frozen one whose eps cannot be told.
    """
    if is_frozen(norm):
        return CrossIterationFrozenBatchNorm2d.thawed(norm)
    norm.__class__ = CONVERTED[type(norm)]
    assert isinstance(norm, CrossIterationMixin)
    return norm


def history_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`history_state()` of every cross-iteration layer of the model, by name; for training checkpoints."""
    return {name: m.history_state() for name, m in model.named_modules() if isinstance(m, CrossIterationMixin)}


def load_history_state(model: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Restores `history_state(model)`. Raises ValueError if the layers or their kinds of window are not the same."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CrossIterationMixin)}
    if layers.keys() != state.keys():
        odd = sorted(layers.keys() ^ state.keys())
        raise ValueError(f"history is of other layers than the model's: {', '.join(odd[:5])} in one of them only")
    for name, layer in layers.items():
        layer.load_history_state(state[name])
