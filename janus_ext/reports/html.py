"""One page for many runs: text, style, program and numbers in one file that asks nobody for anything."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from janus_ext.reports import spreads
from janus_ext.reports.found import FoundRun
from janus_ext.reports.groups import Group, differences, group_runs
from janus_ext.reports.table import measured
from janus_ext.runs.checkpoint import replace_file, to_json

PROGRAM = ("elements.js", "scales.js", "tables.js", "lines.js", "scatter.js", "page.js")  # in this order
MOST_NAMED = 4  # groups in the title
IN_SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # of JSON, whose strings alone hold them


def write_page(path: Path, runs: Sequence[FoundRun], skipped: Sequence[str] = ()) -> None:
    """Writes the page of ``runs`` to ``path``, at once or not at all; ``skipped`` are lines about others.

    Raises:
        CheckpointError: it cannot be written.
    """
    # references stand for what is no text, such as names of files in bytes that are no UTF-8
    page = render(page_data(runs, skipped)).encode("utf-8", "xmlcharrefreplace")
    replace_file(path, lambda temporary: temporary.write_bytes(page))


def page_data(runs: Sequence[FoundRun], skipped: Sequence[str] = ()) -> dict[str, Any]:
    """All that the page's program draws, as JSON."""
    groups = group_runs(runs)
    return {
        "title": _title(groups),
        "measured": _measured(groups),
        "groups": [spreads.of_group(group) for group in groups],
        "differences": [{"name": name, "values": values} for name, values in differences(groups)],
        "skipped": list(skipped),
    }


def render(data: dict[str, Any]) -> str:
    """The page as text. No name in ``data`` can end a tag or an element of it."""
    folder = files("janus_ext.reports") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *PROGRAM)}
    return Template(read["page.html"]).substitute(
        title=html.escape(data["title"]),
        measured=html.escape(data["measured"]),
        style=read["page.css"],
        data=to_json(data).translate(IN_SCRIPT),
        program="\n".join(read[name] for name in PROGRAM),
    )


def _measured(groups: Sequence[Group]) -> str:
    """On which images all the numbers are."""
    return " or ".join(dict.fromkeys(measured(group.runs[0].results) for group in groups))


def _title(groups: Sequence[Group]) -> str:
    benchmarks = ", ".join(dict.fromkeys(group.runs[0].results["benchmark"] for group in groups))
    methods = list(dict.fromkeys(group.runs[0].results["method"] for group in groups))
    what = ", ".join(methods) if len(methods) <= MOST_NAMED else f"{len(groups)} configurations"
    return f"{what} on {benchmarks}"
