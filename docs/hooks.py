"""What mkdocs.yml builds beside the pages in docs/: README, recipes, changes and the command line as pages of the site.

Files of the repository that pages link to are copied into the site, so that every link leads somewhere in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# by their name in the site; links in them are relative to the folder that they are in
PAGES = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
SITE = {path: page for page, path in PAGES.items()}
FIGURE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
LINK = re.compile(r'(\]\(|src=")(?!https?:|mailto:|#)([^)#"\s]+)')


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, and what is linked."""
    linked: set[str] = set()
    for file in files.documentation_pages():
        rewritten(file.content_string, f"docs/{file.src_uri}", linked)
    for page, path in PAGES.items():
        text = rewritten((ROOT / path).read_text(encoding="utf-8"), path, linked)
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "cli.md", content=command_line()))
    for path in sorted(linked):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links out of docs/ links in the site."""
    uri = page.file.src_uri
    return markdown if uri in PAGES or uri == "cli.md" else rewritten(markdown, f"docs/{uri}", set())


def on_page_content(html: str, **_: Any) -> str:
    """Lets figures be opened in full size, as on a phone."""
    return FIGURE.sub(r'<a href="\2">\1</a>', html)


def rewritten(text: str, path: str, linked: set[str]) -> str:
    """The text of a file with the links that it has in the site; files that are no pages go to `linked`."""
    folder = (ROOT / path).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.is_file():
            return match[0]  # which mkdocs will find broken
        own = target.relative_to(ROOT).as_posix()
        if own in SITE:
            own = SITE[own]
        elif own.startswith("docs/"):
            own = own.removeprefix("docs/")
        else:
            linked.add(own)
            own = f"repository/{own}"
        return match[1] + own

    return LINK.sub(link, text)


def command_line() -> str:
    """Every command with its options, as --help has them."""
    command = [sys.executable, "-m", "typer", "cbn_convert.cli.main", "utils", "docs", "--name", "cbn"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    shown = re.sub(r"^Example: (.*)$", r"Example:\n\n    \1", done.stdout, flags=re.MULTILINE)
    return shown.replace("# `cbn`", "# Command line", 1)
