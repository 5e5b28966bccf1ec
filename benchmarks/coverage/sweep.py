"""Every timm architecture with BatchNorm through the checks of tests/helpers/promises.py.

    python -m benchmarks.coverage.sweep [--jobs 2] [--only 'resnet*'] [--failed | --again] [--onnx]

Writes benchmarks/results/coverage.json after every batch of architectures; those that are in it are not checked again
without --only, --failed or --again. A batch runs in a process of its own, with a limit on its memory and on the time
that one architecture may take; where it is killed the check that it was at has failed, and a new process goes on.
`python -m benchmarks.documents.coverage` writes docs/coverage.md from the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.provenance import RESULTS, ROOT, provenance

sys.path[:0] = [str(ROOT / "tests")]

from helpers.promises import EXTRA, blank, failures, run_promises  # noqa: E402
from helpers.subject import example_size  # noqa: E402

OUTPUT = RESULTS / "coverage.json"
# the package beside this script, and one thread for each process
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
}  # fmt: skip
# small ones of many families, for the exporter to ONNX, which takes half a minute for each
ONNX = (
    "resnet18", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_b0", "regnety_002", "densenet121", "mixnet_s",
    "repvgg_a0", "ghostnet_050", "dla46_c", "hardcorenas_a", "levit_128s", "efficientvit_m0", "inception_next_atto",
    "starnet_s050", "fastvit_t8",
)  # fmt: skip


def with_batch_norm() -> list[str]:
    """Every architecture of timm that builds a BatchNorm by default; about three minutes."""
    print("looking for architectures with BatchNorm", file=sys.stderr, flush=True)
    found = []
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        if any(isinstance(m, _BatchNorm) for m in model.modules()):
            found.append(name)
    return found


def read(path: Path) -> dict[str, Any]:
    """The report so far; the list of architectures is that of the installed timm."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if report.get("versions", {}).get("timm") != timm.__version__:
        report["architectures"] = with_batch_norm()
    return {"records": {}, "onnx": {}, **report}


def write(path: Path, report: dict[str, Any], command: str) -> None:
    """Replaces the file at once, so that it can be read, or this be killed, at any time; one line for a record."""
    head = {**provenance(command), "date": datetime.now(timezone.utc).date().isoformat()}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts.append(f' "architectures": {json.dumps(report["architectures"])}')
    for key in ("records", "onnx"):
        lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(report[key].items())]
        parts.append(f' "{key}": {{\n' + ",\n".join(lines) + "\n }")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(path)


def chosen(report: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The architectures to check now."""
    done = report["onnx" if arguments.onnx else "records"]
    names = list(ONNX) if arguments.onnx else report["architectures"]
    if arguments.only:
        return [n for n in names if any(fnmatchcase(n, pattern) for pattern in arguments.only.split(","))]
    if arguments.failed:
        return [n for n in names if n in done and failures(done[n])]
    return names if arguments.again else [n for n in names if n not in done]


def work(names: Iterable[str], onnx: bool, seconds: int, gigabytes: float) -> None:
    """What a process of its own does: checks the architectures in turn and prints a line of JSON before every check.

    The alarm ends the process, whatever it is at; too much memory is an error of the check that asks for it.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    for name in names:
        signal.alarm(seconds)
        record = run_promises(name, *example_size(name), only=EXTRA if onnx else None, watch=say)
        signal.alarm(0)
        say(record)
        gc.collect()


def say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def batch(names: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Checks the architectures in a process of their own, and in another one what a killed one has left."""
    options = ["--seconds", str(arguments.seconds), "--memory", str(arguments.memory)]
    options += ["--onnx"] if arguments.onnx else []
    records: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in records]:
        command = [sys.executable, "-m", "benchmarks.coverage.sweep", *options, "--worker", *left]
        began, last = time.monotonic(), None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"architecture"'):
                    last = json.loads(line)
                    if "running" not in last:
                        records[last["architecture"]] = last
                        began = time.monotonic()
        if last is None and process.returncode >= 0:
            raise RuntimeError(f"the process that was to check {left[0]} has not begun, status {process.returncode}")
        if name := next((name for name in left if name not in records), None):
            record = last if last and last["architecture"] == name else blank(name, *example_size(name))
            records[name] = ended(record, process.returncode, time.monotonic() - began, arguments.seconds)
    return records


def ended(record: dict[str, Any], status: int, seconds: float, limit: int) -> dict[str, Any]:
    """The record of an architecture whose process is gone: the check that was under way has failed."""
    if status == -signal.SIGALRM:
        error = f"time limit of {limit} s"
    else:
        error = f"killed by {signal.Signals(-status).name}" if status < 0 else f"the process ended with status {status}"
    check = record.pop("running", "build")
    record["checks"][check] = {"ok": False, "value": None, "error": error}
    return {**record, "seconds": round(seconds, 2)}


def describe(records: dict[str, dict[str, Any]], done: int, total: int, seconds: float) -> str:
    """A line for a batch, and one for each failure."""
    names = list(records)
    lines = [f"[{done}/{total}] {names[0]} to {names[-1]}: {len(names)} in {seconds:.0f} s"]
    lines += [f"  {name}, {c}: {e}" for name, record in records.items() for c, e in failures(record).items()]
    return "\n".join(lines)


def sweep(names: list[str], report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Batch after batch, `jobs` of them at a time; the report is written after each."""
    batches = [names[i : i + arguments.batch] for i in range(0, len(names), arguments.batch)]
    began, done = time.monotonic(), 0
    command = "python -m benchmarks.coverage.sweep" + (" --onnx" if arguments.onnx else "")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(batch, own, arguments) for own in batches]):
            records = future.result()
            done += len(records)
            commit = provenance(command)["commit"]
            for name, record in records.items():
                report["onnx" if arguments.onnx else "records"][name] = {**record, "commit": commit}
            write(arguments.output, report, command)
            print(describe(records, done, len(names), time.monotonic() - began), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--batch", type=int, default=10, help="architectures for a process")
    parser.add_argument("--seconds", type=int, default=600, help="time limit for an architecture")
    parser.add_argument("--memory", type=float, default=10, help="GiB that a process may allocate")
    parser.add_argument("--only", default="", help="patterns of names, separated by commas")
    parser.add_argument("--failed", action="store_true", help="check again what has failed")
    parser.add_argument("--again", action="store_true", help="check again what is in the report already")
    parser.add_argument("--onnx", action="store_true", help="the export to ONNX of a few small architectures instead")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.onnx, arguments.seconds, arguments.memory)
    torch.set_num_threads(1)  # what the machine is said to compute with
    report = read(arguments.output)
    write(arguments.output, report, "python -m benchmarks.coverage.sweep")  # the list alone takes minutes
    sweep(chosen(report, arguments), report, arguments)


if __name__ == "__main__":
    main()
