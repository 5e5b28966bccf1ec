"""The whole command on a small grid of real runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cbn_convert.cli.compare import _next_step
from helpers.commands import cbn as command
from helpers.images import write_colors
from helpers.waiting import wait_until

import cbn_convert as cbn
from cbn_convert.comparison import workers
from cbn_convert.comparison.config import ComparisonConfig
from cbn_convert.comparison.estimate import estimated
from cbn_convert.comparison.plan import Cell
from cbn_convert.comparison.running import ComparisonInterrupted, check, compare
from cbn_convert.comparison.store import read_comparison
from cbn_convert.comparison.summary import Comparison
from cbn_convert.errors import CbnWarning, DataError, RunError

pytestmark = pytest.mark.xdist_group("compare")  # one process makes what most of these tests start from

COMMAND = [sys.executable, "-m", "cbn_convert.cli", "compare"]
SMALL = [
    "-m", "test_resnet", "--no-pretrained", "--img-size", "32", "--no-aug", "--device", "cpu", "--workers", "0",
    "--window", "4", "--norms", "bn,cbn", "--batch-sizes", "2,4", "--seeds", "1", "--lrs", "0.01", "--epochs", "1",
]  # fmt: skip
MEASURED = ("step_seconds", "train_seconds", "seconds")  # that no two runs have in common


def small(colors: Path, output: Path, **changes: Any) -> ComparisonConfig:
    run = cbn.FinetuneConfig(
        data=str(colors), model="test_resnet", output=str(output), pretrained=False, img_size=32, no_aug=True,
        device="cpu", workers=0, window=4, epochs=1,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "norms": ("bn", "cbn"), "batch_sizes": (2,), "seeds": 1, "lrs": (0.01,), "reference": 0, **changes
    }  # fmt: skip
    return ComparisonConfig(settings.pop("run", run), **settings)


def outcomes(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The cells without what a clock has measured."""
    cells = read_comparison(folder)[2]
    return {cell: {k: v for k, v in result.items() if k not in MEASURED} for cell, result in cells.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data with a test split, and the comparison of two norms at two batch sizes."""
    folder = tmp_path_factory.mktemp("compare")
    write_colors(folder / "colors")
    shutil.copytree(folder / "colors" / "val", folder / "colors" / "test")
    done = subprocess.run(
        [*COMMAND, str(folder / "colors"), *SMALL, "--reference", "8", "-o", str(folder / "out"), "--json"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "colors", folder / "out"


def test_a_grid_of_two_by_two(finished: tuple[Path, Path]) -> None:
    _, out = finished
    cells = outcomes(out)
    assert {cell[:2] for cell in cells} == {("bn", 2), ("bn", 4), ("cbn", 2), ("cbn", 4), ("bn", 8)}
    assert {cell[:2]: result["steps"] for cell, result in cells.items()} == {
        ("bn", 2): 16, ("cbn", 2): 16, ("bn", 4): 8, ("cbn", 4): 8, ("bn", 8): 4
    }  # fmt: skip
    for result in cells.values():
        assert result["test_top1"] == pytest.approx(result["top1"])  # the same images here
    names = {path.name for path in out.iterdir()}
    plots = {f"{name}.{end}" for name in ("accuracy", "rates_batch2", "loss_batch4") for end in ("png", "svg")}
    assert {"results.json", "table.md", "table.csv", "report.html", "cells", "log.txt", *plots} <= names
    assert (out / "log.txt").read_text() == ""
    for folder in (out / "cells").iterdir():  # what takes space is gone
        assert {"config.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
        assert not {"best", "checkpoints"} & {path.name for path in folder.iterdir()}
    answer = json.loads((out.parent / "stdout").read_text().splitlines()[-1])
    assert (answer["split"], answer["cells"], len(answer["rows"])) == ("test", 5, 5)


def test_a_cell_is_what_finetune_gives(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = finished
    config = small(data, tmp_path).cell("cbn", 4, 0.01, 0)
    config.output = str(tmp_path / "run")
    result = cbn.finetune(config, quiet=True)
    own = outcomes(out)[Cell("cbn", 4, 0.01, 0)]
    assert (own["top1"], own["last_top1"], own["steps"]) == (result.best_top1, result.last_top1, result.steps)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_and_resumed_is_the_same(
    finished: tuple[Path, Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    data, expected = finished
    out = tmp_path / "out"
    call = [*COMMAND, str(data), *SMALL, "--batch-sizes", "2", "--reference", "8", "-o", str(out)]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(out.glob("cells/*/checkpoints/step-*")))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}; go on with cbn compare {data} --resume {out}" in err
    wait_for_the_lock(out)
    done = set(outcomes(out))
    (interrupted,) = (path for path in (out / "cells").iterdir() if path.name not in {cell.name for cell in done})
    begun = (interrupted / "config.json").stat().st_mtime_ns
    resumed = subprocess.run(
        [*COMMAND, str(data), "--resume", str(out), "-q"], capture_output=True, text=True, timeout=280, check=False
    )
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert (interrupted / "config.json").stat().st_mtime_ns == begun  # it went on, and did not start again
    assert outcomes(out) == {cell: result for cell, result in outcomes(expected).items() if cell.batch_size != 4}
    rows = [(folder / "table.csv").read_text().splitlines() for folder in (out, expected)]
    same = [line for line in rows[1] if line.split(",")[1] != "4"]
    assert [line.split(",")[:6] for line in rows[0]] == [line.split(",")[:6] for line in same]


def wait_for_the_lock(out: Path) -> None:
    """After kill -9 of the parent the process of the run at hand saves it, which takes a moment."""
    from cbn_convert.training.setup import owned

    for folder in (out / "cells").iterdir():
        for _ in range(200):
            try:
                with owned(folder):
                    break
            except RunError:
                time.sleep(0.1)


def test_more_norms_and_seeds_later(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    config, _, before = read_comparison(tmp_path / "out")
    config.norms, config.batch_sizes, config.seeds = ("bn", "cbn", "cbn:none"), (4,), 2
    result = compare(config, resume=True, quiet=True)
    after = read_comparison(tmp_path / "out")[2]
    assert {cell: after[cell] for cell in before} == before  # also those that are no longer asked for
    assert {cell for cell in after if cell not in before} == {
        Cell("bn", 4, 0.01, 1), Cell("cbn", 4, 0.01, 1), Cell("cbn:none", 4, 0.01, 0), Cell("cbn:none", 4, 0.01, 1),
        Cell("bn", 8, 0.01, 1),
    }  # fmt: skip
    assert [(row.norm, row.batch_size, row.seeds) for row in result.rows] == [
        ("bn", 4, 2), ("cbn", 4, 2), ("cbn:none", 4, 2), ("bn", 8, 2)
    ]  # fmt: skip


def test_two_jobs_give_the_same(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = finished
    config, _, _ = read_comparison(out)
    config.run.output, config.jobs = str(tmp_path / "out"), 2
    compare(config, quiet=True)
    assert outcomes(tmp_path / "out") == outcomes(out)


def test_a_budget_in_images(colors: Path, tmp_path: Path) -> None:
    compare(small(colors, tmp_path / "out", images=50, batch_sizes=(4, 2)), quiet=True)
    assert {cell.batch_size: result["steps"] for cell, result in outcomes(tmp_path / "out").items()} == {4: 12, 2: 25}
    config, _, _ = read_comparison(tmp_path / "out")
    config.images = 60
    with pytest.raises(RunError, match="has images 50, not 60; leave it out, or start another one"):
        compare(config, resume=True, quiet=True)


def test_one_value_per_channel_is_a_result(colors: Path, tmp_path: Path) -> None:
    """test_resnet ends with one pixel at 32 px, of which one image has no variance."""
    result = compare(small(colors, tmp_path / "out", norms=("bn",), batch_sizes=(1,)), quiet=True)
    assert result.rows[0].failure.startswith(
        "a batch has one value per channel, of which there are no statistics; use "
    )


@pytest.mark.parametrize(
    ("on_nan", "said"), [("stop", "the loss is no longer finite"), ("skip", "no evaluation gave a finite loss")]
)
def test_what_diverges_is_a_result(on_nan: str, said: str, colors: Path, tmp_path: Path) -> None:
    config = small(colors, tmp_path / "out", norms=("cbn",), lrs=(1e30, 0.01))
    config.run.on_nan = on_nan
    result = compare(config, quiet=True)
    assert (result.rows[0].lr, result.rows[0].seeds) == (0.01, 1)
    assert said in outcomes(tmp_path / "out")[Cell("cbn", 2, 1e30, 0)]["error"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_folders_that_are_no_place_for_it(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = finished
    with pytest.raises(RunError, match="is not empty; choose another output folder or pass --overwrite"):
        compare(small(data, out), quiet=True)
    with pytest.raises(RunError, match=r"is no comparison: it has no results.json"):
        compare(small(data, tmp_path), resume=True, quiet=True)
    with pytest.raises(RunError, match=r"nowhere does not exist; leave --resume out"):
        compare(small(data, tmp_path / "nowhere"), resume=True, quiet=True)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "mine").write_text("dear")
    with pytest.raises(RunError, match=r"is no comparison"):
        compare(small(data, tmp_path), overwrite=True, quiet=True)
    assert (tmp_path / "cells" / "mine").read_text() == "dear"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"holds metrics.jsonl, which is not of a comparison"):
        compare(small(data, tmp_path / "run"), overwrite=True, quiet=True)
    longer = small(data, out)
    longer.run.epochs = 10
    with pytest.raises(RunError, match="has epochs 1, not 10; leave it out, or start another"):
        compare(longer, resume=True, quiet=True)
    with pytest.raises(DataError, match="lies among the images of"):
        compare(small(data, data / "train" / "out"), quiet=True)
    with pytest.raises(DataError, match="lies among the images of"):
        cbn.finetune(small(data / "train", data / "train" / "out").cell("bn", 2, 0.1, 0), quiet=True)
    assert not (data / "train" / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.clear(), "no 'config'"),
        (lambda r: r["config"].update(norms=["bm"]), "norm must be one of"),
        (lambda r: r["config"].update(batch_sizes=["2"]), "batch sizes must be whole numbers"),
        (lambda r: r["config"].pop("run"), "its settings do not fit this version"),
        (lambda r: r["cells"][0].pop("top1"), "no 'top1'"),
        (lambda r: r["cells"][0].update(top1=None), "must be real number"),
        (lambda r: r["cells"][0].update(step_seconds=float("nan")), "a run without numbers"),
        (lambda r: r["cells"][0].update(lr="high"), "could not convert"),
        (lambda r: r.update(cells=3), "not iterable"),
        (lambda r: r.update(images=None), "not iterable"),
    ],
)
def test_results_that_are_none(finished: tuple[Path, Path], tmp_path: Path, change: Any, reason: str) -> None:
    _, out = finished
    stored = json.loads((out / "results.json").read_text())
    change(stored)
    (tmp_path / "results.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match=r"results.json is not that of a comparison \(.*\); choose another") as caught:
        read_comparison(tmp_path)
    assert reason in str(caught.value)
    (tmp_path / "results.json").write_text(json.dumps(stored)[:-2])
    with pytest.raises(RunError, match=r"results.json is not valid JSON .*; the file is damaged"):
        read_comparison(tmp_path)


def test_other_images_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = finished
    shutil.copytree(data, tmp_path / "data")
    config, _, _ = read_comparison(out)
    config.run.data = str(tmp_path / "data")
    check(config, resume=True, overwrite=False)  # the same images at another place
    next((tmp_path / "data" / "test" / "red").iterdir()).unlink()
    with pytest.raises(RunError, match="has other images than the comparison in"):
        check(config, resume=True, overwrite=False)
    (tmp_path / "data" / "test" / "red").rename(tmp_path / "data" / "test" / "green")
    with pytest.raises(DataError, match="has the class 'green'"):  # before anything is trained
        check(config, resume=True, overwrite=False)


def test_an_error_of_a_run_ends_it_with_one_sentence(colors: Path, tmp_path: Path) -> None:
    config = small(colors, tmp_path / "out")
    config.run.model = "test_resnot"
    with pytest.raises(RunError, match=r"^bn_b2_lr0.01_s0: .*test_resnot"):
        compare(config, quiet=True)
    assert not (tmp_path / "out").exists()  # the corrected command needs no --overwrite


def test_a_process_that_dies(colors: Path, tmp_path: Path) -> None:
    """The processes that load its images must not keep the comparison waiting, nor live on."""
    call = [*COMMAND, str(colors), *SMALL, "--workers", "2", "--epochs", "500", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "out").glob("cells/*/curves.png")))  # it has evaluated
    (worker,) = children(process.pid)
    own = children(worker)
    assert len(own) >= 2
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: the process that ran bn_b2_lr0.01_s0 has ended (exit code -9), perhaps for want of memory" in err
    assert not any(Path(f"/proc/{pid}").exists() and "(zombie)" not in status(pid) for pid in own)


def test_a_process_that_does_not_stop_is_killed(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(colors, tmp_path / "out")
    config.run.epochs = 500
    started: list[Any] = []
    start = workers.Workers.start

    def stopping(self: Any, cell: Cell, *arguments: Any) -> None:
        start(self, cell, *arguments)
        started.append(self.running[cell])
        os.kill(started[0].pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workers.Workers, "start", stopping)
    monkeypatch.setattr(workers, "LONGEST_STOP", 0.5)
    with pytest.raises(ComparisonInterrupted, match=r"stopped by SIGINT; go on with cbn compare .* --resume"):
        compare(config, quiet=True)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status(pid: int) -> str:
    """What Linux says of a process."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "(zombie)"


def test_another_package_in_the_current_folder(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = finished
    (tmp_path / "cbn_convert").mkdir()
    for name in ("cbn_convert/__init__.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    program = "import sys; sys.path.pop(0); from cbn_convert.cli.main import run; run()"  # as the console script does
    done = subprocess.run(
        [sys.executable, "-c", program, "compare", str(data), *SMALL, "--norms", "bn", "--batch-sizes",
         "4", "--reference", "0", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_dry_run_writes_nothing(colors: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(colors), *SMALL, "-o", str(tmp_path / "out"), "--dry-run", "--json"],
        capture_output=True, text=True, timeout=280, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert len(json.loads(done.stdout.splitlines()[-1])["cells"]) == 5
    assert re.search(r"5 runs at least, of 32 images each: about \d+ (s|min) at the pace of BN", done.stderr)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        check(small(tmp_path / "nowhere", tmp_path / "out"), resume=False, overwrite=False)


def test_test_images_that_serve_for_validation_are_no_test(tmp_path: Path) -> None:
    colors = write_colors(tmp_path / "colors")
    (colors / "val").rename(colors / "test")
    with pytest.warns(CbnWarning, match="test/ serves for validation, and is no test any more"):
        images = check(small(colors, tmp_path / "out"), resume=False, overwrite=False)
    assert not images.tested
    assert images.counts == {"classes": ["blue", "red"], "train": [16, 16], "val": [6, 6]}
    config = small(colors, tmp_path / "out")
    config.run.val_fraction = 0.25
    images = check(config, resume=False, overwrite=False)
    assert images.tested
    assert images.counts == {"classes": ["blue", "red"], "train": [12, 12], "val": [4, 4], "test": [6, 6]}


def test_it_ends_with_a_command_that_trains_with_the_best_settings(finished: tuple[Path, Path]) -> None:
    data, out = finished
    config, _, results = read_comparison(out)
    config.run.data = str(data)
    comparison = Comparison.of(config, results)
    best = max((cell for cell in results if cell.batch_size in config.batch_sizes), key=lambda c: results[c]["top1"])
    words = shlex.split(_next_step(config, comparison).splitlines()[1])
    assert words[:3] == ["cbn", "finetune", str(data)]
    code, said, _ = command(*words[1:], "--dry-run", "--device", "cpu", "--json")
    assert code == 0
    planned = json.loads(said.splitlines()[-1])
    assert (planned["norm"], planned["lr"]) == (best.norm, best.lr)


def test_what_cannot_be_estimated_says_why(colors: Path, tmp_path: Path) -> None:
    config = small(colors, tmp_path / "out")
    config.run.model = "no_such_model"
    assert re.search(r"2 runs at least.*not known: timm knows no model 'no_such_model'", estimated(config, {}, 32))


def test_an_interrupted_estimate_leaves_nothing(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(small(colors, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
