"""The progress bar shows what a user waits for, and nothing when quiet."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from cbn_convert.training.progress import Progress


def test_bar_has_loss_top1_rate_and_time_left() -> None:
    with Progress(10, 4, quiet=False) as bar:
        bar.advance(2)
        bar.advance(2)
        bar.show(1.25, 62.5)
        out = StringIO()
        Console(file=out, width=200).print(bar.bar.get_renderable())
    assert "6/10" in out.getvalue()
    assert "loss 1.250  top-1 62.5 %" in out.getvalue()
    assert "img/s" in out.getvalue()


def test_quiet(capsys) -> None:
    with Progress(10, 0, quiet=True) as bar:
        bar.advance(2)
        bar.line("epoch 1")
    assert capsys.readouterr() == ("", "")


def test_a_line_stays_one_line(capsys) -> None:
    sentence = "a sentence that is longer than a narrow terminal, " * 4
    with Progress(10, 0, quiet=False) as progress:
        progress.line(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"
