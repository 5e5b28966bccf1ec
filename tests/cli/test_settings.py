"""The settings of a run, from the defaults, from --config and from the flags, in this order of strength."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import cbn_convert.cli.settings as cli_settings
import pytest
import typer.main
from cbn_convert.cli.main import app
from helpers.commands import SMALL, cbn

import cbn_convert
from cbn_convert import FinetuneConfig, FinetuneResult
from cbn_convert.training import runs
from cbn_convert.training.metrics import read_metrics
from cbn_convert.training.settings import PARTS

Reader = Callable[..., FinetuneConfig]
RESULT = FinetuneResult("o", "cbn", 1, 50.0, 100.0, 1, 1, 50.0, 1.0, 0.1, 2.0, 0.0, None, 0, [], False, 0.05, "")


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """The settings that `cbn finetune d -m m -o o` trains with, given a --config file of this text, and more flags."""
    seen: list[FinetuneConfig] = []

    def spy(config: FinetuneConfig, **how: Any) -> FinetuneResult:
        seen.append(config)
        return RESULT

    monkeypatch.setattr(cbn_convert, "finetune", spy)

    def run(text: str | None, *flags: object) -> FinetuneConfig:
        given = []
        if text is not None:
            (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
            given = ["--config", tmp_path / "settings.yaml"]
        code, _, err = cbn("finetune", "d", "-m", "m", "-o", "o", *given, *flags)
        assert code == 0, err
        return seen.pop()

    return run


def parameters() -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in command.commands["finetune"].params}


def test_every_setting_has_a_flag_and_the_fields_default(read: Reader) -> None:
    options = parameters()
    for f in fields(FinetuneConfig):
        if f.name in cli_settings.GIVEN:
            continue
        assert f"--{f.name.replace('_', '-')}" in options[f.name].opts, f.name
        assert options[f.name].help
        if f.metadata.get("type") is None:
            assert options[f.name].default == f.default, f.name
    assert read(None) == FinetuneConfig("d", "m", "o")


def test_every_flag_sets_its_field(read: Reader) -> None:
    """With a value that is not the default, so that two flags of one field, or none, would be seen."""
    options, defaults = parameters(), FinetuneConfig("d", "m", "o").to_dict()
    special: dict[str, tuple[str, Any]] = {
        "lr": ("0.25", 0.25), "model_kwargs": ("a=1,b=same,c=False", {"a": 1, "b": "same", "c": False}),
        "mean": ("0.5", (0.5,)), "std": ("0.1,0.2,0.3", (0.1, 0.2, 0.3)), "pretrained": ("", False),
    }  # fmt: skip
    for f in fields(FinetuneConfig):
        if f.name in cli_settings.GIVEN:
            continue
        flag = f"--{f.name.replace('_', '-')}"
        kind = str(f.type).partition(" ")[0]
        if f.name == "pretrained":
            flag = "--no-pretrained"
        text, value = special.get(f.name) or {
            "bool": ("", True), "str": ("word", "word"), "int": ("77", 77), "float": ("0.125", 0.125),
        }[kind]  # fmt: skip
        got = read(None, flag, text) if text else read(None, flag)
        changed = {name for name, now in got.to_dict().items() if now != defaults[name]}
        assert (changed, getattr(got, f.name)) == ({f.name}, value)
    assert options["batch_size"].opts == ["--batch-size", "-b"]
    assert read(None, "--aa", "rand-m9").auto_augment == "rand-m9"


def test_the_file_overrides_the_defaults_and_flags_override_the_file(read: Reader) -> None:
    text = "window: 5\nepochs: 3\nno_aug: true\npretrained: false\nnorm: brn\n"
    got = read(text)
    assert got == FinetuneConfig("d", "m", "o", window=5, epochs=3, no_aug=True, pretrained=False, norm="brn")
    got = read(text, "--epochs", 7, "--pretrained", "--norm", "cbn")
    assert got == FinetuneConfig("d", "m", "o", window=5, epochs=7, no_aug=True)
    got = read("model: other\noutput: there\n")  # the flags of `read` are stronger
    assert (got.model, got.output) == ("m", "o")


def test_names_with_dashes_or_underscores(read: Reader) -> None:
    got = read("batch-size: 4\nlabel_smoothing: 0\nval-fraction: 0.2\nsave_every: 9\n")
    assert (got.batch_size, got.label_smoothing, got.val_fraction, got.save_every) == (4, 0.0, 0.2, 9)


def test_mappings_lists_and_numbers_as_yaml_has_them(read: Reader) -> None:
    got = read(
        "model_kwargs: {pad_type: same, drop_rate: 0.5, zero_init_last: false, act_layer: null}\n"
        "mean: [0.5, 0.25, 0.125]\nstd: 0.5\nlr: 1e-3\nweight_decay: 1e-5\nfreeze: [stem, stage1]\nema: 0.99\n"
    )
    assert got.model_kwargs == {"pad_type": "same", "drop_rate": 0.5, "zero_init_last": False, "act_layer": None}
    assert (got.mean, got.std) == ((0.5, 0.25, 0.125), (0.5,))
    assert (got.lr, got.weight_decay, got.freeze, got.ema) == (1e-3, 1e-5, "stem,stage1", 0.99)
    assert read("lr: auto\nmodel_kwargs: pad_type=same\n").model_kwargs == {"pad_type": "same"}


def test_model_kwargs_that_hold_commas(read: Reader) -> None:
    assert read("model_kwargs: {layers: [1, 1, 2, 1], name: 'a,b'}").model_kwargs == {
        "layers": [1, 1, 2, 1], "name": "a,b",
    }  # fmt: skip


def test_rate(read: Reader) -> None:
    assert read(None, "--lr", "auto").lr is None
    assert read("lr: 0.5", "--lr", "auto").lr is None
    assert read(None, "--lr", "3e-2").lr == 0.03
    assert read("lr: 0.5").lr == 0.5
    code, _, err = cbn("finetune", "d", "-m", "m", "-o", "o", "--lr", "foo")
    assert code == 2
    assert "'foo' is neither a number nor auto" in joined(err)


def joined(text: str) -> str:
    """What typer has put into a box, in one line."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("widow: 4", 2, "has the unknown setting 'widow'; is it window?"),
        ("batch-sise: 4", 2, "has the unknown setting 'batch_sise'; is it batch_size?"),
        ("zzz: 4", 2, "has the unknown setting 'zzz'"),
        ("epochs: true", 2, "gives epochs a yes or no; it needs a value"),
        ("history: no", 2, "gives history a yes or no; it needs a value, in quotes"),
        ("1: 4", 2, "has the unknown setting '1'"),
        ("window: [", 2, "is not YAML: while parsing"),
        ("a\tb: {", 2, "is not YAML"),
        (b"\xff\xfe\x00", 2, "is not YAML"),
        ("", 2, "does not hold settings of the form name: value"),
        ("- window", 2, "does not hold settings of the form name: value"),
        ("window", 2, "does not hold settings of the form name: value"),
        ("window: four", 2, "Invalid value for '--window'"),
        ("window: 0", 2, "Invalid value for '--window'"),
        ("window: [4, 5]", 2, "Invalid value for '--window'"),
        ("window: 2.5", 2, "Invalid value for '--window'"),
        ("no_aug: perhaps", 2, "Invalid value for '--no-aug'"),
        ("lr: fast", 2, "neither a number nor auto"),
        ("mean: [a, b]", 2, "is not one number, or one for each channel"),
        ("{mean: [1, 2], pretrained: false}", 1, "mean has 2 values, but test_resnet takes images with 3 channels"),
        ("model_kwargs: oops", 2, "is not of the form name=value"),
        ("lr: -1", 1, "lr must be above 0"),
        ("drop_path: 1.5", 1, "drop_path must be at least 0 and below 1"),
        ("device: tpu", 1, "device must be one of auto, cpu, cuda, mps"),
    ],
)
def test_wrong_files_are_one_sentence(text: str | bytes, code: int, message: str, colors: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    got, out, err = cbn("finetune", colors, "-m", "test_resnet", "-o", tmp_path / "run", "--config", file)
    assert (got, out) == (code, "")
    assert message in joined(err)
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    if code == 1:
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(("name", "reason"), [("nowhere.yaml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read(name: str, reason: str, tmp_path: Path) -> None:
    code, _, err = cbn("finetune", "d", "-m", "m", "-o", tmp_path / "run", "--config", tmp_path / name)
    assert code == 2
    assert "cannot read" in joined(err)
    assert reason in joined(err)


def test_the_settings_of_a_run_are_a_file_for_the_next(colors: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--max-steps", 2, "--lr", 0.02, "--model-kwargs", "zero_init_last=False", "--mean", 0.4, "--opt", "adamw"]
    assert cbn("finetune", colors, "-m", "test_resnet", "-o", first, *flags, *SMALL)[0] == 0
    code, _, err = cbn("finetune", "--config", first / "config.json", "-o", second, "--epochs", 3)
    assert code == 0, err
    one, two = (json.loads((run / "config.json").read_text()) for run in (first, second))
    assert two["config"] == {**one["config"], "output": str(second), "epochs": 3}
    losses = [[r["loss"] for r in read_metrics(run) if r["event"] == "eval"] for run in (first, second)]
    assert losses[0] == losses[1]
    resolved = FinetuneConfig.of_run(second)
    assert resolved.mean == (0.4,)
    assert resolved.model_kwargs == {"zero_init_last": False}


def test_help_names_every_panel_and_every_flag() -> None:
    code, out, _ = cbn("finetune", "--help")
    assert code == 0
    for panel in (*(part.PANEL for part in PARTS), "Output"):
        assert f"╭─ {panel} ─" in out, panel
    words = out.replace(",", " ").split()
    for f in fields(FinetuneConfig):
        if f.name != "data":
            assert f"--{f.name.replace('_', '-')}" in words, f.name


def test_evaluate_per_class_and_without_bad_images(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cbn("finetune", colors, "-m", "test_resnet", "-o", run, "--lr", 0.01, "--max-steps", 8, *SMALL)[0] == 0
    arguments = ["evaluate", run, colors, "--device", "cpu", "--workers", 0]
    bad = colors / "val/red/2.png"
    bad.write_bytes(b"damaged")
    code, out, err = cbn(*arguments)
    assert (code, out) == (1, "")
    assert str(bad) in err
    arguments.append("--skip-bad-images")
    code, out, _ = cbn(*arguments)
    assert code == 0
    assert out.splitlines()[0].startswith("11 images: top-1")
    assert out.splitlines()[1:] == [f"not counted, unreadable: {bad}"]
    code, out, _ = cbn(*arguments, "--json")
    plain = json.loads(out)
    assert "confusion" not in plain
    assert plain["bad_images"] == [str(bad)]
    code, out, err = cbn(*arguments, "--per-class", "--json")
    assert code == 0
    result = json.loads(out)
    table = result.pop("confusion")
    assert result == plain
    assert [sum(row) for row in table] == [6, 5]
    assert sum(table[i][i] for i in (0, 1)) == pytest.approx(11 * result["top1"] / 100)
    assert result["per_class"] == pytest.approx([100 * table[i][i] / sum(table[i]) for i in (0, 1)])
    assert result["classes"] == ["blue", "red"]
    rows = [line.split() for line in err.splitlines()]
    for number, name in enumerate(result["classes"]):
        (row,) = [row for row in rows if row[:1] == [name]]
        taken = table[number][1 - number]
        expected = [name, str(sum(table[number])), f"{result['per_class'][number]:.1f}"]
        assert row == expected + ([result["classes"][1 - number], f"×{taken}"] if taken else [])


def test_a_resumed_run_may_have_other_workers_and_another_device(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["finetune", colors, "-m", "test_resnet", "-o", run, "--max-steps", 3, "--save-every", 1, "--lr", 0.01]
    assert cbn(*arguments, *SMALL)[0] == 0
    for newer in list((run / "checkpoints").iterdir()):
        if newer.name > "step-00000002":
            for file in newer.iterdir():
                file.unlink()
            newer.rmdir()
    code, out, err = cbn("finetune", colors, "--resume", run, "--workers", 1, "--device", "auto", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 3


@pytest.mark.parametrize(
    ("flags", "workers", "device"),
    [
        ([], 0, "cpu"),
        (["--workers", 3, "--device", "auto"], 3, "auto"),
        (["--workers", 2, "--device", "cpu"], 2, "cpu"),
    ],
)
def test_a_resumed_run_keeps_its_place_unless_told_otherwise(
    flags: list[object], workers: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(runs, "run", lambda config, **how: (seen.append((config, how)), RESULT)[1])
    stored = FinetuneConfig("d", "m", "o", workers=0, device="cpu", window=7, epochs=3)
    (tmp_path / "config.json").write_text(
        json.dumps({"config": stored.to_dict(), "classes": [], "images": {}, "data_config": {}})
    )
    code, _, err = cbn("finetune", "elsewhere", "--resume", tmp_path, *flags)
    assert code == 0, err
    ((config, how),) = seen
    assert how["resumed"] is True
    assert (config.workers, config.device) == (workers, device)
    assert (config.data, config.output, config.window, config.epochs) == ("elsewhere", str(tmp_path), 7, 3)


def test_a_resumed_run_takes_no_other_settings(tmp_path: Path, colors: Path) -> None:
    run = tmp_path / "run"
    assert cbn("finetune", colors, "-m", "test_resnet", *SMALL, "--max-steps", 1, "-o", run)[0] == 0
    for flag, value in (("--epochs", 3), ("--model", "test_resnet"), ("--config", run / "config.json")):
        code, _, err = cbn("finetune", colors, "--resume", run, flag, value)
        assert code == 2
        assert flag in err
        assert "what is resumed has its own" in " ".join(err.split())
