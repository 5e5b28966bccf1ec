"""Treatments: what the norms of a pretrained encoder, and those of the new layers on it, become.

A treatment is ENCODER+NEW. ENCODER is one of

    bn          BatchNorm, as it is
    frozen      its running statistics, as they are; γ and β learn
    tune        the same, trained through the folded conv (Window.TUNE)
    cbn         converted, with the package's defaults

and NEW one of

    bn          BatchNorm
    gn          GroupNorm of 32 groups, or as many as divide the channels
    cbn         converted with the rest, with what the package does for new layers
    new:K       converted, a ring of K iterations
    images:N    converted, a carried window of N images that looks at every batch; it starts at the statistics of 16
                images under the weights of the start

"bn" alone is bn+bn, and "cbn" alone cbn+cbn. TREATMENT@FACTOR lets the encoder learn at FACTOR times the rate, in the
place of ENCODER_RATE times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cbn_convert as cbn
from cbn_convert.conversion import norm_layers
from cbn_convert.norm import Window
from cbn_convert.training.alternatives import apply_norm

ENCODER, NEW = ("bn", "frozen", "tune", "cbn"), ("bn", "gn", "cbn")
ENCODER_RATE = 0.3


class Treatment(NamedTuple):
    """What becomes of the norms of the encoder and of new ones, and at how many times the rate the encoder learns."""

    encoder: str
    new: str
    size: int  # of the window of new layers, 0 where none is given
    encoder_rate: float


def parsed(treatment: str) -> Treatment:
    """Raises ValueError for one that there is not."""
    norms, at, factor = treatment.partition("@")
    encoder, _, new = norms.partition("+")
    new = new or {"bn": "bn", "cbn": "cbn"}.get(encoder, "")
    kind, _, size = new.partition(":")
    rate = _rate(factor) if at else ENCODER_RATE
    if rate is not None and encoder in ENCODER:
        if new in NEW:
            return Treatment(encoder, new, 0, rate)
        if kind in ("new", "images") and size.isdecimal() and int(size) > 0:
            return Treatment(encoder, kind, int(size), rate)
    raise ValueError(f"{treatment!r} is no treatment; see {__name__}")


def _rate(factor: str) -> float | None:
    """A factor that is not the usual one; None unless it is spelled as Python does, so that each has one name."""
    try:
        rate = float(factor)
    except ValueError:
        return None
    return rate if factor == f"{rate:g}" and 0 < rate < math.inf and rate != ENCODER_RATE else None


def apply(root: nn.Module, encoder: str, treatment: str, example: Tensor, prime: Callable[[], None]) -> None:
    """Puts a treatment into `root`, whose pretrained part is the child `encoder`.

    `prime` runs the whole model on 16 images, and is called for "images:N" only, with the new norms as BatchNorm in
    training mode and all others in evaluation.
    """
    of_encoder, of_new, size, _ = parsed(treatment)
    names = list(norm_layers(root))
    old = [name for name in names if name.startswith(f"{encoder}.")]
    new = [name for name in names if name not in old]
    if not old or not new:
        raise ValueError(f"{type(root).__name__} has {len(old)} norms in {encoder!r} and {len(new)} others")
    if of_new == "images":
        _primed(root, new, prime)
    if (of_encoder, of_new) == ("cbn", "cbn"):
        cbn.convert(root, example_input=example)
        return
    if of_encoder in ("cbn", "tune"):
        cbn.convert(root, include=old, example_input=example, window=Window.TUNE if of_encoder == "tune" else None)
    elif of_encoder == "frozen":
        apply_norm(root.get_submodule(encoder), "frozen")
    if of_new == "gn":
        for name, child in root.named_children():
            if name != encoder and norm_layers(child):
                apply_norm(child, "gn")
    elif of_new != "bn":
        cbn.convert(root, include=new, example_input=example, window=_window(of_new, size))


def _window(kind: str, size: int) -> Window | None:
    if kind == "new":
        return Window(history="ring", size=size)
    return Window(size=size, every=1) if kind == "images" else None


@torch.no_grad()
def _primed(root: nn.Module, names: list[str], prime: Callable[[], None]) -> None:
    """Gives new BatchNorm the statistics of some images under the weights as they are."""
    root.eval()
    layers = [root.get_submodule(name) for name in names]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = None  # the plain mean
    prime()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
