"""What a checkpoint without `history_state`, as other frameworks write it, loses over the ten steps behind it.

    python -m benchmarks.study.resume_without_history --data ../shared/data --label carried

MobileNetV2-0.35 from ImageNet on clothing photos, SGD with momentum 0.9 and clipping at batch size 2, without
augmentation: 40 steps, then ten more, and the same ten of the same batches in a new model that got state_dict and
optimizer only. Once more with the history, as a check that nothing else is lost, and with all weights changed in
their last bit, which shows how much of a difference is the training's own sensitivity. Adds to
benchmarks/results/resume_without_history.json, under the label, what the package that it imports does. It takes
packages as old as commit 42d2965, whose window was the exponential one with C:

    FORMER_CHECKOUT/.venv/bin/python -m benchmarks.study.resume_without_history --data ../shared/data --label former
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

import cbn_convert as cbn
from benchmarks.provenance import RESULTS, provenance
from cbn_convert.classifier import reset_head
from cbn_convert.models import ModelSpec, create_model
from cbn_convert.norm import CrossIterationMixin, history_state, load_history_state

OUTPUT = RESULTS / "resume_without_history.json"
STEPS, MORE, BATCH, LRS, SIZE, SEEDS = 40, 10, 2, (3e-4, 3e-3), 96, 3
Images = tuple[Tensor, Tensor]


def images(folder: Path, count: int, seed: int) -> Images:
    """Some of a folder's photos, chosen by the seed."""
    load = transforms.Compose(
        [
            transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True), transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )  # fmt: skip
    photos = ImageFolder(str(folder), load)
    chosen = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    x, y = zip(*(photos[i] for i in chosen), strict=True)
    return torch.stack(x), torch.tensor(y)


class Run:
    """A network in training."""

    def __init__(self, data: Path, lr: float) -> None:
        self.lr = lr
        spec = ModelSpec(
            "mobilenetv2_035", checkpoint=str(data / "weights" / "mobilenetv2_035_keras.timm.safetensors"),
            model_kwargs={"pad_type": "same"},
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = create_model(spec, 10)
        reset_head(self.model)
        cbn.convert(self.model, example_input=torch.zeros(1, 3, SIZE, SIZE))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9, nesterov=True)

    def train(self, batches: list[Images]) -> list[float]:
        """One step per batch; returns the losses."""
        self.model.train()
        losses = []
        for x, y in batches:
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def resumed(self, data: Path, history: bool) -> Run:
        """A new one that goes on from what this one saves."""
        other = Run(data, self.lr)
        saved = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), history_state(self.model)))
        other.model.load_state_dict(saved[0])
        other.optimizer.load_state_dict(saved[1])
        if history:
            load_history_state(other.model, saved[2])
        return other

    @torch.no_grad()
    def rounded(self) -> Run:
        """This one, every weight changed in its last bit."""
        for p in self.model.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
        return self

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """Logits in evaluation."""
        self.model.eval()
        out: Tensor = self.model(x)
        return out


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖a‖."""
    return float((a - b).norm() / a.norm())


def differences(whole: Run, other: Run, losses: list[float], others: list[float], x: Tensor) -> dict[str, float]:
    """Between two runs of the same steps, relative to the first: at the end, but for the losses."""
    means, variances = [], []
    outputs = relative(whole.outputs(x), other.outputs(x))
    for a, b in zip(layers(whole.model), layers(other.model), strict=True):
        means.append(float((a.running_mean - b.running_mean).norm() / a.running_var.sqrt().norm()))
        variances.append(relative(a.running_var, b.running_var))
    return {
        "outputs": outputs,
        "loss": sum(abs(a - b) / a for a, b in zip(losses, others, strict=True)) / MORE,
        "mean": statistics.median(means), "mean_worst": max(means),
        "var": statistics.median(variances), "var_worst": max(variances),
    }  # fmt: skip


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, CrossIterationMixin)]


def measure(data: Path, lr: float, seed: int) -> list[dict[str, Any]]:
    """What is lost without and with the history, and by rounding."""
    x, y = images(data / "clothing" / "train", BATCH * (STEPS + MORE), seed)
    held_out, _ = images(data / "clothing" / "val", 64, seed)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    whole = Run(data, lr)
    whole.train(batches[:STEPS])
    resumed = {
        "without history": whole.resumed(data, False),
        "with history": whole.resumed(data, True),
        "last bit": whole.resumed(data, True).rounded(),
    }
    losses = whole.train(batches[STEPS:])
    return [
        {
            "lr": lr,
            "seed": seed,
            "resume": name,
            **differences(whole, run, losses, run.train(batches[STEPS:]), held_out),
        }
        for name, run in resumed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing/ and weights/")
    parser.add_argument("--label", choices=("carried", "former"), required=True, help="which window the package has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for lr in LRS for seed in range(SEEDS) for row in measure(arguments.data, lr, seed)]
    package = Path(cbn.__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True, check=True)
    command = f"python -m benchmarks.study.resume_without_history --data ../shared/data --label {arguments.label}"
    report = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    report[arguments.label] = {**provenance(command), "commit": commit.stdout.strip(), "rows": rows}
    OUTPUT.write_text(json.dumps(report).replace('{"lr"', '\n{"lr"') + "\n")


if __name__ == "__main__":
    main()
