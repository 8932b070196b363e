"""Remake every table of the documents that names its command, and the pictures, from the stored results.

    python benchmarks/documents.py           # rewrites the tables that are out of date, and draws the pictures
    python benchmarks/documents.py --check   # changes nothing, and fails where a table is out of date

A table stands between ``<!-- name: python benchmarks/... -->`` and ``<!-- end -->``: it is what that command prints.
Nothing is measured. The pictures of the README's run are drawn from its results.json, which a run has copied there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "benchmarks" / "results" / "emoji-janus-0"
TABLE = re.compile(
    r"(?P<head><!-- \w+: (?P<command>python [^\n]+) -->)\s*(?P<text>(?:(?!<!-- end -->).)*?)\s*<!-- end -->",
    re.DOTALL,
)


def pages() -> list[Path]:
    """The documents with tables."""
    return [ROOT / "README.md", ROOT / "REPRODUCIBILITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables(text: str) -> list[tuple[str, str]]:
    """The tables of a document: (command, what stands there)."""
    return [(found["command"], found["text"]) for found in TABLE.finditer(text)]


def printed(command: str) -> str:
    """What a command of this folder, as the documents spell it, prints."""
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    return done.stdout.strip()


def refilled(text: str, table_of: Callable[[str], str]) -> str:
    """A document with what `table_of` gives for each of its commands."""
    return TABLE.sub(lambda found: f"{found['head']}\n\n{table_of(found['command'])}\n\n<!-- end -->", text)


def out_of_date() -> dict[Path, str]:
    """The documents whose tables are not what their commands print, as they should be."""
    table_of = cache(printed)
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    should = {page: refilled(text, table_of) for page, text in texts.items()}
    return {page: text for page, text in should.items() if text != texts[page]}


def draw() -> None:
    """The pictures: those of the README's run, and forgetting over plasticity of the study."""
    from janus_ext.reports.plots import save_plots

    save_plots(json.loads((RUN / "results.json").read_text(encoding="utf-8")), RUN)
    printed("python benchmarks/study.py curves emoji")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a table is out of date, and change nothing")
    check = parser.parse_args().check
    changed = out_of_date()
    names = ", ".join(str(page.relative_to(ROOT)) for page in changed) or "none"
    if check and changed:
        raise SystemExit(f"out of date: {names}")
    for page, text in changed.items():
        page.write_text(text, encoding="utf-8")
    if not check:
        draw()
    print(f"tables out of date: {names}")


if __name__ == "__main__":
    main()
