"""The study of detection and segmentation: its metrics, its treatments, and that it goes on where it was stopped."""

from __future__ import annotations

import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.models import randomize_norms
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from cbn_convert.comparison.plan import Cell
from cbn_convert.norm import CrossIterationMixin

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def dense() -> Any:
    """The modules of benchmarks/dense, by their names."""
    names = ("data", "metrics", "norms", "plan", "report", "run", "tasks")
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.dense.{name}") for name in names})


@pytest.fixture(scope="module")
def folder(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of noise with classes and boxes, and weights that no training has seen."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        (root / "bccd" / split).mkdir(parents=True)
        (root / "camvid" / split).mkdir(parents=True)
        (root / "camvid" / f"{split}_labels").mkdir()
        found: dict[str, Any] = {"images": [], "annotations": []}
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
            image.save(root / "camvid" / split / f"{i}.png")
            image.save(root / "bccd" / split / f"{i}.png")
            classes = np.repeat(rng.integers(0, 12, (64, 12), dtype=np.uint8), 8, 1)
            Image.fromarray(classes).save(root / "camvid" / f"{split}_labels" / f"{i}.png")
            found["images"].append({"id": i, "width": 96, "height": 64, "file_name": f"{i}.png"})
            found["annotations"] += [
                {"image_id": i, "category_id": 1 + n, "bbox": [8 + 20 * n, 10, 16 + 4 * n, 30]} for n in range(3)
            ]
        (root / f"bccd/{split}.json").write_text(json.dumps(found))
    (root / "weights").mkdir()
    save_file(classifier().state_dict(), root / dense.tasks.WEIGHTS)
    return root


def classifier() -> Any:
    torch.manual_seed(0)
    return randomize_norms(timm.create_model("tf_efficientnet_lite0")).eval()


@pytest.fixture(scope="module")
def tasks(dense: Any) -> dict[str, Any]:
    """Small ones of each kind."""
    return {
        "unet": dense.tasks.Segmentation("Unet", "camvid", (32, 64), 4, 0.01, "miou", 11),
        "deeplab": dense.tasks.Segmentation("DeepLabV3Plus", "camvid", (32, 64), 4, 0.01, "miou", 11),
        "fcos": dense.tasks.Detection("FCOS", "bccd", (64, 96), 4, 0.01, "map", 3),
        "faster-rcnn": dense.tasks.Detection("FasterRCNN", "bccd", (64, 96), 4, 0.01, "map", 3),
    }


@pytest.fixture
def study(dense: Any, folder: Path, tasks: dict[str, Any], tmp_path: Path) -> Any:
    def made(name: str) -> Any:
        weights = dense.tasks.pretrained(folder)
        return dense.run.Study(name, tasks[name], folder, tmp_path / f"{name}.json", weights)

    return made


def test_mean_iou(dense: Any) -> None:
    found, target = torch.randint(0, 5, (3, 8, 9)), torch.randint(0, 6, (3, 8, 9))  # 5 is to be ignored
    counts = dense.metrics.Confusion(5)
    for f, t in zip(found, target, strict=True):
        counts.add(f, t.to(torch.uint8))
    known = target < 5
    expected = jaccard_score(target[known], found[known], average="macro")
    assert counts.mean_iou() == pytest.approx(100 * expected)
    assert counts.accuracy() == pytest.approx(100 * float((found == target)[known].double().mean()))


def test_coco(dense: Any) -> None:
    """Against the definition, written out: precision at 101 recalls, ten overlaps, three classes."""

    def some(count: int) -> dict[str, Tensor]:
        corners = torch.rand(count, 2) * 60
        return {"boxes": torch.cat([corners, corners + 15 + torch.rand(count, 2) * 10], 1)}

    targets, found = [], []
    for _ in range(6):
        target = some(7) | {"labels": torch.randint(1, 4, (7,))}
        moved = target["boxes"] + torch.randn(7, 4) * 1.5
        others = some(4)["boxes"]
        labels = torch.cat([target["labels"], torch.randint(1, 4, (4,))])
        targets.append(target)
        found.append({"boxes": torch.cat([moved, others]), "labels": labels, "scores": torch.rand(11)})
    ap = {
        threshold: np.mean([average_precision(found, targets, label, threshold / 100) for label in (1, 2, 3)])
        for threshold in range(50, 100, 5)
    }
    metrics = dense.metrics.coco(found, targets)
    assert 5 < metrics["map"] < 95
    assert metrics["ap50"] == pytest.approx(100 * ap[50])
    assert metrics["map"] == pytest.approx(100 * np.mean(list(ap.values())))
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}] * 6
    assert dense.metrics.coco(nothing, targets)["map"] == 0


