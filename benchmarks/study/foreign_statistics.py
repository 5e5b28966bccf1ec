"""Do running statistics belong to the weights in front of them? How well a batch of two images tells.

    python -m benchmarks.study.foreign_statistics --data ../shared/data

For each layer of pretrained networks whose channels differ in variance by more than a factor of e: the correlation over
channels of log running variance and log variance of the batch; and the same of the first layer under new weights, as
where a stem was replaced. Three batches each, 160 px. Writes benchmarks/results/foreign_statistics.json; what
`warn_of_strangers` of norm/carried.py rests on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import resize, to_tensor

from benchmarks.provenance import RESULTS, provenance
from cbn_convert.files import write_json
from cbn_convert.norm.functional import TINY

NETWORKS = {
    "mobilenetv2_035": "mobilenetv2_035_keras", "tf_efficientnet_lite0": "tf_efficientnet_lite0_imagenet",
    "mobilenetv2_100": "mobilenetv2_100_tf2ptq",
}  # fmt: skip
SETS = {"clothing": "*/*.jpg", "sign_digits": "*/*.jpg", "bccd": "*.jpg", "camvid": "*.jpg"}
BATCHES, SIZE = 3, 160


def network(name: str, data: Path) -> Any:
    options = {"pad_type": "same"} if name.startswith("mobilenet") else {}
    model = timm.create_model(name, num_classes=10, **options)
    own = model.state_dict()
    weights = load_file(data / "weights" / f"{NETWORKS[name]}.timm.safetensors")
    model.load_state_dict({k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}, strict=False)
    return model.eval()


def batch(files: list[Path], seed: int) -> Tensor:
    chosen = torch.randint(len(files), (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    images = [resize(to_tensor(Image.open(files[i]).convert("RGB")), [SIZE, SIZE]) for i in chosen]
    return (torch.stack(images) - 0.5) / 0.5


def correlations(model: nn.Module, x: Tensor) -> list[float | None]:
    """Of each norm layer in the order of their runs; None where its channels are too much alike."""
    found: list[float | None] = []

    def hook(norm: Any, args: Any, output: Tensor) -> None:
        then, now = (v.clamp_min(TINY).log() for v in (norm.running_var, args[0].var((0, 2, 3), correction=0)))
        found.append(float(torch.corrcoef(torch.stack([then, now]))[0, 1]) if then.std() > 1 else None)

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(x)
    for one in hooks:
        one.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    rows = []
    for name in NETWORKS:
        for folder, pattern in SETS.items():
            files = sorted((data / folder / "train").glob(pattern))
            own, other = [], []
            for seed in range(BATCHES):
                torch.manual_seed(seed)
                model, x = network(name, data), batch(files, seed)
                own += [c for c in correlations(model, x) if c is not None]
                model.conv_stem.reset_parameters()
                other.append(correlations(model, x)[0])
            rows.append({"network": name, "data": folder, "layers": len(own), "least": min(own), "new_weights": other})
            print(rows[-1], flush=True)
    head = provenance("python -m benchmarks.study.foreign_statistics --data ../shared/data")
    write_json(RESULTS / "foreign_statistics.json", {**head, "rows": rows})


if __name__ == "__main__":
    main()
