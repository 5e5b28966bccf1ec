"""What is promised for every timm architecture with BatchNorm, checked on one architecture at a time.

`tests/conversion/test_matrix.py` checks a small one of every kind, `benchmarks/coverage/sweep.py` all of them.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models._registry import _model_to_module
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import cbn_convert as cbn
from cbn_convert.norm import CrossIterationMixin
from helpers.subject import (
    F32,
    F64,
    Subject,
    assert_identical,
    assert_same_state,
    build,
    difference,
    example_size,
    images,
    outputs,
    prepared,
    size_m,
)

# Millions of parameters; larger ones are built and converted on the meta device only, for want of time and memory.
LARGEST_M = 150
# Larger ones are spared the checks that smaller ones of their families pass in the same code.
LARGE_M, SPARED = 50, ("copies", "fold_affine", "fold_conv_f64")
_PATH = re.compile(r"\w+(?:[.]\w+)+")  # a module's name in a reason


def assert_finite(model: nn.Module, what: str) -> None:
    for name, t in model.state_dict().items():
        # the sum tells at a tenth of the time, unless it overflows
        finite = not t.is_floating_point() or bool(torch.isfinite(t.sum()) or torch.isfinite(t).all())
        assert finite, f"{what}: {name} is not finite"


def check_convert(s: Subject) -> None:
    """One row per norm layer, whose counts add up; what feeds it exists; what is kept could not be converted."""
    s.report = cbn.convert(s.model, example_input=s.example)
    rows = {row.name: row for row in s.report}
    assert list(rows) == s.norms, "the report's rows are not the norm layers of the model"
    counted = Counter(row.status for row in s.report)
    assert s.report.counts == {k: counted[k] for k in ("compensated", "window", "kept")}, "the counts are not the rows'"
    modules = dict(s.model.named_modules())
    for row in s.report:
        feeders = row.fed_by.split(", ") if row.fed_by else []
        assert all(f in modules for f in feeders), f"{row.name}: fed by {row.fed_by}, which is no module"
        assert feeders or row.status != "compensated", f"{row.name}: compensated, but nothing feeds it"
        assert row.reason, f"{row.name}: {row.status} without a reason"
        kept = row.status == "kept"
        assert isinstance(modules[row.name], CrossIterationMixin) != kept, f"{row.name}: {row.status}, but it is not"
        assert not kept or s.calls[row.name] != 1, f"{row.name}: kept, though it runs once per pass: {row.reason}"


def check_eval(s: Subject) -> None:
    """A conversion changes neither outputs in eval mode nor the state_dict."""
    assert_identical(outputs(s.model, s.x), s.expected, "converted")
    assert_same_state(s.model, s.before)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    leaves = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([_loss(t) for t in leaves]).sum()


def _loss(output: Tensor) -> Tensor:
    if output.dim() == 2:
        return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1])
    return output.square().mean()


def check_train(s: Subject) -> float:
    """Three steps of SGD on a deepcopy: loss and parameters stay finite, every converted layer remembers; the loss."""
    model = copy.deepcopy(s.model).train()
    own = {id(m) for m in model.modules()}
    converted = {name: m for name, m in model.named_modules() if isinstance(m, CrossIterationMixin)}
    for name, norm in converted.items():
        assert all(id(m) in own for m in norm.producers), f"{name}: bound to a module of the model it is a copy of"
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for step in range(3):
        torch.manual_seed(step)
        loss = loss_of(model, images(s.x.shape[-1], seed=step + 2))
        assert torch.isfinite(loss), f"the loss of step {step} is not finite"
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert_finite(model, "trained")
    for row in s.report:
        if row.status != "kept":
            assert converted[row.name].history_tensors(), f"{row.name}: {row.status}, but it remembers nothing"
    return loss.item()


def check_copies(s: Subject) -> None:
    """deepcopy and pickle give the same outputs."""
    assert_identical(outputs(copy.deepcopy(s.model), s.x), s.expected, "deepcopy")
    assert_identical(outputs(pickle.loads(pickle.dumps(s.model)), s.x), s.expected, "pickle")


def check_fold_bn(s: Subject) -> None:
    """Plain BatchNorm with the running statistics, the same bits."""
    folded = cbn.fold(s.model, "bn", example_input=s.example)
    assert not has_cross_iteration(folded), "folded into bn: a cross-iteration layer is left"
    assert_identical(outputs(folded, s.x), s.expected, "folded into bn")


def check_fold_affine(s: Subject) -> float:
    """A scale and shift in place of every norm layer."""
    folded = cbn.fold(s.model, "affine", example_input=s.example)
    assert not batch_norms(folded), "folded into affine: a BatchNorm is left"
    assert_finite(folded, "folded into affine")
    return difference(outputs(folded, s.x), s.expected, F32, "folded into affine")


def check_fold_conv_f64(s: Subject) -> float:
    """Bare in float64, where rounding cannot hide a mistake; with identities, in float32, it is what is exported."""
    model, x = copy.deepcopy(s.model).double(), s.example.double()
    expected = outputs(model, x)
    folded = cbn.fold(model, "conv", example_input=x)
    assert not has_cross_iteration(folded), "folded into convs: a cross-iteration layer is left"
    assert_finite(folded, "folded into convs")
    s.left_bn = len(batch_norms(folded))
    return difference(outputs(folded, x), expected, F64, "folded into convs")


def check_export(s: Subject) -> float:
    """Plain timm loads the folder, every key of it, and computes the same."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        arguments = {k: v for k, v in s.kwargs.items() if k != "num_classes"}
        cbn.export(s.model, folder, fold="conv", model_args=arguments)
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        if s.fetches:  # timm gets weights of the backbone from the hub as well, whoever loads the folder
            weights = str(folder / "model.safetensors")
            loaded = timm.create_model(s.model.pretrained_cfg["architecture"], checkpoint_path=weights, **s.kwargs)
        else:
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_finite(loaded.eval(), "exported")
    state = loaded.state_dict()
    assert set(state) == set(stored), "the file has other keys than timm's model"
    differing = [k for k, v in stored.items() if not torch.equal(v.nan_to_num(), state[k].nan_to_num())]
    assert not differing, f"timm did not load {differing[0]} as it is stored"
    return difference(outputs(loaded, s.x), s.expected, F32, "exported")


