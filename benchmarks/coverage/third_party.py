"""Models of other libraries: what convert makes of each, and whether it keeps its promises.

    python -m benchmarks.coverage.third_party [--only 'smp/*,monai/*'] [--failed | --again]

Needs the libraries (make test-integrations' environment has them). Writes benchmarks/results/third_party.json after
every model, and the tables in docs/coverage.md at the end; models that are in the JSON are not checked again without
--only, --failed or --again. Each model is checked in a process of its own, with a limit on its memory and time, forked
behind the import of its library. A library that is not installed is passed over.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import logging
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.coverage.third_party_models import LIBRARIES, MODELS, build
from benchmarks.documents import coverage
from benchmarks.provenance import RESULTS, ROOT, provenance

os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
sys.path[:0] = [str(ROOT / "tests")]

from helpers.promises import describe, reasons  # noqa: E402
from helpers.subject import LEAST_VAR, assert_identical, assert_same_state, difference, same  # noqa: E402

import cbn_convert as cbn  # noqa: E402
from cbn_convert.conversion import norm_layers  # noqa: E402
from cbn_convert.conversion.example import leaves_of  # noqa: E402
from cbn_convert.integrations import load_training_state, training_state  # noqa: E402
from cbn_convert.norm import CrossIterationMixin, is_frozen  # noqa: E402

OUTPUT = RESULTS / "third_party.json"
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of a fold
STEPS = 3
Record = dict[str, Any]


class Subject:
    """A model on its way through the checks, with norms that are no identities, and what was known of it before."""

    def __init__(self, key: str) -> None:
        self.entry = MODELS[key]
        self.inputs = self.entry.inputs(1)
        self.model = calibrated(build(key), self.inputs)
        self.classes = {name: type(m) for name, m in self.model.named_modules()}
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.norms = norm_layers(self.model)
        self.expected = outputs(self.model, self.inputs)
        assert self.expected, "the model has no tensor among its outputs"
        self.plain = copy.deepcopy(self.model)
        self.report: Any = ()
        self.left_bn: int | None = None
        self.noise = 0.0  # how far outputs move where inputs change in the last bit


def called(model: nn.Module, inputs: Any) -> Any:
    """The model on what `convert` takes as example_input; the same random numbers are drawn in every call."""
    torch.manual_seed(0)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    return model(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def tensors(value: Any) -> list[Tensor]:
    return [t for t in leaves_of(value) if isinstance(t, Tensor) and t.is_floating_point()]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any, part: str = "") -> list[Tensor]:
    """What the model returns in eval mode, or what a part of it did while it ran."""
    found: list[Tensor] = []
    handle = model.get_submodule(part).register_forward_hook(lambda m, args, out: found.extend(tensors(out)))
    try:
        whole = tensors(called(model.eval(), inputs))
    finally:
        handle.remove()
    return found if part else whole


@torch.no_grad()
def calibrated(model: nn.Module, inputs: Any) -> nn.Module:
    """In eval mode, with random γ and β and statistics of what the norms see; helpers.subject says why."""
    handles = []
    for norm in norm_layers(model).values():
        if norm.weight is not None:
            norm.weight.uniform_(0.25, 0.75)
            norm.bias.normal_(1, 0.3)
        handles.append(norm.register_forward_pre_hook(measure))
    called(model.eval(), inputs)
    for handle in handles:
        handle.remove()
    return model


def measure(norm: Any, args: tuple[Tensor, ...]) -> None:
    if norm.running_mean is not None:
        var, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var.nan_to_num().clamp_min(LEAST_VAR))


def doubled(value: Any) -> Any:
    """The inputs with float64 in the place of float32."""
    if isinstance(value, dict):
        return {k: doubled(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(doubled(v) for v in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def changed(value: Any) -> Any:
    """The inputs with other last bits."""
    if isinstance(value, dict):
        return {k: changed(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(changed(v) for v in value)
    return torch.nextafter(value, 2 * value) if isinstance(value, Tensor) and value.is_floating_point() else value


def check_convert(s: Subject) -> None:
    """One row for each norm layer, with a reason; nothing is kept that runs once."""
    s.report = cbn.convert(s.model, example_input=s.inputs)
    assert [row.name for row in s.report] == list(s.norms), "the report's rows are not the norm layers of the model"
    assert all(row.reason for row in s.report), "a row has no reason"


def check_eval(s: Subject) -> None:
    """The same bits, and the same state_dict."""
    assert_identical(outputs(s.model, s.inputs), s.expected, "converted")
    assert_same_state(s.model, s.before)


def check_copy(s: Subject) -> None:
    """deepcopy gives the same bits, and modules of its own."""
    model = copy.deepcopy(s.model)
    own = {id(m) for m in model.modules()}
    bound = [m for m in model.modules() if isinstance(m, CrossIterationMixin) for m in m.producers]
    assert all(id(m) in own for m in bound), "bound to a module of the model that it is a copy of"
    assert_identical(outputs(model, s.inputs), s.expected, "deepcopy")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, s: Subject, seed: int) -> float:
    """One step of SGD; the mean square of whatever the model returns, where it has no losses of its own."""
    make = s.entry.train_inputs or s.entry.inputs
    found = called(model.train(), make(seed))
    mine = [t for t in tensors(found) if t.requires_grad]
    loss = torch.stack([t.square().mean() if s.entry.train_inputs is None else t.sum() for t in mine]).sum()
    assert torch.isfinite(loss), f"the loss of step {seed} is not finite"
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return float(loss)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def check_train(s: Subject) -> float:
    """Three steps on a deepcopy; all that is learned or measured stays finite; the loss."""
    s.trained = copy.deepcopy(s.model)
    s.optimizer = sgd(s.trained)
    loss = [step(s.trained, s.optimizer, s, 2 + i) for i in range(STEPS)][-1]
    broken = [k for k, t in s.trained.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    assert not broken, f"trained: {broken[0]} is not finite"
    return loss


def check_resume(s: Subject) -> None:
    """A fresh model with the saved state takes the next step as the one that went on, to the bit."""
    file = io.BytesIO()
    parts = {"model": s.trained.state_dict(), "optimizer": s.optimizer.state_dict(), "cbn": training_state(s.trained)}
    torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = copy.deepcopy(s.model)
    optimizer = sgd(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    load_training_state(model, saved["cbn"])
    losses = [step(m, o, s, 2 + STEPS) for m, o in ((s.trained, s.optimizer), (model, optimizer))]
    assert losses[0] == losses[1], f"the resumed run has another loss, {losses[1]:g} in place of {losses[0]:g}"
    other = [k for (k, a), b in zip(s.trained.state_dict().items(), model.state_dict().values(), strict=True)
             if not same(a, b)]  # fmt: skip
    assert not other, f"the resumed run has another {other[0]}"
    del s.trained, s.optimizer


def folded(s: Subject, into: Any, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the folded model, and those of the converted one."""
    model, inputs = (
        (s.model, s.inputs) if dtype == torch.float32 else (copy.deepcopy(s.model).double(), doubled(s.inputs))
    )
    expected = outputs(model, inputs, s.entry.part)
    s.noise = difference(outputs(model, changed(inputs), s.entry.part), expected, math.inf, "")
    result = cbn.fold(model, into, example_input=inputs)
    assert not any(isinstance(m, CrossIterationMixin) for m in result.modules()), "a cross-iteration layer is left"
    if into == "conv":
        s.left_bn = sum(isinstance(m, _BatchNorm) or is_frozen(m) for m in result.modules())
    return outputs(result, inputs, s.entry.part), expected


