"""The command line as a user meets it: the whole way, and every wrong turn in one sentence."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cbn_convert.cli.session import Session, fitted
from helpers.commands import SMALL, cbn
from helpers.images import write_image
from rich.console import Console
from timm.data import resolve_model_data_config

from cbn_convert import CrossIterationBatchNormAct2d
from cbn_convert.training import load_run


def test_the_whole_way(colors: Path, tmp_path: Path) -> None:
    code, out, _ = cbn(
        "finetune", colors, "-m", "test_resnet", "-o", tmp_path / "run", "--epochs", 1, "--lr", 0.01, *SMALL, "--json"
    )
    assert code == 0
    trained = json.loads(out.splitlines()[-1])
    assert trained["steps"] == 16
    for fold in ("bn", "affine", "conv"):
        code, out, _ = cbn("export", tmp_path / "run", "-o", tmp_path / fold, "--fold", fold, "--json")
        assert code == 0
        assert json.loads(out.splitlines()[-1])["relative_difference"] < 1e-5
        code, out, _ = cbn("evaluate", tmp_path / fold, colors, "--device", "cpu", "--workers", 0, "--json")
        assert code == 0
        evaluated = json.loads(out)
        assert evaluated["images"] == 12
        assert evaluated["top1"] == pytest.approx(trained["best_top1"])
        code, out, _ = cbn("evaluate", tmp_path / "run", colors, "--split", "train", "--device", "cpu", "--workers", 0)
        assert code == 0
        assert out.startswith("32 images: top-1")
    tuned, classes = load_run(tmp_path / "run")
    assert classes == ["blue", "red"]
    plain = timm.create_model(f"local-dir:{tmp_path}/bn", pretrained=True).eval()
    assert resolve_model_data_config(plain)["input_size"] == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(tuned(x), plain(x))


def test_a_run_ends_with_commands_that_go_on(colors: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    code, out, _ = cbn("finetune", colors, "-m", "test_resnet", "-o", run, "--max-steps", 2, *SMALL)
    assert code == 0
    evaluate, export = (shlex.split(line) for line in out.split("next:\n")[1].splitlines())
    assert cbn(*evaluate[1:], "--device", "cpu", "--workers", 0)[1].startswith("12 images: top-1")
    assert cbn(*export[1:])[0] == 0
    assert timm.create_model(f"local-dir:{run}-deploy", pretrained=True).num_classes == 2


def test_inspect_and_convert(tmp_path: Path) -> None:
    code, out, _ = cbn("inspect", "test_resnet", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["counts"]["compensated"] == len(report["layers"])
    assert {"name", "norm", "channels", "fed_by", "status", "reason", "history_bytes", "form", "statistics"} == set(
        report["layers"][0]
    )
    assert report["folded"] == sum(layer["form"] == "folded" for layer in report["layers"]) > 0
    assert report["history_bytes"] == sum(layer["history_bytes"] for layer in report["layers"]) > 0
    code, out, _ = cbn("inspect", "test_resnet", "--all")
    assert all(layer["name"] in out and layer["fed_by"] in out for layer in report["layers"])

    code, out, _ = cbn("convert", "test_resnet", "--no-pretrained", "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "nothing written" in out
    assert not (tmp_path / "out").exists()
    code, _, _ = cbn("convert", "test_resnet", "--no-pretrained", "-o", tmp_path / "out", "--window", 16)
    assert code == 0
    assert json.loads((tmp_path / "out/conversion.json").read_text())["window"] == 16
    assert "- **norm layers:** " in (tmp_path / "out/README.md").read_text()
    timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    code, out, _ = cbn("inspect", f"local-dir:{tmp_path}/out", "--json")
    assert code == 0


@pytest.mark.parametrize("model", ["resnet18", "densenet121", "test_resnet"])
def test_inspect_shows_every_layer_as_one_mark(model: str) -> None:
    code, out, _ = cbn("inspect", model)
    assert code == 0
    table = out[: out.index("\n# ")]
    assert max(map(len, table.splitlines())) <= 80
    rows = re.findall(r"^ (\S+) +(\d+) +([#+o.]+) +[\d.]+ *$", table, re.MULTILINE)
    more = re.findall(r"^ +([#+o.]+) *$", table, re.MULTILINE)  # of a row that is too long for a line
    marks = "".join([*(own for *_, own in rows), *more])
    layers = json.loads(cbn("inspect", model, "--json")[1])["layers"]
    assert sum(int(count) for _, count, _ in rows) == len(marks) == len(layers)
    assert marks.count("#") == sum(layer["form"] == "folded" for layer in layers)
    assert marks.count("o") == sum(layer["status"] == "window" for layer in layers)
    assert 3 <= len(rows) <= 15
    if model == "resnet18":
        assert [(name, int(count)) for name, count, _ in rows] == [
            ("bn1", 1), ("layer1", 4), ("layer2", 5), ("layer3", 5), ("layer4", 5),
        ]  # fmt: skip


def test_what_convert_writes_says_what_to_do_with_it(colors: Path, tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(2)
    given = timm.create_model("test_efficientnet", num_classes=2, pad_type="same", bn_eps=0.3, drop_path_rate=0.2)
    timm.models.save_for_hf(given, tmp_path / "given", safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a folder"
    options = ["--window", 6, "--compensation", "taylor", "--model-kwargs", "drop_path_rate=0.1", "--img-size", 32]
    code, _, err = cbn("convert", "local-dir:given", *options, "-o", out)
    assert code == 0, err
    shutil.rmtree("given")

    # the same network, for images of the size that was asked for, and with what it was asked to be trained with
    x = torch.randn(2, 3, 64, 64)
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), given.eval()(x))
    assert [resolve_model_data_config(plain, use_test_size=t)["input_size"] for t in (False, True)] == [(3, 32, 32)] * 2
    assert json.loads((out / "config.json").read_text())["model_args"]["drop_path_rate"] == 0.1

    card = (out / "README.md").read_text()
    scope: dict[str, Any] = {}
    for part in card.split("```python")[1:]:
        exec(part.split("```")[0], scope)
    layers = [m for m in scope["model"].modules() if isinstance(m, CrossIterationBatchNormAct2d)]
    assert {(m.window.size, m.window.compensation) for m in layers} == {(6, "taylor")}
    deployed = timm.create_model("local-dir:deploy", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), plain(x), rtol=1e-4, atol=1e-5)
    shutil.rmtree("deploy")

    finetune, export = card.split("```sh\n")[1].split("```")[0].splitlines()
    quick = ["--max-steps", 1, "--workers", 0, "--device", "cpu"]
    for line, more in ((finetune.replace("DATA", shlex.quote(str(colors))), quick), (export, [])):
        program, *arguments = shlex.split(line)
        assert program == "cbn"
        code, _, err = cbn(*arguments, *more)
        assert code == 0, err
    stored = json.loads(Path("run/config.json").read_text())
    assert (stored["config"]["window"], stored["config"]["compensation"]) == (6, "taylor")
    assert stored["data_config"]["input_size"] == [3, 32, 32]
    assert timm.create_model("local-dir:deploy", pretrained=True).num_classes == 2


def test_the_card_of_a_conversion_names_what_is_not_compensated(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cbn("convert", "levit_128s", "--no-pretrained", "--img-size", 64, "-o", out)[0] == 0
    layers = json.loads((out / "conversion.json").read_text())["layers"]
    left = [layer for layer in layers if layer["status"] != "compensated"]
    assert len(left) == 2
    card = (out / "README.md").read_text().splitlines()
    assert any(line.startswith("50 compensated, 2 window, 0 kept of 52 norm layers; ") for line in card)
    for layer in left:
        assert sum(line.startswith(f"- `{layer['name']}`: window, {layer['reason'][:30]}") for line in card) == 1


def test_a_conversion_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    write = json.dump

    def full(data: Any, *arguments: Any, **options: Any) -> None:
        if "layers" in data:
            raise OSError(28, "No space left on device")
        write(data, *arguments, **options)

    monkeypatch.setattr(json, "dump", full)
    code, _, err = cbn("convert", "test_resnet", "--no-pretrained", "-o", tmp_path / "out")
    assert (code, "No space left on device" in err) == (1, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--head-lr-scale", 10, "--freeze", "fc"), "head_lr_scale is for a classifier that learns"),
        (("--head-lr-scale", "nan"), "head_lr_scale must be above 0"),
        (("--opt", "sdg", "--lr", 0.1), "another of timm's optimizers, got 'sdg'"),
    ],
)
def test_a_dry_run_ends_as_the_run_would(flags: tuple[Any, ...], message: str, colors: Path, tmp_path: Path) -> None:
    code, _, err = cbn("finetune", colors, "-m", "test_resnet", "-o", tmp_path / "run", *SMALL, *flags, "--dry-run")
    assert code == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_finetune_dry_run_resume_and_one_folder(colors: Path, tmp_path: Path) -> None:
    arguments = ["finetune", colors / "train", "-m", "test_resnet", "-o", tmp_path / "run", "--epochs", 1, *SMALL]
    code, out, _ = cbn(*arguments, "--val-fraction", 0.25, "--dry-run", "--json")
    assert code == 0
    planned = json.loads(out.splitlines()[-1])
    assert planned["training_images"] == 24
    assert planned["validation_images"] == 8
    assert not (tmp_path / "run").exists()
    assert cbn(*arguments, "--val-fraction", 0.25, "--quiet")[:2] == (0, "")
    code, out, _ = cbn("finetune", colors / "train", "--resume", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["steps"] == 12


def test_errors_are_one_sentence_and_leave_nothing(colors: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.pth").write_bytes(b"junk" * 99)
    (tmp_path / "bad/train/a").mkdir(parents=True)
    write_image(tmp_path / "bad/val/a/0.png", (9, 9, 9), 0)
    run = ["-m", "test_resnet", "-o", tmp_path / "run", *SMALL]
    cases = [
        (1, "does not exist", ["finetune", tmp_path / "nowhere", *run]),
        (1, "holds no images", ["finetune", tmp_path / "bad", *run]),
        (1, "cannot load weights", ["finetune", colors, *run, "--checkpoint", tmp_path / "junk.pth"]),
        (1, "did you mean", ["finetune", colors, *run, "-m", "test_resnt"]),
        (1, "no BatchNorm", ["finetune", colors, *run, "-m", "test_vit", "--img-size", "160"]),
        (1, "no BatchNorm", ["convert", "test_vit", "--no-pretrained", "-o", tmp_path / "run"]),
        (1, "no BatchNorm", ["inspect", "test_vit"]),
        (1, "norm must be one of", ["finetune", colors, *run, "--norm", "ln"]),
        (1, "--val-fraction", ["finetune", colors / "train", *run]),
        (1, "does not exist", ["evaluate", tmp_path / "nowhere", colors]),
        (1, "is neither a run folder nor an exported one", ["evaluate", colors, colors]),
        (1, "bn, affine, conv", ["export", colors, "-o", tmp_path / "run", "--fold", "all"]),
        (1, "is not a run folder", ["finetune", colors, "--resume", tmp_path / "nowhere"]),
        (2, "window", ["finetune", colors, *run, "--window", "0"]),
        (2, "batch-size", ["finetune", colors, *run, "--batch-size", "0"]),
        (2, "model-kwargs", ["finetune", colors, *run, "--model-kwargs", "oops"]),
        (1, "mean has 2 values", ["finetune", colors, *run, "--mean", "0.1,0.2"]),
        (2, "mean", ["finetune", colors, *run, "--mean", "grey"]),
        (2, "--model", ["finetune", colors, "-o", tmp_path / "run"]),
        (2, "--output", ["finetune", colors, "-m", "test_resnet"]),
        (2, "No such command", ["finetun"]),
    ]
    for code, message, arguments in cases:
        got, out, err = cbn(*arguments)
        assert (got, out) == (code, ""), arguments
        assert message in err.replace("\n", " "), (arguments, err)
        assert "Traceback" not in err
        if code == 1:
            assert err.startswith("error: ")
            assert err.count("\n") == 1
        assert not (tmp_path / "run").exists(), arguments


def test_json_errors_and_debug(tmp_path: Path) -> None:
    code, out, _ = cbn("inspect", "no_such_model", "--json")
    assert code == 1
    assert "timm knows no model" in json.loads(out)["error"]
    code, _, err = cbn("inspect", "no_such_model", "--debug")
    assert "Traceback" in err


def test_export_of_a_group_norm_run_is_refused(colors: Path, tmp_path: Path) -> None:
    assert (
        cbn("finetune", colors, "-m", "test_resnet", "-o", tmp_path / "run", "--norm", "gn", "--epochs", 1, *SMALL)[0]
        == 0
    )
    code, _, err = cbn("export", tmp_path / "run", "-o", tmp_path / "out")
    assert code == 1
    assert "GroupNorm" in err
    assert not (tmp_path / "out").exists()


def test_export_of_graphs_and_what_the_card_tells(colors: Path, tmp_path: Path) -> None:
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    flags = ("--max-steps", 2, "--lr", 0.01, "--head-lr-scale", 5, *SMALL)
    assert cbn("finetune", colors, "-m", "test_resnet", "-o", run, *flags)[0] == 0
    code, text, _ = cbn("export", run, "-o", out, "--onnx", "--torch-export", "--dry-run")
    assert code == 0
    files = ["model.safetensors", "config.json", "README.md", "class_map.txt", "model.onnx", "model.pt2"]
    assert f"would write {', '.join(files)} to" in text
    assert not out.exists()
    code, text, err = cbn("export", run, "-o", out, "--onnx", "--torch-export", "--json")
    assert code == 0, err
    assert json.loads(text)["files"] == files
    assert {p.name for p in out.iterdir()} == set(files)
    assert cbn("export", out, "-o", again, "--fold", "conv")[0] == 0  # an exported folder passes on what it knows
    for folder in (out, again):
        card = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        for line in (
            "- **classes:** blue, red", "- **data:** colors", "- **norm:** cbn", "- **window:** 4",
            "- **compensation:** projection", "- **epochs:** 10", "- **batch size:** 2",
            "- **peak learning rate:** 0.01", "- **head lr scale:** 5", "- **best epoch:** 1",
        ):  # fmt: skip
            assert line in card
        assert str(tmp_path) not in "".join(card)
        assert ("- `model.pt2`: for `torch.export.load`" in card) == (folder == out)


def test_batch_size_1_down_to_one_pixel(colors: Path, tmp_path: Path) -> None:
    arguments = ["-m", "resnet18", "--no-pretrained", "--img-size", 32, "--batch-size", 1, "--max-steps", 5]
    code, _, err = cbn("finetune", colors, *arguments, "--workers", 0, "--device", "cpu", "-o", tmp_path / "run")
    assert code == 0, err


def test_interrupt_is_130(colors: Path, tmp_path: Path, monkeypatch) -> None:
    from cbn_convert.training import loop

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "train", interrupt)
    code, out, err = cbn("finetune", colors, "-m", "test_resnet", "-o", tmp_path / "run", *SMALL)
    assert (code, out, err) == (130, "", "interrupted\n")


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from cbn_convert.cli.main import app; "
        "app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "finetune" in done.stdout


@pytest.mark.parametrize("command", ["inspect", "convert", "finetune", "evaluate", "export", "demo"])
def test_every_help_has_an_example(command: str) -> None:
    code, out, _ = cbn(command, "--help")
    assert code == 0
    assert f"Example: cbn {command}" in " ".join(out.split())


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cbn_convert.cli", "demo", "-o", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["largest_difference"] == 0
    assert result["cbn"]["best_top1"] > 90
    assert "$ cbn finetune demo/data/digits-5-9 --model local-dir:demo/pretrained/best --norm cbn" in done.stderr
    plain = timm.create_model(f"local-dir:{tmp_path}/demo/export", pretrained=True)
    assert plain.num_classes == 5
    assert (tmp_path / "demo/curves.png").is_file()


def test_real_photos_and_weights(shared_data: Path, tmp_path: Path) -> None:
    """The issue's own command, cut to a few steps: genuine ImageNet weights on clothing photos."""
    code, out, err = cbn(
        "finetune", shared_data / "clothing", "--model", "mobilenetv2_035",
        "--checkpoint", shared_data / "weights/mobilenetv2_035_keras.timm.safetensors",
        "--model-kwargs", "pad_type=same", "--mean", "0.5", "--std", "0.5", "--batch-size", "2", "--norm", "cbn",
        "--epochs", "1", "--max-steps", "60", "--img-size", "96", "-o", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["best_top1"] > 15
    for fold in ("bn", "conv"):
        code, out, _ = cbn("export", tmp_path / "run", "-o", tmp_path / fold, "--fold", fold, "--json")
        assert code == 0
        difference = json.loads(out.splitlines()[-1])["relative_difference"]
        assert difference == 0 if fold == "bn" else difference < 1e-5


def test_alone_it_says_what_there_is() -> None:
    code, out, _ = cbn()
    assert code == 2
    commands = out[out.index("Commands:") : out.index("Start with")]
    listed = re.findall(r"^  (\w+) +\S", commands, re.MULTILINE)
    assert listed == ["inspect", "convert", "finetune", "evaluate", "export", "compare", "bench", "demo"]
    assert "Start with cbn demo" in " ".join(out.split())


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sentences_are_broken_between_words_and_commands_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    command = f"  cbn export run -o {'deploy/' * 9} --fold conv"
    text = f"a sentence that is longer than --one-line of forty columns; {'path/' * 12}\nnext:\n{command}"
    shown = fitted(text, _Terminal())
    assert shown.endswith(f"next:\n{command}")
    assert " ".join(shown.split()) == " ".join(text.split())
    assert all(
        len(line) < 40 or line.strip().startswith("path/") for line in shown[: shown.index("next:")].splitlines()
    )
    assert fitted(text, io.StringIO()) == text


@pytest.mark.parametrize("model", ["resnet18", "densenet121", "mobilenetv2_100"])
def test_every_layer_fits_a_terminal_and_every_reason_is_there(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "print", lambda self, text: printed.append(text))
    printed: list[Any] = []
    assert cbn("inspect", model, "--all")[0] == 0
    console = Console(width=80, file=io.StringIO())
    console.print(printed[0])
    out = console.file.getvalue()
    assert max(map(len, out.splitlines())) <= 80
    printed.clear()
    monkeypatch.undo()
    layers = json.loads(cbn("inspect", model, "--json")[1])["layers"]
    rows = re.findall(r"^ (\S+) .* (\w+) +[\d.]+ +(\d+) *$", out, re.MULTILINE)
    reasons = dict(re.findall(r"^ *(\d+): (.*?) *$", out, re.MULTILINE))
    assert len(rows) == len(layers)
    for layer, (name, becomes, number) in zip(layers, rows, strict=True):
        assert layer["name"].startswith(name)
        assert becomes == (layer["form"] if layer["status"] == "compensated" else layer["status"])
        assert layer["reason"].startswith(reasons[number])  # which may be long, too
