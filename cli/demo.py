"""cbn demo: the whole way on real data, without a network."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cbn_convert.errors import CbnError

from . import options as o
from .session import INTERRUPTED, Session

if TYPE_CHECKING:
    from rich.table import Table

ARCH, SIZE = "test_resnet", 32


def demo(
    output: o.Output = Path("demo"),
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
    quiet: o.Quiet = False,
) -> None:
    """The whole way in about a minute, without a network: digits, a backbone, fine-tuning at batch size 2, export.

    Data are scikit-learn's handwritten digits (1,797 scans). A small timm ResNet learns the digits 0 to 4 with plain
    BatchNorm; that is the pretrained backbone. It is fine-tuned on 5 to 9 with two images per step, with BN and with
    CBN, and the CBN model is exported and loaded by plain timm.
    """
    with Session(as_json, debug, quiet) as session:
        import shlex

        from cbn_convert.files import check_output
        from cbn_convert.training.metrics import draw_curves

        check_output(output, overwrite)
        started = time.perf_counter()
        _prepare(output)
        write_digits(output / "data")
        results: dict[str, Any] = {}

        def cbn(*arguments: str) -> dict[str, Any]:
            session.print(f"\n$ cbn {shlex.join(arguments)}")
            return _run(list(arguments), session)

        small = ("--img-size", str(SIZE), "--no-aug", "--workers", "0", "--mean", "0.5", "--std", "0.5")
        backbone = f"local-dir:{output}/pretrained/best"
        results["pretrained"] = cbn(
            "finetune", f"{output}/data/digits-0-4", "--model", ARCH, "--no-pretrained", "--norm", "bn",
            "--batch-size", "32", "--epochs", "5", "--lr", "0.1", *small, "-o", f"{output}/pretrained",
        )  # fmt: skip
        results["convert"] = cbn("convert", backbone, "-o", f"{output}/converted")
        for norm in ("bn", "cbn"):
            results[norm] = cbn(
                "finetune", f"{output}/data/digits-5-9", "--model", backbone, "--norm", norm, "--batch-size", "2",
                "--epochs", "2", "--lr", "0.003", *small, "-o", f"{output}/run-{norm}",
            )  # fmt: skip
        results["export"] = cbn("export", f"{output}/run-cbn", "-o", f"{output}/export")
        draw_curves({norm: output / f"run-{norm}" for norm in ("bn", "cbn")}, output / "curves.png")
        difference = _largest_difference(output)

        session.print("\ndigits 5 to 9, two images per step:")
        session.print(_table(results))
        session.print(
            f'timm.create_model("local-dir:{output}/export", pretrained=True) loads it; largest difference to the '
            f"fine-tuned model: {difference:.1e}"
        )
        seconds = time.perf_counter() - started
        session.print(f"curves: {output}/curves.png; the whole demo took {seconds:.0f} s")
        session.result({**results, "largest_difference": difference, "seconds": seconds})


def write_digits(folder: Path) -> None:
    """Writes scikit-learn's digits as two image folders, 0 to 4 and 5 to 9, every fifth image of a class to val/."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for pixels, digit in zip(digits.images, digits.target, strict=True):
        part = "val" if seen[digit] % 5 == 4 else "train"
        target = folder / ("digits-0-4" if digit < 5 else "digits-5-9") / part / str(digit)
        target.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(target / f"{seen[digit]:03d}.png")
        seen[digit] += 1


def _run(arguments: list[str], session: Session) -> dict[str, Any]:
    """Runs the command; its outcome is the last line of its output. Same process: importing torch takes seconds."""
    from .main import app

    captured = io.StringIO()
    options = ["--json", *(["--quiet"] if session.quiet else []), *(["--debug"] if session.debug else [])]
    with contextlib.redirect_stdout(captured):
        code = app([*arguments, *options], prog_name="cbn", standalone_mode=False)
    if code == INTERRUPTED:
        raise typer.Exit(code)
    if code:
        raise CbnError(f"the command above ended with exit code {code}; its message says why")
    return dict(json.loads(captured.getvalue().splitlines()[-1]))


def _prepare(output: Path) -> None:
    """Makes the folder, and removes what an earlier demo wrote there; refuses a folder of somebody else."""
    import shutil

    from cbn_convert.files import writing

    marker = output / ".cbn-demo"
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise CbnError(
            f"{output} was not written by cbn demo, so nothing in it is removed; choose another output folder"
        )
    for name in ("data", "pretrained", "converted", "run-bn", "run-cbn", "export"):
        shutil.rmtree(output / name, ignore_errors=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _largest_difference(output: Path) -> float:
    """Between plain timm with the export and the fine-tuned model, over all validation images."""
    import timm
    import torch
    from timm.data import resolve_model_data_config

    from cbn_convert.training import load_run
    from cbn_convert.training.loading import plain_loader
    from cbn_convert.training.splits import read_classes

    tuned, classes = load_run(output / "run-cbn")
    plain = timm.create_model(f"local-dir:{output}/export", pretrained=True).eval()
    images = read_classes(output / "data/digits-5-9/val", classes)
    loader = plain_loader(images, resolve_model_data_config(plain), 64, 0)
    with torch.inference_mode():
        return max(float((tuned(b.images) - plain(b.images)).abs().max()) for b in loader)


def _table(results: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("norm", "validation top-1 [%]", "time per step [ms]", box=box.SIMPLE_HEAD, pad_edge=False)
    for norm in ("bn", "cbn"):
        run = results[norm]
        table.add_row(norm, f"{run['best_top1']:.1f}", f"{1000 * run['median_step_seconds']:.1f}")
    return table
