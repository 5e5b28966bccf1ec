"""Damaged files, and what the commands that read them make of it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.robustness.supervised import (
    MAIN,
    PATIENCE,
    SMALL,
    Command,
    Record,
    check_no_litter,
    checkpoints,
    difference,
    make_images,
    require,
    state,
)

LIMIT = 30  # seconds for a command that takes one or two
MEMORY = 8 * 2**30  # bytes that it may allocate: a bug must not take the machine down with it

DAMAGES = ("truncated", "bits flipped", "block of zeros", "random bytes", "empty", "missing")
EDITS = ("value replaced", "key removed")  # of JSON and YAML
VALUES = (None, True, "", "x" * 300, -1, 0, 0.5, 10**30, 1e308, float("nan"), [], {}, [1, None], {"a": 1}, "../../x")
EVALUATE, CONVERT, EXPORT, FINETUNE, RESUME = "evaluate", "convert", "export", "finetune", "finetune --resume"
# the files to damage one of, and the commands that read it; one named twice is drawn twice as often
TARGETS: dict[str, tuple[str, ...]] = {
    "exported/model.safetensors": (EVALUATE, CONVERT, EXPORT, FINETUNE),
    "exported/config.json": (EVALUATE, CONVERT, EXPORT, FINETUNE),
    "weights.safetensors": (CONVERT, FINETUNE),
    "run/config.json": (RESUME, RESUME, EVALUATE, EXPORT),
    "run/metrics.jsonl": (RESUME, RESUME, EVALUATE, EXPORT),
    "run/results.json": (RESUME,),
    "run/checkpoints/step-*/training.pt": (RESUME,),
    "run/checkpoints/step-*/rank-0.pt": (RESUME,),
    "run/checkpoints/step-*/manifest.json": (RESUME,),
    "run/best/*": (RESUME, EVALUATE, EXPORT),
    "data/*/*/*.png": (FINETUNE, EVALUATE),
    "data/*/*/*.jpg": (FINETUNE, EVALUATE),
    "settings.yaml": (FINETUNE,),
}


def _read_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _write_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


FORMS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, json.dumps),
    ".jsonl": (_read_lines, _write_lines),
    ".yaml": (yaml.safe_load, yaml.safe_dump),
}


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damages the file in that way, at a place that `rng` chooses."""
    if kind == "missing":
        path.unlink()
        return
    if kind in EDITS:
        edit(path, kind, rng)
        return
    content = bytearray(path.read_bytes())
    # half of them in the header, where a format has most to lose
    start = rng.randrange(min(len(content), rng.choice((256, 2**40))))
    end = min(start + rng.choice((1, 16, 512, 4096)), len(content))
    if kind == "truncated":
        del content[start:]
    elif kind == "empty":
        content.clear()
    elif kind == "bits flipped":
        for place in [start, *rng.choices(range(len(content)), k=rng.choice((0, 0, 7)))]:
            content[place] ^= 1 << rng.randrange(8)
    else:
        content[start:end] = bytes(end - start) if kind == "block of zeros" else rng.randbytes(end - start)
    path.write_bytes(content)