def check_reparam(s: Subject) -> float:
    """timm's own deployed form of the converted model and of both folded ones."""
    worst = 0.0
    for what, make in (
        ("converted", lambda: s.model),
        ("folded with identities", lambda: cbn.fold(s.model, "conv", keep_bn=True, example_input=s.example)),
        ("folded", lambda: cbn.fold(s.model, "conv", example_input=s.example)),
    ):
        what = f"{what}, then reparameterised"
        try:
            deployed = reparameterize_model(make())
        except Exception as error:
            raise AssertionError(f"{what}: {describe(error)}") from error
        assert not has_cross_iteration(deployed), f"{what}: a cross-iteration layer is left"
        worst = max(worst, difference(outputs(deployed, s.x), s.expected, F32, what))
    return worst


def check_revert(s: Subject) -> None:
    """The last check: after all that was done with the model it is, bit by bit, the one of before its conversion."""
    cbn.revert(s.model)
    assert {name: type(m) for name, m in s.model.named_modules()} == s.classes, "reverted: classes are others"
    assert_same_state(s.model, s.before)
    hooked = [n for n, m in s.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked, f"reverted: {hooked[0]} has a hook left"
    assert_identical(outputs(s.model, s.x), s.expected, "reverted")


def check_onnx(s: Subject) -> float:
    """onnxruntime computes the same from the exported file, whatever the size of the batch."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        arguments = {k: v for k, v in s.kwargs.items() if k != "num_classes"}
        cbn.export(s.model, folder, fold="conv", model_args=arguments, onnx=True)
        session = onnxruntime.InferenceSession(next(folder.glob("*.onnx")), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (2, 5):
        x = images(session.get_inputs()[0].shape[-1], count, seed=count)  # the size that the graph was exported for
        got = [torch.from_numpy(a) for a in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
        worst = max(worst, difference(got, outputs(s.model, x), F32, f"ONNX, batch {count}"))
    return worst


def has_cross_iteration(model: nn.Module) -> bool:
    return any(isinstance(m, CrossIterationMixin) for m in model.modules())


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


CHECKS: dict[str, Callable[[Subject], float | None]] = {
    "convert": check_convert,
    "eval": check_eval,
    "train": check_train,
    "copies": check_copies,
    "fold_bn": check_fold_bn,
    "fold_affine": check_fold_affine,
    "fold_conv_f64": check_fold_conv_f64,
    "export": check_export,
    "reparam": check_reparam,
    "revert": check_revert,
}
EXTRA: dict[str, Callable[[Subject], float | None]] = {"onnx": check_onnx}  # only where they are asked for


def describe(error: BaseException) -> str:
    """One line: the sentence of an assertion, or an exception with its type."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


def reasons(report: Iterable[Any]) -> dict[str, int]:
    """Why layers are not compensated, with counts; names of modules taken out."""
    counted: Counter[str] = Counter()
    for row in report:
        if row.status != "compensated":
            counted[f"{row.status}: {_PATH.sub('…', row.reason)}"] += 1
    return dict(counted)


def blank(name: str, kwargs: dict[str, Any], px: int) -> dict[str, Any]:
    """The record of an architecture of which nothing is known yet."""
    return {
        "architecture": name, "family": _model_to_module.get(name, "hand-built"), "px": px, "kwargs": kwargs,
        "params_m": None, "noise": 0.0, "norms": 0, "compensated": 0, "window": 0, "kept": 0, "left_bn": None,
        "reasons": {}, "checks": {},
    }  # fmt: skip


def run_promises(
    name: str,
    kwargs: dict[str, Any],
    px: int,
    only: Iterable[str] | None = None,
    watch: Callable[[dict[str, Any]], None] = lambda record: None,
    make: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Checks one architecture; returns a record for JSON.

    `only` names the checks to do, beside the conversion. `watch` sees the record before every check, with the check as
    "running", so that somebody knows where a process ended that does not come back. `make` builds a model that timm
    does not register.
    """
    began = time.monotonic()
    record = blank(name, kwargs, px)
    todo = {k: f for k, f in {**CHECKS, **EXTRA}.items() if k == "convert" or k in (CHECKS if only is None else only)}
    with _checked(record, "build", watch):
        record["params_m"] = round(size_m(name, kwargs), 2) if make is None else None
        large = (record["params_m"] or 0) > LARGEST_M
        if large:
            todo = {"meta": check_convert}
        elif (record["params_m"] or 0) > LARGE_M:
            todo = {check: function for check, function in todo.items() if check not in SPARED}
        device = "meta" if large else "cpu"
        model = build(name, kwargs, px, device) if make is None else prepared(make(), px)
        subject = Subject(model, images(px, device=device), kwargs)
        record["norms"], record["noise"] = len(subject.norms), subject.noise
    if record["checks"]["build"]["ok"]:
        if not subject.reparameterizes:
            todo.pop("reparam", None)
        for check, function in todo.items():
            with _checked(record, check, watch):
                record["checks"][check] = {"ok": True, "value": function(subject), "error": None}
            record["left_bn"] = subject.left_bn
            if check in ("convert", "meta") and subject.report:
                record |= {**subject.report.counts, "reasons": reasons(subject.report)}
    return {**record, "seconds": round(time.monotonic() - began, 2)}


@contextmanager
def _checked(record: dict[str, Any], check: str, watch: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Enters the check's result into the record, and goes on."""
    watch({**record, "running": check})
    record["checks"][check] = {"ok": True, "value": None, "error": None}
    try:
        yield
    except Exception as error:
        record["checks"][check] = {"ok": False, "value": None, "error": describe(error)}


def failures(record: dict[str, Any]) -> dict[str, str]:
    """The sentences of the checks that failed."""
    return {check: result["error"] for check, result in record["checks"].items() if not result["ok"]}


if __name__ == "__main__":
    import sys

    for architecture in sys.argv[1:]:
        print(json.dumps(run_promises(architecture, *example_size(architecture)), indent=1))
