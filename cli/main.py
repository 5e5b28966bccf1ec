"""The `cbn` application. torch is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

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
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command(short_help="Show what convert would do, stage by stage.", epilog="Example: cbn inspect densenet121")(
    models.inspect
)
app.command(
    short_help="Convert a model and write it with a report.", epilog="Example: cbn convert resnet50 -o converted"
)(models.convert)
app.command(
    short_help="Fine-tune on a folder of images.",
    epilog="Example: cbn finetune photos --model resnet50 --batch-size 2 --epochs 5 -o run",
)(training.finetune)
app.command(
    short_help="Accuracy of a run or an exported folder.", epilog="Example: cbn evaluate run photos --split test"
)(training.evaluate)
app.command(short_help="Write a run for plain timm.", epilog="Example: cbn export run -o deploy --fold conv")(
    training.export
)
app.command(
    short_help="Which norm is best on your images, at each batch size.",
    epilog="Example: cbn compare photos --model resnet50 --batch-sizes 1,2,4 --norms bn,frozen,cbn -o comparison",
)(compare.compare)
app.command(
    short_help="Time and memory of a training step with each norm.",
    epilog="Example: cbn bench --arch mobilenetv2_100 --batch-size 2",
)(bench.bench)
app.command(short_help="The whole way in about a minute, no network.", epilog="Example: cbn demo -o demo")(demo.demo)


def run() -> None:
    """Entry point of the console script."""
    app(prog_name="cbn")
