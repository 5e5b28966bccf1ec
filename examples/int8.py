"""Trains a small ResNet with CBN on handwritten digits, folds it, and quantises that to int8; the original cannot be.

python examples/int8.py                # by torch.fx, some ten seconds on one CPU core
python examples/int8.py --by pt2e      # by torch.export; pip install torchao
"""

from __future__ import annotations

import argparse
import warnings

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import cbn_convert as cbn


def digits() -> tuple[Tensor, Tensor]:
    """1797 images [N, 3, 32, 32] and their digits, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, size=32, mode="bilinear")
    return images.expand(-1, 3, -1, -1)[order], torch.tensor(data.target)[order]


def by_fx(model: nn.Module, images: Tensor) -> nn.Module:
    """Quantised by torch.ao, which is part of torch."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images,))
    prepared(images)
    return convert_fx(prepared)


def by_pt2e(model: nn.Module, images: Tensor) -> nn.Module:
    """Quantised by torchao; torch.compile makes int8 kernels of the result."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    any_size = ({0: torch.export.Dim("batch")},)
    prepared = prepare_pt2e(torch.export.export(model, (images,), dynamic_shapes=any_size).module(), quantizer)
    prepared(images)
    return convert_pt2e(prepared)


def main() -> None:
    """Trains, folds, quantises; prints the accuracy of all three."""
    parser = argparse.ArgumentParser(description="CBN on digits, folded, then int8")
    parser.add_argument("--by", choices=["fx", "pt2e"], default="fx")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    model = timm.create_model("test_resnet", num_classes=10)
    print(cbn.convert(model, example_input=images[:2]).summary())
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
    for step in range(args.steps):
        at = torch.arange(4 * step, 4 * step + 4) % 1400
        F.cross_entropy(model(images[at]), labels[at]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        optimizer.zero_grad()
    folded = cbn.fold(model, example_input=images[:2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # both announce each other
        int8 = (by_fx if args.by == "fx" else by_pt2e)(folded, images[:256])
        found = [net(images[1400:]).argmax(1) for net in (model.eval(), folded, int8)]
    for name, digit in zip(("as trained", "folded", "int8"), found, strict=True):
        print(f"{name}: top-1 {100 * (digit == labels[1400:]).float().mean():.1f} %")
    print(f"int8 and folded agree on {100 * (found[1] == found[2]).float().mean():.1f} % of {len(digit)} new images")


if __name__ == "__main__":
    main()
