"""The promises for a small architecture of every kind that timm has: producers, norm classes, activations, reparam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.promises import failures, run_promises
from helpers.subject import example_size
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

import cbn_convert as cbn

TEN = {"num_classes": 10}
# Every row is put to these, the sweep puts all architectures to all checks.
CHECKS = ("eval", "train", "fold_conv_f64", "reparam", "revert")
COMPLETE = {"coatnet_bn_0_rw_224", "fastvit_mci0", "lambda_resnet26t", "levit_128s", "resnetv2_50d", "starnet_s050"}
# A row for every kind of producer, norm class, activation and reparameterisation that timm has; the comment says what
# it adds. Arguments make the models small where timm has no small one.
MATRIX: dict[str, tuple[dict[str, Any], int]] = {
    # branches that are an identity and a norm, on the block's input, behind SE, and on sums; BatchNormAct2d
    "fastvit_mci0": ({**TEN, "embed_dims": [16, 32, 64, 128], "layers": [1, 1, 2, 1]}, 64),
    # tokens as an image again; GELUTanh, Conv2dSame with a bias, eps 1e-3
    "maxvit_tiny_tf_224": ({**TEN, "img_size": 64, "embed_dim": [32, 32, 64, 64], "depths": [2, 2, 1, 1]}, 64),
    "repvit_m0_9": ({}, 32),  # norm of a sum of a norm, a conv and the input; BatchNorm1d of a head
    "ghostnetv3_050": ({}, 64),  # skip branches; ReLU in place
    "iformer_t": ({}, 32),  # head
    "dpn48b": ({**TEN, "k_sec": [2, 2, 2, 2]}, 32),  # concatenation of slices and sums, behind max pooling; SiLU
    "shvit_s1": ({}, 32),  # head
    "levit_128s": ({**TEN, "img_size": 64}, 64),  # Linear, flattened, BatchNorm1d
    "repghostnet_050": ({}, 32),  # norm behind norm, and behind norm and activation
    "efficientvim_m1": ({}, 32),  # fuses layers of one and of two dimensions
    "coatnet_bn_0_rw_224": (
        {**TEN, "img_size": 64, "embed_dim": [16, 32, 64, 96], "depths": [2, 2, 2, 2]},
        64,
    ),  # pre-norm on a residual sum, behind the gate of SE; eps 1e-6
    "lambda_resnet26t": ({**TEN, "width_factor": 0.25}, 32),  # slice of a conv's channels; attention's output, pooled
    "efficientvit_m0": ({}, 32),  # head
    "resnetv2_50d": ({**TEN, "layers": [2, 1, 1, 1], "channels": [32, 64, 96, 128]}, 32),  # pre-activation
    "mobileone_s4": ({**TEN, "width_factor": 0.25}, 32),  # identity branch
    # norm at the end, on a residual sum; GELU
    "efficientformerv2_s2": (
        {**TEN, "img_size": 64, "depths": [1, 1, 2, 2], "embed_dims": [16, 32, 64, 96]},
        64,
    ),
    "inception_next_atto": ({}, 32),  # three depthwise convs and an identity slice
    "densenetblur121d": ({}, 32),  # concatenation of all that was before, with a blur that is a buffer
    "starnet_s050": ({}, 32),
    "botnet26t_256": ({**TEN, "width_factor": 0.25, "img_size": 64}, 64),
    "halonet26t": ({**TEN, "width_factor": 0.25}, 256),
    "mobilenetv3_small_050": ({}, 32),  # Hardswish
    "mobilenetv2_035": ({}, 32),  # ReLU6
    "visformer_tiny": ({**TEN, "embed_dim": 96, "depth": [2, 2, 2], "num_heads": 3, "img_size": 64}, 64),
    "tiny_vit_5m_224": ({**TEN, "embed_dims": [32, 64, 96, 128], "num_heads": [1, 2, 3, 4]}, 64),
    "efficientvit_l1": (
        {**TEN, "widths": [16, 32, 64, 96, 128], "depths": [1, 1, 1, 1, 1], "head_widths": [64, 64]},
        64,
    ),  # eps 1e-7
    "tresnet_m": ({**TEN, "width_factor": 0.25}, 64),  # LeakyReLU
    "resnet50_mlp": ({**TEN, "width_factor": 0.25}, 32),
    "xcit_nano_12_p8_224": ({}, 32),  # conv, activation, norm
    "swiftformer_xs": ({}, 32),
    "lcnetv2_small": ({}, 32),
    "mixnet_s": ({}, 32),  # concatenation of convs
    "dpn68": ({**TEN, "k_sec": [2, 2, 2, 2]}, 32),
    "skresnet18": ({**TEN, "layers": [1, 1, 1, 1]}, 64),  # dilated
    "mobilenetv4_hybrid_medium_075": ({}, 32),  # residual with layer scale
    "repvgg_a0": (TEN, 32),
    "nextvit_small": (
        {**TEN, "depths": [2, 2, 5, 2]},
        32,
    ),  # concatenation of attention and conv; BatchNorm1d [N, C, L]
    "legacy_xception": (TEN, 64),  # the conv in a container of its own
    "xception41p": (TEN, 64),  # the same, pre-activation
    "regnetv_040": (TEN, 32),  # pre-norm
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small are faster so, and on a busy machine much faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MATRIX)
def test_promises(name: str) -> None:
    assert not failures(run_promises(name, *MATRIX[name], only=None if name in COMPLETE else CHECKS))


@pytest.mark.parametrize(
    ("name", "check", "wrong_by"),
    # the second one is deep: with any random weights its outputs would answer rounding as they answer this
    [("resnetv2_50d", "fold_conv_f64", 1e-4), ("efficientnetv2_rw_t", "fold_affine", 1e-2)],
)
def test_a_fold_that_is_wrong_in_one_channel_is_seen(
    name: str, check: str, wrong_by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = cbn.fold

    def wrong(*args: Any, **kwargs: Any) -> nn.Module:
        folded = fold(*args, **kwargs)
        with torch.no_grad():
            next(m for m in folded.modules() if isinstance(m, nn.Conv2d)).weight[0] *= 1 + wrong_by
        return folded

    monkeypatch.setattr(cbn, "fold", wrong)
    record = run_promises(name, *MATRIX.get(name, example_size(name)), only=[check])
    assert list(failures(record)) == [check]


def test_weights_that_are_made_for_each_image() -> None:
    """CondConv; timm has no small one."""

    def make() -> nn.Module:
        blocks = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e6_c24_se0.25"], ["ir_r2_k5_s2_e6_c40_se0.25_cc4"]]
        stages = decode_arch_def(blocks, 1.0, experts_multiplier=1)
        return EfficientNet(stages, num_classes=10, num_features=64)

    assert not failures(run_promises("condconv", {}, 32, only=CHECKS, make=make))
