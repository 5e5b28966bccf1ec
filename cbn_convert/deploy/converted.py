"""What the folder that `cbn convert` writes says of the conversion, and of what can be done with it."""

from __future__ import annotations

import json
import shlex
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from ..conversion import ConversionReport
from ..norm import Window

_SHOWN_LAYERS, _REASON = 20, 120


@dataclass(frozen=True)
class Conversion:
    """A model that was converted: the name it was had by, arguments of `convert`, and what `convert` returned."""

    source: str
    options: dict[str, Any]
    report: ConversionReport

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"model": self.source, **self.options, **self.report.to_dict()}

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of `convert` that are not its defaults."""
        default = asdict(Window())
        return {k: v for k, v in self.options.items() if v is not None and (k == "window" or v != default[k])}

    def command(self, folder: str) -> str:
        """The command that trains from the folder."""
        flags = [part for name, value in self.given.items() for part in (f"--{name}", str(value))]
        return shlex.join(["cbn", "finetune", "DATA", "--model", f"local-dir:{folder}", *flags, "-o", "run"])

    def card(self, folder: str) -> list[str]:
        """Lines for the model card of the folder that will be called `folder`."""
        arguments = "".join(f", {name}={value!r}" for name, value in self.given.items())
        source = json.dumps(f"local-dir:{folder}", ensure_ascii=False)
        return [
            "## What it is for",
            "",
            "Converting changes neither weights nor outputs, so timm loads this folder as the model that it was. CBN "
            "is at work in training only, and is put in place there. In the folder above this one:",
            "",
            "```sh",
            self.command(folder),
            "cbn export run -o deploy --fold conv",
            "```",
            "",
            "Or in a training loop of your own:",
            "",
            "```python",
            "import timm",
            "import cbn_convert as cbn",
            "",
            f"model = timm.create_model({source}, pretrained=True)  # with num_classes=N for classes of your own",
            f"cbn.convert(model{arguments})",
            "...  # train as usual",
            'cbn.export(model, "deploy", fold="conv")  # for plain timm; or cbn.fold(model), without norm layers',
            "```",
            "",
            "## What convert does to its norm layers",
            "",
            f"{self.report.summary()}; conversion.json has all of them.",
            *self._left(),
        ]

    def _left(self) -> list[str]:
        """The layers that are not compensated, and why."""
        left = [row for row in self.report if row.status != "compensated"]
        if not left:
            return []
        reasons = [
            f"- `{row.name}`: {row.status}, {textwrap.shorten(row.reason, _REASON, placeholder=' ..')}"
            for row in left[:_SHOWN_LAYERS]
        ]
        more = [f"- and {len(left) - _SHOWN_LAYERS} more"] if len(left) > _SHOWN_LAYERS else []
        return ["", *reasons, *more]
