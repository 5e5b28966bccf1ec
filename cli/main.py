"""The `cbn` application. torch is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cbn_convert import __version__

from . import bench, compare, demo, models, training
from .session import printable


class _PlainGroup(TyperGroup):
    """Lists the commands without rich, whose import takes longer than all the rest; their own help is rich."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with printable():
            return super().main(*arguments, **options)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


app = typer.Typer(
    name="cbn",
    cls=_PlainGroup,
    help="Fine-tune any pretrained timm backbone with 1 to 8 images per step: Cross-Iteration Batch Normalization.",
    epilog="Start with cbn demo -o demo, or cbn finetune photos --model resnet50 --batch-size 2 -o run.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


# command, what it does, an example
_COMMANDS: list[tuple[Any, str, str]] = [
    (models.inspect, "Show what convert would do, stage by stage.", "inspect densenet121"),
    (models.convert, "Convert a model and write it with a report.", "convert resnet50 -o converted"),
    (
        training.finetune,
        "Fine-tune on a folder of images.",
        "finetune photos --model resnet50 --batch-size 2 --epochs 5 -o run",
    ),
    (training.evaluate, "Accuracy of a run or an exported folder.", "evaluate run photos --split test"),
    (training.export, "Write a run for plain timm.", "export run -o deploy --fold conv"),
    (
        compare.compare,
        "Which norm is best on your images, at each batch size.",
        "compare photos --model resnet50 --batch-sizes 1,2,4 --norms bn,frozen,cbn -o comparison",
    ),
    (bench.bench, "Time and memory of a training step with each norm.", "bench --arch mobilenetv2_100 --batch-size 2"),
    (demo.demo, "The whole way in about a minute, no network.", "demo -o demo"),
]
for _command, _what, _example in _COMMANDS:
    # paragraphs in one line each, which are broken where the terminal ends
    _help = "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(_command.__doc__).split("\n\n"))
    app.command(help=_help, short_help=_what, epilog=f"Example: cbn {_example}")(_command)


def run() -> None:
    """Entry point of the console script."""
    app(prog_name="cbn")
