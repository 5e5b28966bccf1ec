"""Files of a comparison: the table, the plots, and a page that holds all of it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..files import replaced_file
from .plots import Plot, draw
from .store import PLOT
from .summary import Comparison

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --mark: #0072b2; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.2; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
tr.first td {{ border-top: 2px solid var(--line); }}
td.best {{ font-weight: 700; color: var(--mark); }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 600; }} svg {{ width: 100%; height: auto; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
@media (prefers-color-scheme: dark) {{ :root {{ --mark: #6ab7ff; }} }}
@media (max-width: 40rem) {{
  body {{ padding: .75rem; }}
  table {{ font-size: .8rem; }}
  th, td {{ padding: .25rem .3rem; }}
}}
@media print {{
  body {{ max-width: none; font-size: 11pt; }}
  figure, table {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="scroll">{table}</div>
<p>{note}</p>
<h2>Plots</h2>
<div class="plots">
{plots}
</div>
<h2>Settings</h2>
<dl>{settings}</dl>
</body>
</html>
"""


def write_report(comparison: Comparison, output: Path) -> None:
    """Writes table.md, table.csv, each plot as PNG and SVG, and report.html. Raises RunError if that fails."""
    plots = draw(comparison)
    kept = {f"{plot.name}.{end}" for plot in plots for end in ("png", "svg")}
    for path in list(output.iterdir()):
        if PLOT.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)  # of a batch size that is no longer asked for
    texts = {"table.md": comparison.markdown(), "table.csv": comparison.csv(), "report.html": page(comparison, plots)}
    texts |= {f"{plot.name}.svg": plot.svg for plot in plots}
    for name, text in texts.items():
        with replaced_file(output / name) as file:
            file.write(text)
    for plot in plots:
        with replaced_file(output / f"{plot.name}.png", binary=True) as file:
            file.write(plot.png)


def page(comparison: Comparison, plots: list[Plot]) -> str:
    """The report as one HTML page that loads nothing else."""
    run = comparison.config.run
    figures = (f"<figure><figcaption>{escape(p.title)}</figcaption>\n{p.svg}</figure>" for p in plots)
    used = {
        "model": run.model, "data": run.data, "images seen by each run": _budget(comparison),
        "optimizer": f"{run.opt}, {run.sched} schedule, clipped at {run.clip_grad:g}"
        + ("" if run.head_lr_scale == 1 else f", the classifier at {run.head_lr_scale:g} times the rate"),
        "input": "that of the model" if run.img_size is None else f"{run.img_size} px",
        "recalibration": _recalibration(run.recalibrate, run.ema),
        "learning rates": "searched by factors of √10 around the automatic one"
        if comparison.config.lrs is None
        else ", ".join(f"{lr:g}" for lr in comparison.config.lrs),
        "seeds": str(comparison.config.seeds), "runs": str(len(comparison.results)),
    }  # fmt: skip
    return _PAGE.format(
        title=escape(f"{run.model} on {Path(run.data).name}: norms at small batch sizes"),
        summary=" ".join(escape(sentence) for sentence in comparison.sentences()),
        table=_table(comparison),
        note=escape(
            f"Mean and sample standard deviation over seeds of the top-1 of the {comparison.split} images, for each "
            "norm at its own best learning rate, chosen by the validation top-1 of the first seed. Step times: medians"
            + (f" of {comparison.config.jobs} runs side by side." if comparison.config.jobs > 1 else ".")
        ),
        plots="\n".join(figures),
        settings="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in used.items()),
    )


def _recalibration(batches: int | None, ema: float | None) -> str:
    if batches is None and ema is not None:
        return "the default of each norm"
    return f"{batches} batches, for all norms" if batches else "none"


def _budget(comparison: Comparison) -> str:
    images = comparison.config.images
    epochs = comparison.config.run.epochs
    return f"{images}" if images else f"{epochs} epoch{'s' if epochs > 1 else ''}"


def _table(comparison: Comparison) -> str:
    headers, texts = comparison.table()
    best = list(comparison.best().values())
    lines = []
    for row, before, cells in zip(comparison.rows, [None, *comparison.rows], texts, strict=False):
        first = ' class="first"' if before is None or before.norm != row.norm else ""
        norm, size, top1, *rest = (escape(text) for text in cells)
        marked = f'<td class="best">{top1}</td>' if row in best else f"<td>{top1}</td>"
        others = "".join(f"<td>{text}</td>" for text in rest)
        # a long name may be broken after its colons
        lines.append(f"<tr{first}><td>{norm.replace(':', ':<wbr>')}</td><td>{size}</td>{marked}{others}</tr>")
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