def fold_difference(s: Subject, into: Any) -> float:
    dtype = torch.float64 if s.entry.in_double else torch.float32
    pair = folded(s, into, dtype)
    return difference(*pair, max(LIMITS[dtype], 10 * s.noise), f"folded into {into}")


def check_fold_bn(s: Subject) -> None:
    """Plain BatchNorm, the same bits."""
    assert_identical(*folded(s, "bn", torch.float32), "folded into bn")


def check_fold_affine(s: Subject) -> float:
    return fold_difference(s, "affine")


def check_fold_conv(s: Subject) -> float:
    return fold_difference(s, "conv")


def check_revert(s: Subject) -> None:
    """The last: classes, state_dict and outputs are those of before, after all the other checks; no hook is left."""
    cbn.revert(s.model)
    assert {name: type(m) for name, m in s.model.named_modules()} == s.classes, "reverted: classes are others"
    assert_same_state(s.model, s.before)
    plain = dict(s.plain.named_modules())
    hooked = [n for n, m in s.model.named_modules()
              if len(m._forward_hooks) + len(m._forward_pre_hooks)
              != len(plain[n]._forward_hooks) + len(plain[n]._forward_pre_hooks)]  # fmt: skip
    assert not hooked, f"reverted: {hooked[0]} has a hook left"
    assert_identical(outputs(s.model, s.inputs), s.expected, "reverted")


