"""Table, plots and page of made-up results; the page in a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.grids import RUN, finish, grid, peak
from PIL import Image

from cbn_convert.comparison.page import write_report
from cbn_convert.comparison.plan import Cell
from cbn_convert.comparison.summary import Comparison

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
VARIANT = "cbn:taylor:current:ring:window=8"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    config = grid(norms=("bn", "frozen", "gn", "cbn", VARIANT), batch_sizes=(1, 2), reference=32)
    height = {"bn": 20, "frozen": 5, "cbn": 1, "gn": 30, VARIANT: 10}

    def top1(cell: Cell) -> float | None:
        if cell.norm == "gn" and cell.batch_size == 1:
            return None
        return peak(1e-3)(cell) - height[cell.norm] / cell.batch_size

    results = finish(config, top1)
    for cell, result in results.items():
        result["loss_curve"] = [[20 * i, 2 * 0.9**i + cell.lr] for i in range(20)]
    return Comparison.of(config, results)


def test_the_table_holds_means_and_scatter(comparison: Comparison) -> None:
    rows = {(row.norm, row.batch_size): row for row in comparison.rows}
    for key, row in rows.items():
        own = [r["top1"] for c, r in comparison.results.items() if c[:2] == key and c.lr == row.lr and "top1" in r]
        if key == ("gn", 1):
            assert (row.top1, row.std, row.seeds, row.failed) == (None, None, 0, 8)
            continue
        assert row.top1 == pytest.approx(np.mean(own))
        assert row.std == pytest.approx(np.std(own, ddof=1))
        assert row.seeds == 3
    lines = comparison.markdown().splitlines()
    assert lines[0] == "| norm | batch size | top-1 [%] | seeds | best lr | step [ms] |"  # no GPU, no memory
    assert len(lines) == 2 + len(rows) == 2 + 11
    assert [line.split("|")[1].strip() for line in lines if "**" in line] == ["cbn", "cbn"]
    read = list(csv.DictReader(io.StringIO(comparison.csv())))
    assert [float(r["top1"]) for r in read if r["top1"]] == [r.top1 for r in comparison.rows if r.top1 is not None]
    assert "| gn | 1 | failed | 0, 8 failed | - | - |" in lines


def test_the_test_split_is_reported_and_not_chosen_by() -> None:
    config = grid(norms=("cbn",), lrs=(1e-3, 1e-2))
    results = finish(config, peak(1e-3))
    for cell, result in results.items():
        result["test_top1"] = 90.0 if cell.lr == 1e-2 else 40.0 + cell.seed
    row = Comparison.of(config, results).rows[0]
    assert (row.lr, row.top1) == (1e-3, 41.0)
    assert Comparison.of(config, results).split == "test"
    del results[Cell("cbn", 2, 1e-3, 2)]["test_top1"]
    assert Comparison.of(config, results).split == "validation"


def test_words_for_what_is_equal(comparison: Comparison) -> None:
    said = " ".join(comparison.sentences())
    assert re.search(r"At batch size 2 the best is cbn with 79.\d ± 0.1 %\.", said)
    assert "BatchNorm at batch size 32 reaches" in said

    def sentences(ahead: float, **changes: Any) -> str:
        config = grid(norms=("frozen", "cbn"), lrs=(1e-3,), **changes)
        results = finish(config, lambda cell: 50 + cell.seed + ahead * (cell.norm == "cbn"))
        return " ".join(Comparison.of(config, results).sentences())

    # the standard error of the difference of two means of three is sqrt(2/3)
    assert sentences(1.6) == "At batch size 2 the best is cbn with 52.6 ± 1.0 %; within the error frozen is as good."
    assert sentences(1.7) == "At batch size 2 the best is cbn with 52.7 ± 1.0 %."
    assert sentences(9, seeds=1).endswith("59.0 %; one seed tells nothing of the scatter.")


def test_failed_seeds_are_told() -> None:
    config = grid(norms=("bn", "cbn"), lrs=(1e-3,))

    def top1(cell: Cell) -> float | None:
        return None if cell.norm == "cbn" and cell.seed == 2 else 50.0 + cell.seed + 5 * (cell.norm == "cbn")

    (said,) = Comparison.of(config, finish(config, top1)).sentences()
    assert "the best is cbn with 55.5 ± 0.7 %, though 1 of its 3 runs failed" in said


def test_a_reference_that_is_compared_itself_can_be_the_best() -> None:
    config = grid(norms=("bn", "cbn"), batch_sizes=(2, 32), reference=32, lrs=(1e-3,))
    results = finish(config, lambda cell: 95.0 if cell[:2] == ("bn", 32) else 80.0 + cell.seed)
    comparison = Comparison.of(config, results)
    assert comparison.best()[32].norm == "bn"
    assert "At batch size 32 the best is bn with 95.0" in " ".join(comparison.sentences())


def test_all_files_are_there_and_load_nothing(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path)
    plots = ["accuracy", *(f"{kind}_batch{size}" for kind in ("rates", "loss") for size in (1, 2))]
    expected = {"table.md", "table.csv", "report.html", *(f"{p}.{end}" for p in plots for end in ("png", "svg"))}
    assert {path.name for path in tmp_path.iterdir()} == expected
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", page)  # a plot refers to its own parts only
    assert "@import" not in page
    assert page.count("<svg") == len(plots)
    assert all(norm in page for norm in ("frozen", "gn"))
    for plot in plots:
        root = ElementTree.parse(tmp_path / f"{plot}.svg").getroot()
        assert root.tag.endswith("svg")
        with Image.open(tmp_path / f"{plot}.png") as image:
            assert image.width > 600
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "loss_batch64.png").write_bytes(b"of a batch size that was asked for before")
    write_report(comparison, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "report.html").read_bytes() == first


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    run = type(RUN)(data="<b>photos</b> & more", model="<script>", output=str(tmp_path))
    config = grid(run=run, norms=("cbn",), lrs=(1e-3,), seeds=1)
    write_report(Comparison.of(config, finish(config, peak(1e-3))), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize(("width", "dark"), [(500, False), (500, True), (1200, False), (1200, True)])
def test_the_page_in_a_browser(comparison: Comparison, tmp_path: Path, width: int, dark: bool) -> None:
    write_report(comparison, tmp_path)
    picture = tmp_path / "page.png"
    subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2600",
         f"--blink-settings=preferredColorScheme={int(not dark)}", f"--screenshot={picture}",
         (tmp_path / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(float)
    ground = pixels[:8, :8].mean()
    assert ground < 60 if dark else ground > 240
    ink = np.abs(pixels - pixels[0, 0]).max(2) > 60
    assert ink[:, -4:].mean() < 0.01  # nothing is cut off at the right edge
    blue = (np.abs(pixels - (0, 0x72, 0xB2)).max(2) < 12).sum()
    assert blue > 200  # the first norm's line
    assert ink.mean() > 0.01


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_the_page_on_paper(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path)
    paper = tmp_path / "page.pdf"
    subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={paper}",
         (tmp_path / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(content) > 40_000  # five plots and their text; an empty page has a tenth of it
