"""The flags of `cbn finetune`, made from the table of settings, and --config, a file with the same names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

from cbn_convert.training.config import FinetuneConfig

from .options import SETTINGS, flag, option, parse_channels, parse_kwargs

GIVEN = ("data", "model", "output")  # these have parameters of their own
PLACE = ("workers", "device")  # what a resumed run may have otherwise: they say where it runs, not what it computes
_NO_SETTINGS = ("config", "resume", "overwrite", "dry_run", "as_json", "debug", "quiet")
_SETTINGS = {name: setting for name, setting in SETTINGS.items() if name not in GIVEN}


def with_settings(*without: str, first: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command, whose last parameter is **settings, an option for each setting but those named here.

    Its own parameters come last in its help, but for those in `first`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        hints = get_type_hints(FinetuneConfig)
        options = [_parameter(name, hints[name]) for name in _SETTINGS if name not in without]
        # the settings first: what a command shares with the others comes last in its help
        kinds = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if p.default is not p.empty else p for p in own]
        ahead = [p for p in kinds if p.name in ("ctx", *GIVEN, *first)]
        parameters = [*ahead, *options, *(p for p in kinds if p not in ahead)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(name: str, hint: Any) -> inspect.Parameter:
    setting = _SETTINGS[name]
    kind = setting.metadata.get("type")
    default = None if kind else setting.default
    annotation = Optional[kind] if kind else hint  # noqa: UP045  (a type known at run time only)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option(name)]
    )


def read_values(settings: dict[str, Any]) -> dict[str, Any]:
    """The values of the options as FinetuneConfig has them. Raises typer.BadParameter for one that cannot be read."""
    lr = settings.get("lr")
    try:
        rate = None if lr in (None, "auto") else float(lr)
    except ValueError:
        raise typer.BadParameter(f"{lr!r} is neither a number nor auto", param_hint="--lr") from None
    return {
        **settings,
        "lr": rate,
        "model_kwargs": parse_kwargs(settings["model_kwargs"]),
        "mean": parse_channels(settings["mean"], "--mean"),
        "std": parse_channels(settings["std"], "--std"),
    }


def require(model: Any, output: Any, resume: Any) -> None:
    """Raises typer.BadParameter if model or output is missing though nothing is resumed."""
    if resume is None and (model is None or output is None):
        named = {"'--model' / '-m'": model, "'--output' / '-o'": output}
        missing = " and ".join(name for name, value in named.items() if value is None)
        raise typer.BadParameter(
            "required, unless --resume names what to continue; for example --model resnet50 -o run", param_hint=missing
        )


def given(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the parameters that have another value than their default."""
    return [name for name in names if getattr(ctx.get_parameter_source(name), "name", None) not in ("DEFAULT", None)]


def resumed_refuses(ctx: typer.Context, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises typer.BadParameter for a parameter that was given though what is resumed has its own."""
    for name in given(ctx, names):
        if name not in allowed:
            raise typer.BadParameter(
                "what is resumed has its own; leave it out, or start anew",
                param_hint=flag(name),
            )


def _load(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes what the file says the defaults of the command, which flags override."""
    if path is None:
        return None
    import yaml

    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(stored, dict) and isinstance(stored.get("config"), dict):
        # the config.json of a run, of which a comparison sets something itself
        own = {p.name for p in ctx.command.params}
        stored = {k: v for k, v in stored["config"].items() if v is not None and (k in own or k not in _SETTINGS)}
    if not isinstance(stored, dict):
        raise typer.BadParameter(f"{path} does not hold settings of the form name: value")
    known = {str(p.name) for p in ctx.command.params} - {*_NO_SETTINGS}
    values = {str(key).replace("-", "_"): value for key, value in stored.items()}
    for key in sorted(set(values) - known):
        close = difflib.get_close_matches(key, known, n=1)
        raise typer.BadParameter(f"{path} has the unknown setting {key!r}" + (f"; is it {close[0]}?" if close else ""))
    for key, value in values.items():
        if isinstance(value, bool) and key in _SETTINGS and _SETTINGS[key].type != "bool":
            raise typer.BadParameter(f"{path} gives {key} a yes or no; it needs a value, in quotes if it is a word")
        if isinstance(value, dict):
            values[key] = repr(value)
        elif isinstance(value, (list, tuple)):
            values[key] = ",".join(str(item) for item in value)
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="YAML file of settings, named as the flags are; or the config.json of a run.", callback=_load,
        is_eager=True, metavar="FILE", rich_help_panel="Output",
    ),
]  # fmt: skip
Data = Annotated[
    str,
    typer.Argument(
        help="Folder with train/CLASS/* and val/CLASS/*, or see --val-fraction; or hfds/NAME, wds/FOLDER.",
        metavar="DATA",
        show_default=False,
    ),
]