CHECKS: dict[str, Callable[[Subject], float | None]] = {
    "convert": check_convert, "eval": check_eval, "copy": check_copy, "train": check_train, "resume": check_resume,
    "fold_bn": check_fold_bn, "fold_affine": check_fold_affine, "fold_conv": check_fold_conv, "revert": check_revert,
}  # fmt: skip


def checked(key: str) -> Record:
    """All checks of one model, and whether plain BatchNorm would have trained at the same batch size."""
    began = time.monotonic()
    record: Record = {"model": key, "checks": {}}
    try:
        s = Subject(key)
    except Exception as error:
        return record | {"checks": {"build": {"ok": False, "value": None, "error": describe(error)}}}
    record |= {"params_m": round(sum(p.numel() for p in s.model.parameters()) / 1e6, 2), "norms": len(s.norms)}
    record["batch"] = shape_of(s.inputs)
    try:
        plain = copy.deepcopy(s.plain)
        step(plain, sgd(plain), s, 2)
        record["bn_error"] = None
    except Exception as error:
        record["bn_error"] = describe(error)[:160]
    plain = None
    for check, function in CHECKS.items():
        try:
            record["checks"][check] = {"ok": True, "value": function(s), "error": None}
        except Exception as error:
            record["checks"][check] = {"ok": False, "value": None, "error": describe(error)}
            if check == "convert":
                break
        if check == "convert":
            unfolded = sum(r.status == "compensated" and r.form == "unfolded" for r in s.report)
            record |= {**s.report.counts, "unfolded": unfolded, "reasons": reasons(s.report)}
            record["without_reason"] = sum(not r.reason for r in s.report)
    return record | {"left_bn": s.left_bn, "noise": s.noise, "seconds": round(time.monotonic() - began, 1)}


def shape_of(inputs: Any) -> str:
    return ", ".join("×".join(map(str, t.shape)) for t in tensors(inputs))


def in_a_process(key: str, seconds: int, gigabytes: float) -> Record:
    """`checked`, in a process that an alarm ends, whatever it is at; too much memory is an error of the check."""
    importlib.import_module(LIBRARIES[key.split("/")[0]][0])
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(checked(key)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(text)
    error = f"time limit of {seconds} s" if status == -signal.SIGALRM else f"the process ended with status {status}"
    return {"model": key, "checks": {"build": {"ok": False, "value": None, "error": error}}}


def failures(record: Record) -> dict[str, str]:
    return {check: result["error"] for check, result in record["checks"].items() if not result["ok"]}


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    found = {}
    for _, distribution in LIBRARIES.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def chosen(records: dict[str, Record], arguments: argparse.Namespace) -> list[str]:
    """The models to check now; those of libraries that are not installed are passed over."""
    there = {library for library, (_, distribution) in LIBRARIES.items() if distribution in versions()}
    names = [key for key in MODELS if key.split("/")[0] in there]
    if arguments.only:
        return [n for n in names if any(fnmatchcase(n, pattern) for pattern in arguments.only.split(","))]
    if arguments.failed:
        return [n for n in names if n in records and failures(records[n])]
    return names if arguments.again else [n for n in names if n not in records]


def write(records: dict[str, Record]) -> None:
    """Replaces the file at once; a line for a record."""
    head = provenance("python -m benchmarks.coverage.third_party")
    head["versions"] |= versions()
    lines = [f"  {json.dumps(key)}: {json.dumps(records[key])}" for key in MODELS if key in records]
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    temporary = OUTPUT.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join([*parts, ' "records": {\n' + ",\n".join(lines) + "\n }"]) + "\n}\n")
    temporary.replace(OUTPUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=400, help="time limit for a model")
    parser.add_argument("--memory", type=float, default=8, help="GiB that a process may allocate")
    parser.add_argument("--only", default="", help="patterns of names, separated by commas")
    parser.add_argument("--failed", action="store_true", help="check again what has failed")
    parser.add_argument("--again", action="store_true", help="check again what is in the report already")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    records = json.loads(OUTPUT.read_text())["records"] if OUTPUT.is_file() else {}
    for key in chosen(records, arguments):
        records[key] = {**in_a_process(key, arguments.seconds, arguments.memory), "commit": provenance("")["commit"]}
        write(records)
        text = "; ".join(f"{c}: {e}" for c, e in failures(records[key]).items()) or "all well"
        print(f"{key}, {records[key].get('seconds', 0):.0f} s: {text}", file=sys.stderr, flush=True)
    coverage.main(RESULTS / "coverage.json")


if __name__ == "__main__":
    main()