def average_precision(found: Any, targets: Any, label: int, threshold: float) -> float:
    ranked = [
        (float(s), i, j) for i, f in enumerate(found) for j, s in enumerate(f["scores"]) if f["labels"][j] == label
    ]
    free = {
        i: [b.tolist() for b, k in zip(t["boxes"], t["labels"], strict=True) if k == label]
        for i, t in enumerate(targets)
    }
    count = sum(map(len, free.values()))
    hits = []
    for _, i, j in sorted(ranked, reverse=True):
        x0, y0, x1, y1 = found[i]["boxes"][j].tolist()
        overlaps = []
        for a0, b0, a1, b1 in free[i]:
            shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
            overlaps.append(shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared))
        best = int(np.argmax(overlaps)) if overlaps else -1
        hits.append(best >= 0 and overlaps[best] >= threshold)
        if hits[-1]:
            free[i].pop(best)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    recall = np.cumsum(hits) / count
    return float(np.mean([max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]))


def test_images_are_turned_with_what_is_in_them(dense: Any, tasks: dict[str, Any], folder: Path) -> None:
    image, target = tasks["fcos"].pairs(folder, "train")[0]
    assert image.shape == (3, 64, 96)
    turned, boxes = dense.data.flipped(image, target)
    x0, y0, x1, y1 = boxes["boxes"][1].int().tolist()
    a0, b0, a1, b1 = target["boxes"][1].int().tolist()
    assert torch.equal(turned[:, y0:y1, x0:x1].flip(-1), image[:, b0:b1, a0:a1])
    scene, classes = tasks["unet"].pairs(folder, "train")[0]
    assert all(
        torch.equal(a, b.flip(-1)) for a, b in zip(dense.data.flipped(scene, classes), (scene, classes), strict=True)
    )
    pairs = tasks["unet"].pairs(folder, "train")
    both = [list(itertools.islice(dense.data.batches(pairs, 2, 5), 6)) for _ in range(2)]
    assert all(torch.equal(x, y) for (a, _), (b, _) in zip(*both, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["unet", "deeplab", "fcos", "faster-rcnn"])
def test_encoders_have_the_weights(name: str, study: Any, tasks: dict[str, Any]) -> None:
    made = study(name)
    model, x = tasks[name].build(made.weights).eval(), torch.rand(2, 3, 64, 64)
    encoder = tasks[name].root(model).get_submodule(tasks[name].encoder)
    with torch.no_grad():
        own = encoder(x)
        expected = classifier().forward_intermediates(x, intermediates_only=True)
    shared = {tuple(e.shape): e for e in expected}
    same = [torch.equal(o, shared[o.shape]) for o in own if o.shape in shared]
    assert all(same)
    assert len(same) >= 3  # DeepLab's last ones are dilated
    del made.weights["blocks.0.0.conv_dw.weight"]
    with pytest.raises(RuntimeError, match="conv_dw"):
        tasks[name].build(made.weights)


def statistics(layer: Any) -> list[Tensor]:
    return [layer.running_mean.clone(), layer.running_var.clone()]


@pytest.mark.parametrize("name", ["unet", "fcos"])
@pytest.mark.parametrize(
    "treatment",
    ["bn", "frozen+bn", "frozen+gn", "tune+gn", "cbn", "cbn+bn", "cbn+gn", "cbn+new:8", "cbn+images:64", "tune+cbn"],
)
def test_treatments(name: str, treatment: str, study: Any, tasks: dict[str, Any]) -> None:
    task, made = tasks[name], study(name)
    of_encoder, _, of_new = treatment.partition("+")
    model = made.prepared(Cell(treatment, 2, 0.01, 0))
    root = task.root(model)
    norms = {n: m for n, m in root.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))}
    old = {n: m for n, m in norms.items() if n.startswith(f"{task.encoder}.")}
    new = {n: m for n, m in norms.items() if n not in old}
    assert len(old) > 40
    assert len(new) >= 6
    before = {n: statistics(m) for n, m in norms.items() if isinstance(m, nn.BatchNorm2d)}
    gammas = {n: m.weight.detach().clone() for n, m in old.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for images, targets in made.batches(Cell(treatment, 2, 0.01, 0), 2):
        task.loss(model.train(), images, targets).backward()
        optimizer.step()
    moved = {n: not torch.equal(before[n][0], norms[n].running_mean) for n in before}
    assert {moved[n] for n in old} == {of_encoder in ("bn", "cbn")}
    assert any(not torch.equal(gammas[n], m.weight) for n, m in old.items())
    assert {isinstance(m, CrossIterationMixin) for m in old.values()} == {of_encoder in ("cbn", "tune")}
    if of_encoder in ("cbn", "tune"):
        assert {m.window.is_fixed for m in old.values()} == {of_encoder == "tune"}
        assert all(type(m._sources[0].state).__name__ == "CarriedWindow" for m in old.values())
        assert sum(m.trains_folded for m in old.values()) > 30
    kind = of_new or of_encoder
    if kind in ("bn", "gn"):
        assert {type(m) for m in new.values()} == {nn.BatchNorm2d if kind == "bn" else nn.GroupNorm}
        return
    states = [source.state for m in new.values() for source in m._sources]
    expected = {"cbn": ("NewLayerWindow", 8192), "new:8": ("Ring", 8), "images:64": ("CarriedWindow", 64)}[kind]
    assert {(type(s).__name__, s.window.size) for s in states} == {expected}


def test_the_encoder_learns_at_its_own_rate(study: Any, tasks: dict[str, Any]) -> None:
    """Its share of the rate is all that differs: one step moves its weights in proportion, and the others alike."""
    made, steps = study("unet"), []
    made.task = replace(tasks["unet"], images=2)
    for treatment in ("frozen+gn", "frozen+gn@3"):
        before = made.prepared(Cell(treatment, 2, 0.01, 0))
        after = made.trained(Cell(treatment, 2, 0.01, 0))["model"]
        pairs = [(name, p.detach(), before.get_parameter(name).detach()) for name, p in after.named_parameters()]
        inner = [p - q for name, p, q in pairs if name.startswith("encoder.")]
        steps.append((inner, [p - q for name, p, q in pairs if not name.startswith("encoder.")]))
    (default, rest), (fast, others) = steps
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
    lengths = [torch.cat([t.flatten() for t in own]).norm() for own in (default, fast)]
    assert float(lengths[1] / lengths[0]) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize(
    "treatment",
    ["cbn@", "cbn@0", "cbn@-1", "cbn@fast", "cbn@inf", "cbn@1.0", "cbn@0.3", "cbn@ 3", "frozen@1", "cbn+new:0@1"],
)
def test_treatments_that_there_are_not(treatment: str, dense: Any) -> None:
    with pytest.raises(ValueError, match="is no treatment"):
        dense.norms.parsed(treatment)


def without_times(path: Path) -> list[dict[str, Any]]:
    runs = json.loads(path.read_text())["runs"]
    return [{k: v for k, v in run.items() if "seconds" not in k} for run in runs]


def test_a_study_that_is_interrupted_ends_as_another(
    dense: Any, folder: Path, tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(output: str, *more: str) -> int:
        given = ["--data", str(folder), "--task", "unet", "--treatments", "cbn,frozen+gn", "--seeds", "2", *more]
        return dense.run.main([*given, "--output", str(tmp_path / output)], {"unet": small})

    small = dense.tasks.Segmentation("Unet", "camvid", (32, 32), 2, 0.01, "miou", 11)
    monkeypatch.setattr("cbn_convert.comparison.plan.FARTHEST", 1)
    assert go("at-once.json") == 0
    assert go("parts.json", "--budget-minutes", "0") == 3
    trained, calls = dense.run.Study.trained, itertools.count()

    def killed(self: Any, cell: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return trained(self, cell)

    monkeypatch.setattr(dense.run.Study, "trained", killed)
    with pytest.raises(KeyboardInterrupt):
        go("parts.json")
    assert len(without_times(tmp_path / "parts.json")) == 3
    assert go("parts.json") == 0
    runs = without_times(tmp_path / "parts.json")
    assert runs == without_times(tmp_path / "at-once.json")
    assert len(runs) == 8
    assert [r["treatment"] for r in runs[:4]] == ["cbn", "frozen+gn"] * 2
    assert [r["seed"] for r in runs] == [0] * 6 + [1] * 2
    assert all(r["versions"]["torch"] == torch.__version__ and r["steps"] == 1 for r in runs)
    small = dense.tasks.Segmentation("Unet", "camvid", (32, 32), 4, 0.01, "miou", 11)
    with pytest.raises(SystemExit, match="other settings"):
        go("parts.json")
    with pytest.raises(SystemExit):
        go("new.json", "--treatments", "cbn+new:many")


def test_a_norm_that_cannot_train_has_failed(study: Any, dense: Any) -> None:
    """DeepLab's pooled branch has one value per channel in a batch of one image."""
    made = study("deeplab")
    runs = {norm: made.run(Cell(norm, 1, 0.01, 0), -1.0) for norm in ("bn", "cbn")}
    assert runs["bn"]["diverged"]
    assert "more than 1 value per channel" in runs["bn"]["error"]
    assert not runs["cbn"]["diverged"]
    assert set(runs["cbn"]["test"]) == {"miou", "pixels"}
    diverged = made.run(Cell("bn", 2, 1e30, 0), -1.0)
    assert diverged["diverged"]
    assert diverged["loss"] is None


def test_rates_are_chosen_by_validation_and_the_table_has_the_test_split(
    study: Any, dense: Any, tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs that are made up: 0.1 is the best rate for validation and the worst for test."""
    made = study("fcos")

    def run(cell: Cell, at_least: float) -> dict[str, Any]:
        val = 50 - 10 * abs(np.log10(cell.lr / 0.1)) + cell.seed + 5 * cell.norm.startswith("cbn")
        record = {
            "task": "bccd-fcos",
            "treatment": cell.norm,
            "batch": cell.batch_size,
            "lr": cell.lr,
            "seed": cell.seed,
        }
        record |= {"val": {"map": val}, "diverged": False, "seconds": 1.0}
        return {**record, "test": {"map": 60 - val, "ap50": 70.0}} if val >= at_least else record

    monkeypatch.setattr(made, "run", run)
    assert made.go_on(dense.run.columns(tasks["fcos"], ["frozen+bn", "cbn"], [2, 1], 3))
    read = dense.report.interpreted("bccd-fcos", json.loads(made.output.read_text()))
    for (treatment, size), entry in read.entries.items():
        assert 0.05 < entry.row.lr < 0.2
        assert entry.complete
        assert not entry.row.at_edge
        seeds = [run(Cell(treatment, size, entry.row.lr, seed), 0)["test"]["map"] for seed in range(3)]
        assert entry.row.top1 == pytest.approx(np.mean(seeds))
        assert entry.row.std == pytest.approx(1)
    tables = dense.report.tables([read])
    assert "**9.0 ± 1.0 (70.0)** @ 0.1, validation 51.0 |" in tables["dense"]
    assert "| 2 | 9.0 ± 1.0 (frozen BN + BN) | 4.0 ± 1.0 | **-5.0 ± 0.8** |" in tables["dense-verdicts"]
    order = [(r["batch"], r["seed"]) for r in made.records]
    assert order == sorted(order, key=lambda one: (-one[0], one[1]))

    file = made.output.rename(made.output.with_name("bccd-fcos.json"))
    assert [one.name for one in dense.report.read(file.parent)] == ["bccd-fcos"]
    begun = json.loads(file.read_text())
    file.write_text(json.dumps({**begun, "runs": begun["runs"][:1]}))
    assert dense.report.read(file.parent) == []
