"""Runs that are killed, and files that are damaged: what `cbn` makes of them.

    python -m benchmarks.robustness.chaos [--kills 100] [--fuzz 500] [--seed 0] [--jobs 2] [--only kills,2 [--keep DIR]]

Kills: a run of `cbn finetune` ends by a signal at a random moment, up to three times in a row, is resumed, and must end
in the same bits as one that nobody has disturbed (kills.py). Fuzz: a file that a command reads is damaged;
the command must end with code 0, 1 or 2 and one sentence, and must not change what it only reads (fuzz.py).
A case depends on the seed and its number alone, but the moment of a kill also on how fast the machine is; --only runs
one again, of which --keep leaves the files.

The commands run in forks of this process, which has imported torch already; in every tenth case of the kills they start
as a user starts them. Writes benchmarks/results/chaos.json, of which `python -m benchmarks.documents.reliability` makes
docs/reliability.md. Ends with code 1 if a case has failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import RESULTS, provenance
from benchmarks.robustness.fuzz import DAMAGES, EDITS, FORMS, TARGETS, fuzz_case, make_base
from benchmarks.robustness.kills import KILLS, SETTINGS, kill_case, reference
from benchmarks.robustness.supervised import ENVIRONMENT, CheckError, Record, make_images

OUTPUT = RESULTS / "chaos.json"
Check = Callable[[Record, Path], None]


def preload() -> None:
    """Imports what the commands need, so that their forks have it; computes nothing with threads, which forks lose."""
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    import huggingface_hub.constants
    from matplotlib import pyplot  # noqa: F401

    import cbn_convert.training  # noqa: F401

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def planned_kill(number: int, seed: int) -> Record:
    weights = [kill.weight for kill in KILLS.values()]
    kind = random.Random(f"{seed} {number}").choices(list(KILLS), weights)[0]
    return Record("kills", number, kind, list(SETTINGS)[number % len(SETTINGS)])


def planned_damage(number: int, seed: int) -> Record:
    target = list(TARGETS)[number % len(TARGETS)]
    kinds = DAMAGES + EDITS * 3 if Path(target).suffix in FORMS else DAMAGES
    return Record("fuzz", number, random.Random(f"{seed} {number}").choice(kinds), target)


def tried(record: Record, check: Check, keep: Path | None = None) -> Record:
    """The record with what became of the case; whatever goes wrong is the reason of a failure."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{record.part}-{record.number}-", dir=keep))
    try:
        check(record, folder)
    except CheckError as failure:
        record.reason = " ".join(str(failure).split())[:400]
    except Exception as error:  # such as a checkpoint that cannot be read
        record.reason = f"the end cannot be looked at: {error!r}"[:400]
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    record.seconds = round(time.monotonic() - began, 2)
    return record


def checks(folder: Path, records: list[Record], seed: int) -> dict[str, Check]:
    """What to do with a case of each part; makes the undisturbed runs, and the files to damage, in `folder`."""
    found: dict[str, Check] = {}
    if names := {r.about for r in records if r.part == "kills"}:
        make_images(folder / "data", 18, 6)
        references = {name: reference(folder, name) for name in SETTINGS if name in names}
        first, done = next(iter(references.items()))
        starting = 0.0
        if any(r.part == "kills" and r.number % 10 == 9 for r in records):
            starting = max(reference(folder, first, real=True).seconds - done.seconds, 0)
        found["kills"] = partial(kill_case, seed=seed, references=references, starting=starting)
    if any(r.part == "fuzz" for r in records):
        found["fuzz"] = partial(fuzz_case, seed=seed, base=folder / "base", ended=make_base(folder / "base"))
    return found


def run_all(records: list[Record], seed: int, jobs: int, keep: Path | None = None) -> list[Record]:
    """Puts all cases to the test, `jobs` of them at a time, in processes that have no threads, since they fork."""
    done: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        what = checks(Path(name), records, seed)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            for future in as_completed([pool.submit(tried, r, what[r.part], keep) for r in records]):
                done.append(record := future.result())
                if record.reason or len(done) % 20 == 0:
                    print(f"[{len(done)}/{len(records)}] {describe(record)}", file=sys.stderr, flush=True)
    return sorted(done, key=lambda r: (r.part, r.number))


def describe(record: Record) -> str:
    outcome = f"FAILED: {record.reason}" if record.reason else "ok"
    return f"{record.part} {record.number}, {record.about}, {record.kind}: {outcome}"


def summary(records: list[Record], key: Callable[[Record], str]) -> dict[str, dict[str, Any]]:
    """Runs, successes, exit codes and seconds of each kind."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {
        name: {
            "runs": len(own),
            "ok": sum(not r.reason for r in own),
            "codes": {str(c): sum(r.codes.count(c) for r in own) for c in sorted({c for r in own for c in r.codes})},
            "seconds": round(sum(r.seconds for r in own), 1),
        }
        for name, own in sorted(groups.items())
    }


def report(records: list[Record], command: str) -> dict[str, Any]:
    kills, damages = ([r for r in records if r.part == part] for part in ("kills", "fuzz"))
    return {
        **provenance(command),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "kills": summary(kills, lambda r: r.kind),
        "settings": summary(kills, lambda r: r.about),
        "targets": summary(damages, lambda r: r.about),
        "damages": summary(damages, lambda r: r.kind),
        "failures": [{"case": f"{r.part},{r.number}", "reason": describe(r)} for r in records if r.reason],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="runs to kill")
    parser.add_argument("--fuzz", type=int, default=500, help="files to damage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time, of one thread each")
    parser.add_argument("--only", metavar="PART,NUMBER", help="this case alone; writes no report")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files of the cases there")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    preload()
    records = [planned_kill(i, arguments.seed) for i in range(arguments.kills)]
    records += [planned_damage(i, arguments.seed) for i in range(arguments.fuzz)]
    if arguments.only:
        part, number = arguments.only.split(",")
        records = [{"kills": planned_kill, "fuzz": planned_damage}[part](int(number), arguments.seed)]
    if arguments.keep:
        arguments.keep = arguments.keep.resolve()
        arguments.keep.mkdir(parents=True, exist_ok=True)
    records = run_all(records, arguments.seed, arguments.jobs, arguments.keep)
    failed = [record for record in records if record.reason]
    if not arguments.only:
        given = f"--kills {arguments.kills} --fuzz {arguments.fuzz} --seed {arguments.seed}"
        command = f"python -m benchmarks.robustness.chaos {given}"
        arguments.output.write_text(json.dumps(report(records, command), indent=1) + "\n")
    print(f"{len(records) - len(failed)} of {len(records)} cases ok", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
