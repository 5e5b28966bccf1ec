"""What the recipes share, beside the line that each is about: arguments, photos, a network with ImageNet weights.

--data is a folder as described in its README: photos of hands that show a digit, and weights. Replace `network` and
`photos` by your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from cbn_convert.training.alternatives import apply_norm

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MOBILENET = "weights/mobilenetv2_035_keras.timm.safetensors"  # ImageNet, with the statistics that its training left


def arguments(about: str | None, steps: int, lr: float, **others: Any) -> argparse.Namespace:
    """--norm, --data, --steps, --lr and --seed, and others with their defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", default="cbn", choices=["cbn", "bn", "frozen"], help="the others are to compare with")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in others.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


def network(args: argparse.Namespace, classes: int = 10, **options: Any) -> Any:
    """MobileNetV2-0.35 with its ImageNet weights and a new head; its BatchNorm is frozen with --norm frozen."""
    weights = {"file": str(args.data / MOBILENET), "num_classes": 0}
    model = timm.create_model("mobilenetv2_035", pretrained_cfg_overlay=weights, pretrained=True, pad_type="same",
                              **({} if options else {"num_classes": classes}), **options)  # fmt: skip
    return freeze(args, model)


def freeze(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Frozen BatchNorm, whose γ and β go on learning, if that is what is to be compared with."""
    if args.norm == "frozen":
        apply_norm(model, "frozen")
    return model


def photos(args: argparse.Namespace, split: str, size: int = 96) -> Any:
    """Images [3, size, size] and their digits; all of them, in an order that depends on the seed only."""
    steps = [T.Resize((size, size)), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
    folder = ImageFolder(args.data / "sign_digits" / split, T.Compose(steps))
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(args.seed))
    return Subset(folder, order.tolist())


@torch.inference_mode()
def top1(model: nn.Module, args: argparse.Namespace) -> float:
    """Of the validation images, in percent."""
    found: list[Tensor] = [model.eval()(x).argmax(1) == y for x, y in DataLoader(photos(args, "val"), 32)]
    return 100 * float(torch.cat(found).float().mean())


def say(args: argparse.Namespace, what: str, value: float, where: str) -> None:
    """The recipe's figure; benchmarks/coverage/examples.py reads it."""
    print(f"{args.norm}: {what} {value:.1f} on {where}", flush=True)
