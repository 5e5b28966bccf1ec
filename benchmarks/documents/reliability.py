"""python -m benchmarks.documents.reliability: writes docs/reliability.md from benchmarks/results/chaos.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "reliability.md"
PROSE = """\
# What a run survives

`cbn finetune` saves a checkpoint after the warm-up of the statistics, at every evaluation (by default after each epoch),
every `--save-every` updates, and when it is told to stop. `cbn finetune DATA --resume RUN` goes on from the newest one, with
the settings of the run; only `--workers` and `--device` may be others. The weights that the run started from are not needed
any more.

## Checkpoints

    RUN/checkpoints/step-00000120/training.pt    model, optimizer, schedule, EMA, loss scale, best result so far
                                  rank-0.pt, ..  of each process: CBN history, statistics, random states
                                  manifest.json  size and SHA-256 of each

A checkpoint is written into a temporary folder, flushed to the disk (fsync) and renamed, so that it is there as a whole or
not at all. Only then are the oldest deleted, so that `--keep` of them (2) are left. `best/` and the exports are written in
the same way. Temporary files that a killed run has left are deleted by the next one. No code is run when a
checkpoint is read (`weights_only=True`), and nothing is read that does not fit the manifest. Of several
processes each writes and reads its own file, so all must see the folder; the first one chooses where to go on.

## What happens when

| | what the run does | then |
|---|---|---|
| Ctrl-C (SIGINT), SIGTERM | finishes the step, gives up an evaluation (one of several processes is finished), saves a checkpoint; ends with code 130 or 143 | `--resume` loses nothing |
| the second of them | ends at once, with code 130 | as SIGKILL |
| SIGKILL, power failure | | `--resume` goes on from the newest checkpoint |
| any of them before the first checkpoint | | `--resume` begins anew; without a `config.json` there, give the first command again |
| a damaged checkpoint | `--resume` renames it to `damaged-step-..`, warns, and takes the one before | |
| all of them damaged | one sentence, code 1 | `--overwrite` begins anew |
| a checkpoint cannot be read (a disk error, permissions, too little memory), or only by another version of torch | one sentence, code 1; nothing is renamed | `--resume` when that is mended |
| the disk is full | one sentence, code 1; the temporary folder is deleted, earlier checkpoints are whole | `--resume` after making room |
| a loading process dies | one sentence, code 1 | `--resume`, with fewer `--workers` if it was for want of memory |
| a loss or gradient is not finite | that update is never made; one sentence with the layer that it comes from, code 1 | a new run with a lower `--lr`: a resumed one would come to the same |
| the same, with `--on-nan skip` | goes on with the next update; the log counts those left out | |
| no evaluation gives a finite loss | one sentence, code 1; nothing is exported | a new run with a lower `--lr` |
| an unreadable image | one sentence with its path, code 1 | repair or remove it |
| the same, with `--skip-bad-images` | training takes the next image, an evaluation does not count it; it is listed at the end | |
| two processes for one run folder | the second one is refused | |
| an output folder among the images | refused before anything is written | |

On a GPU, which is not waited for in every step, gradients are looked at every 20 updates and before every checkpoint: none
is saved after one that was not finite.

Exit codes: 0 done; 1 an error, in one line on standard error that begins with `error: `; 2 wrong arguments; 130 and 143
stopped by SIGINT and SIGTERM. A signal while Python is still starting ends the command as it ends any program.

## The same bits

On a CPU a run that was interrupted, wherever and however often, ends in the same weights, optimizer state and log as one
that was not, to the bit; so does one with another number of `--workers`. Every random change of an image follows from the
seed, the epoch and the image's place in it. Not promised:

- **on a GPU**: the run goes on from the same state, but CUDA's kernels may add up in another order;
- **another number of processes** (GPUs): it goes on with a warning, and its steps see other numbers of images;
- another number of threads, processor, or version of torch or timm;
- times in the log, and the bytes of `model.safetensors`, whose header has its entries in any order; its tensors are the
  same.

The number of images and the names of the classes must be those that the run was started with, and are compared; the
images themselves are not.
"""  # noqa: E501  (rows of a table)


def table(head: tuple[str, ...], groups: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each kind, and one for all."""
    rows = ["| " + " | ".join((*head, "cases", "as they must be", "exit codes: how often", "s")) + " |"]
    rows.append("|---" * (len(head) + 4) + "|")
    for name, group in groups.items():
        codes = ", ".join(f"{code}: {count}" for code, count in group["codes"].items())
        rows.append(f"| {name} | {group['runs']} | {group['ok']} | {codes} | {group['seconds']:.0f} |")
    runs, ok, seconds = (sum(group[key] for group in groups.values()) for key in ("runs", "ok", "seconds"))
    rows.append(f"| **all** | {runs} | {ok} | | {seconds:.0f} |")
    return "\n".join(rows)


def document(report: dict[str, Any]) -> str:
    versions = report["versions"]
    failures = "\n".join(f"- {failure['reason']}" for failure in report["failures"]) or "None."
    return f"""\
{PROSE}
## Tried

`{report["command"]}`, [JSON](../benchmarks/results/chaos.json), {report["date"]}; {report["machine"]}, Python
{versions["python"]}, torch {versions["torch"]}, timm {versions["timm"]}; commit {report["commit"][:10]}. Written by
`python -m benchmarks.documents.reliability`.

**Kills** ([kills.py](../benchmarks/robustness/kills.py)).
A run of three epochs on a small network gets a signal at a random
moment between its start and the time that it takes, up to three times in a row, with no or one loading process by
turns, and is resumed. Then the last checkpoint (weights, optimizer, EMA, random states, ..), the best weights and the
log must be those of an undisturbed run, to the bit; no temporary file may be left; plain timm must load `best/`. Codes
below zero: ended by that signal; without a code, the run was done before the signal came.

{table(("signal, to",), report["kills"])}

{table(("settings of the run",), report["settings"])}

**Damage** ([fuzz.py](../benchmarks/robustness/fuzz.py)).
One file is damaged and a command is run that reads it. It must end in
time with code 0, 1 or 2; with code 1, in one foreseen sentence; without a traceback; and all that it only reads must be
as before. A run resumed with a damaged checkpoint must end as the undisturbed one. With code 0 the damage did not
matter, was worked around (an older checkpoint, `--skip-bad-images`) or cannot be told, such as another bit in a weight.

{table(("file",), report["targets"])}

{table(("damage",), report["damages"])}

## What fails

{failures}
"""


def main(path: Path) -> None:
    DOCUMENT.write_text(document(json.loads(path.read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "chaos.json")
