"""How much of the covariance of a conv's input patches a diagonal and a few principal axes know.

    python -m benchmarks.study.patch_covariance --data ../shared/data --work FOLDER

What the carried window needs of the covariance Σ is Σθ: the variance of x follows the weights by 2 Σθ. Its part along θ
is right with whatever stands for Σ (rescaled weights); here the part across θ is looked at, over the filters of every
conv with one group and at most 1,200 weights for each channel: median cosine to the true one, and median relative
error. Truth: 96 photos of hands. "found": the window's axes after 32 looks at two other photos each, as in training.
FOLDER has, or gets, the ResNet-10-T of comparisons.py. Writes benchmarks/results/patch_covariance.json, of which
benchmarks/documents/readme.py makes the table of docs/experiments.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from benchmarks.provenance import RESULTS, provenance
from benchmarks.study.comparisons import FOLDERS, source
from cbn_convert.norm.carried import PATCH_LOOKS, Carried
from cbn_convert.norm.distributed import PatchMoments
from cbn_convert.norm.functional import AXES, probes_of
from cbn_convert.norm.moments import InputPatches

COMMAND = "python -m benchmarks.study.patch_covariance --data ../shared/data --work FOLDER"
AXES_TRIED, MOST_WEIGHTS, POSITIONS = (0, 1, 2, 4, 8, 16), 1200, 20_000
NETWORKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "MobileNetV2-0.35": ("mobilenetv2_035", {"pad_type": "same"}, "mobilenetv2_035_keras.timm.safetensors"),
    "EfficientNet-Lite0": ("tf_efficientnet_lite0", {}, "tf_efficientnet_lite0_imagenet.timm.safetensors"),
    "ResNet-10-T": ("resnet10t", {}, "FROM-CLOTHING"),
}


def photos(folder: Path, model: nn.Module) -> Tensor:
    """160 photos of hands, 16 of each digit, as the network takes them, at 96 px."""
    transform = create_transform(**{**resolve_data_config({}, model=model), "input_size": (3, 96, 96), "crop_pct": 1.0})
    files = [f for digit in sorted(folder.iterdir()) for f in sorted(digit.iterdir())[:16]]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    images: list[Any] = [transform(Image.open(files[i]).convert("RGB")) for i in order]
    return torch.stack(images)


def across(theta: Tensor, product: Tensor) -> Tensor:
    """The part of Σθ across θ, in units of θ·Σ·θ, row by row."""
    product = product / (theta * product).sum(1, keepdim=True)
    return product - (theta * product).sum(1, keepdim=True) / theta.square().sum(1, keepdim=True) * theta


def found_axes(conv: nn.Conv2d, inputs: Tensor) -> Carried:
    """What a window knows of the patches after looks at two images each."""
    theta = conv.weight.detach().flatten(1)
    state = Carried(torch.ones(2, len(theta)))
    for look in range(len(inputs) // 2):
        y = inputs[2 * look : 2 * look + 2]
        out_size = torch.nn.functional.conv2d(y, conv.weight, None, conv.stride, conv.padding, conv.dilation).shape[2:]
        patches = InputPatches(conv, y, out_size, y.dtype, 512, look)
        probes = probes_of(state.patch_axes, 1, theta.shape[1], theta)
        mean, var, along = patches.moments(probes)
        found = PatchMoments(mean, var, probes, along)
        state = state.with_patches(found, 1 / min(look + 1, PATCH_LOOKS), theta, None)
    return state


def compared(conv: nn.Conv2d, inputs: Tensor) -> dict[str, tuple[float, float]]:
    """Cosine and relative error of each form, medians over the filters that are not zero."""
    theta = conv.weight.detach().flatten(1).double()
    theta = theta[theta.norm(dim=1) > 1e-3 * theta.norm(dim=1).max()]
    columns = (
        F.unfold(inputs[64:], conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(0, 1).flatten(1)
    )
    generator = torch.Generator().manual_seed(0)
    columns = columns[:, torch.randperm(columns.shape[1], generator=generator)[:POSITIONS]].double()
    covariance = columns.cov(correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    truth = across(theta, theta @ covariance)

    def against(product: Tensor) -> tuple[float, float]:
        own = across(theta, product)
        error = (own - truth).norm(dim=1) / truth.norm(dim=1)
        return float(F.cosine_similarity(own, truth).median()), float(error.median())

    def applied(rest: Tensor, axes: Tensor) -> Tensor:
        return theta * rest + theta @ axes.T @ axes

    result = {}
    for count in AXES_TRIED:
        axes = (vectors[:, max(0, len(values) - count) :] * values[max(0, len(values) - count) :].clamp_min(0).sqrt()).T
        result[str(count)] = against(applied((covariance.diag() - axes.square().sum(0)).clamp_min(0), axes))
    state = found_axes(conv, inputs[:64])
    assert state.patch_rest is not None
    assert state.patch_axes is not None
    result["found"] = against(applied(state.patch_rest[0].double(), state.patch_axes[0].double()))
    return result


@torch.no_grad()
def network(name: str, data: Path, work: Path) -> list[dict[str, Any]]:
    """A record for each conv of a network."""
    arch, keywords, weights = NETWORKS[name]
    file = source("resnet", data, work, 1) if weights == "FROM-CLOTHING" else data / "weights" / weights
    model = timm.create_model(arch, num_classes=0, **keywords).eval()
    model.load_state_dict({k: v for k, v in load_file(file).items() if k in model.state_dict()})
    inputs: dict[str, Tensor] = {}

    def keep(conv: str) -> Callable[..., None]:
        return lambda module, args: inputs.update({conv: args[0]})

    for conv, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight[0].numel() <= MOST_WEIGHTS:
            module.register_forward_pre_hook(keep(conv))
    model(photos(data / FOLDERS["hands"] / "train", model))
    records = []
    for conv, y in inputs.items():
        module = model.get_submodule(conv)
        assert isinstance(module, nn.Conv2d)
        records.append({"conv": conv, "weights": module.weight[0].numel(), **compared(module, y)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sign_digits/, clothing/ and weights/")
    parser.add_argument("--work", type=Path, required=True, help="as of comparisons.py")
    given = parser.parse_args()
    found = {name: network(name, given.data.resolve(), given.work.resolve()) for name in NETWORKS}
    text = json.dumps({**provenance(COMMAND), "axes": AXES, "networks": found}).replace('{"conv"', '\n{"conv"')
    (RESULTS / "patch_covariance.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
