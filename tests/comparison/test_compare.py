"""The whole command on a small grid of real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_colors

import cbn_convert as cbn
from cbn_convert.comparison import engine, workers
from cbn_convert.comparison.config import ComparisonConfig
from cbn_convert.comparison.engine import compare, read_comparison
from cbn_convert.comparison.plan import Cell
from cbn_convert.errors import RunError

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
    cells = read_comparison(folder)[1]
    return {cell: {k: v for k, v in result.items() if k not in MEASURED} for cell, result in cells.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data with a test split, and the comparison of two norms at two batch sizes."""
    folder = tmp_path_factory.mktemp("compare")
    write_colors(folder / "colors")
    shutil.copytree(folder / "colors" / "val", folder / "colors" / "test")
    done = subprocess.run(
        [*COMMAND, str(folder / "colors"), *SMALL, "--reference", "8", "-o", str(folder / "out"), "--json"],
        capture_output=True, text=True, check=False,
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
    call = [*COMMAND, str(data), *SMALL, "--reference", "8", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    cells = tmp_path / "out" / "cells"
    deadline = time.monotonic() + 120
    while not list(cells.glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}; go on with --resume {tmp_path / 'out'}" in err
    assert 0 <= len(outcomes(tmp_path / "out")) < 5
    wait_for_the_lock(tmp_path / "out")
    done = subprocess.run(
        [*COMMAND, str(data), "--resume", str(tmp_path / "out"), "-q"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert outcomes(tmp_path / "out") == outcomes(expected)
    rows = [(tmp_path / "out" / "table.csv").read_text(), (expected / "table.csv").read_text()]
    assert [line.split(",")[:6] for line in rows[0].splitlines()] == [
        line.split(",")[:6] for line in rows[1].splitlines()
    ]


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
    before = read_comparison(tmp_path / "out")[1]
    config, _ = read_comparison(tmp_path / "out")
    config.norms, config.batch_sizes, config.seeds = ("bn", "cbn", "cbn:none"), (4,), 2
    result = compare(config, resume=True, quiet=True)
    after = read_comparison(tmp_path / "out")[1]
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
    config, _ = read_comparison(out)
    config.run.output, config.jobs = str(tmp_path / "out"), 2
    compare(config, quiet=True)
    assert outcomes(tmp_path / "out") == outcomes(out)


def test_a_budget_in_images(colors: Path, tmp_path: Path) -> None:
    compare(small(colors, tmp_path / "out", images=50, batch_sizes=(4, 2)), quiet=True)
    assert {cell.batch_size: result["steps"] for cell, result in outcomes(tmp_path / "out").items()} == {4: 12, 2: 25}
    config, _ = read_comparison(tmp_path / "out")
    config.images = 60
    with pytest.raises(RunError, match="has images 50, not 60; leave it out, or start another one"):
        compare(config, resume=True, quiet=True)


def test_one_value_per_channel_is_a_result(colors: Path, tmp_path: Path) -> None:
    """test_resnet ends with one pixel at 32 px, of which one image has no variance."""
    result = compare(small(colors, tmp_path / "out", norms=("bn",), batch_sizes=(1,)), quiet=True)
    assert result.rows[0].failure == "a batch has one value per channel, of which there are no statistics"


def test_what_diverges_is_a_result(colors: Path, tmp_path: Path) -> None:
    result = compare(small(colors, tmp_path / "out", norms=("cbn",), lrs=(1e30, 0.01)), quiet=True)
    assert (result.rows[0].lr, result.rows[0].seeds) == (0.01, 1)
    assert "the loss is no longer finite" in outcomes(tmp_path / "out")[Cell("cbn", 2, 1e30, 0)]["error"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_folders_that_are_no_place_for_it(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = finished
    with pytest.raises(RunError, match="is not empty; choose another output folder or pass --overwrite"):
        compare(small(data, out), quiet=True)
    with pytest.raises(RunError, match=r"is no comparison: it has no results.json"):
        compare(small(data, tmp_path), resume=True, quiet=True)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "mine").write_text("dear")
    with pytest.raises(RunError, match=r"is no comparison"):
        compare(small(data, tmp_path), overwrite=True, quiet=True)
    assert (tmp_path / "cells" / "mine").read_text() == "dear"
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunError, match=r"results.json is not that of a comparison"):
        compare(small(data, tmp_path), resume=True, quiet=True)
    config = small(data, out, run=cbn.FinetuneConfig(data=str(data), model="test_resnet", output=str(out)))
    with pytest.raises(RunError, match=r"the comparison in .* has epochs 1, not 10; leave it out, or start another"):
        compare(config, resume=True, quiet=True)


def test_an_error_of_a_run_ends_it_with_one_sentence(colors: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(colors), *SMALL, "-m", "test_resnot", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "test_resnot" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_process_that_dies(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = workers.Workers.start

    def kill(self: Any, cell: Cell, settings: dict[str, Any]) -> None:
        start(self, cell, settings)
        self.running[cell].kill()

    monkeypatch.setattr(engine.Workers, "start", kill)
    with pytest.raises(RunError, match=r"the process that ran bn_b2_lr1.00e-02_s0 has ended \(exit code -9\)"):
        compare(small(colors, tmp_path / "out"), quiet=True)


def test_a_dry_run_writes_nothing(colors: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(colors), *SMALL, "-o", str(tmp_path / "out"), "--dry-run", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert len(json.loads(done.stdout.splitlines()[-1])["cells"]) == 5
    assert "5 runs at least" in done.stderr
    assert not (tmp_path / "out").exists()