def edit(path: Path, kind: str, rng: random.Random) -> None:
    """Replaces or removes one value in a file of JSON, JSON lines or YAML."""
    read, write = FORMS[path.suffix]
    data = read(path.read_text(encoding="utf-8"))
    container, key = rng.choice(list(places(data)))
    if kind == "key removed":
        del container[key]
    else:
        container[key] = rng.choice(VALUES)
    path.write_text(write(data), encoding="utf-8")


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value: the list or dictionary that it is in, and its index or key."""
    pairs = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, value in pairs:
        yield data, key
        yield from places(value)


def make_base(base: Path) -> Path:
    """What a case damages a copy of: images, a run shortly before its end, an export; returns the same run, ended."""
    base.mkdir()
    data, run = make_images(base / "data", 6, 3), base / "run"
    for arguments in (
        ["finetune", data, *SMALL, "--workers", 0, "--epochs", 2, "--save-every", 3, "--keep", 3, "-o", run],
        ["export", run, "-o", base / "exported"],
    ):
        command = Command(arguments, base.with_suffix(".log"))
        require(command.wait(PATIENCE) == 0, command.errors)
        command.finish()
    ended = Path(shutil.copytree(run, base.with_name("ended")))
    shutil.rmtree(checkpoints(run)[0])
    shutil.copy(run / "best/model.safetensors", base / "weights.safetensors")
    settings = {
        "epochs": 1, "batch-size": 2, "lr": 0.01, "window": 4, "norm": "cbn", "hflip": 0.5, "no_aug": False,
        "mean": [0.5, 0.5, 0.5], "img_size": 32, "sched": "cosine", "model_kwargs": {"drop_rate": 0.1},
    }  # fmt: skip
    (base / "settings.yaml").write_text(yaml.safe_dump(settings))
    return ended


def arguments_of(command: str, target: str, case: Path, rng: random.Random) -> list[Any]:
    """The arguments with which a command reads the damaged file."""
    data, out, trained = case / "data", case / "out", case / ("run" if target.startswith("run/") else "exported")
    workers = ["--workers", rng.choice((0, 0, 1))]
    skip = ["--skip-bad-images"] if rng.random() < 0.3 else []
    if command == EVALUATE:
        return ["evaluate", trained, data, "--device", "cpu", *workers, *skip]
    if command == EXPORT:
        return ["export", trained, "-o", out, "--fold", rng.choice(("bn", "conv"))]
    if command == RESUME:
        return ["finetune", data, "--resume", case / "run", *workers, "--quiet"]
    from_file = ["test_resnet", "--checkpoint", case / "weights.safetensors"]
    model = from_file if target == "weights.safetensors" else [f"local-dir:{case / 'exported'}"]
    if command == CONVERT:
        return ["convert", *model, "-o", out]
    options: list[Any] = ["--model", *model, "--img-size", 32]
    if target == "settings.yaml":
        options = ["--model", "test_resnet", "--no-pretrained", "--config", case / target]
    return ["finetune", data, *options, "--max-steps", 4, "--device", "cpu", "-o", out, "--quiet", *workers, *skip]


def fuzz_case(record: Record, folder: Path, seed: int, base: Path, ended: Path) -> None:
    """Damages a file, runs a command that reads it; raises CheckError for how that ends or what it has changed."""
    rng = random.Random(f"{seed} fuzz {record.number}")
    name = rng.choice(TARGETS[record.about])
    case = Path(shutil.copytree(base, folder / "case"))
    path = rng.choice(sorted(case.glob(record.about)))
    kind = record.kind if path.suffix in FORMS or record.kind in DAMAGES else "bits flipped"
    damage(path, kind, rng)
    before = snapshot(case)
    command = Command(arguments_of(name, record.about, case, rng), folder / "log", memory=MEMORY)
    code = command.wait(LIMIT)
    if code is None and name in (FINETUNE, RESUME):
        command.send(signal.SIGTERM, MAIN)  # what is damaged may say to train for years
        code = 0 if command.wait(LIMIT) == 143 else None
    command.finish()
    shown = f"{name}, {path.relative_to(case)} {kind}"
    require(code is not None, f"{shown}: it hangs")
    record.codes.append(code)
    require(code in (0, 1, 2), f"{shown}: code {code}: {command.errors[-300:]}")
    require(not command.faults, f"{shown}: {command.faults}")
    changed = changes(before, snapshot(case))
    if name == RESUME:
        check_no_litter(case / "run")
        if code:
            # it has not gone on, or has written a checkpoint since
            went_on = any(place.startswith("run/checkpoints/step-") for place in changed)
            allowed = ("run/",) if went_on else ("run/metrics.jsonl", "run/.lock")
        else:
            allowed = ("run/",)
            if record.about.startswith("run/checkpoints/"):
                place = difference(comparable(case / "run"), comparable(ended))
                require(not place, f"{shown}: differs from the undisturbed run in {place}")
        changed = [place for place in changed if not place.startswith(allowed)]
    elif code and name != FINETUNE:
        require(not (case / "out").exists(), f"{shown}: it failed and left an output")
    require(not changed, f"{shown}: changed {', '.join(changed[:3])}")


def comparable(run: Path) -> dict[str, Any]:
    """The state of a run; which checkpoints are left depends on the damage."""
    return {key: value for key, value in state(run).items() if key != "checkpoints"}


def snapshot(case: Path) -> dict[str, str]:
    """Hashes of all files but those in case/out; a damaged checkpoint has the name that it had before."""
    files = [path for path in case.rglob("*") if path.is_file() and case / "out" not in path.parents]
    hashes = {str(path.relative_to(case)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    aside = {name.replace("/damaged-", "/"): value for name, value in hashes.items() if "/damaged-" in name}
    return {name: value for name, value in hashes.items() if "/damaged-" not in name} | aside


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Files that are new, gone or other ones."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
