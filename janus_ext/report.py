"""``janus_ext.report``: one page that shows one or many runs. ``--help`` says how."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from janus_ext.errors import ArgumentError
from janus_ext.reports.found import find_runs
from janus_ext.reports.html import write_page
from janus_ext.terminal import command


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML page that shows finished runs beside each other; runs that differ only in their seed are one.

    Example: janus_ext.report runs/emoji-janus-0 runs/emoji-lora-0 --output compared.html
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Folders of runs; one that holds the runs of several seeds, or of several runs such as runs, stands for them."""
    output: Annotated[Path | None, arg(metavar="FILE.html", help_behavior_hint="")] = None
    """Where the page goes; by default report.html in the folder of a single RUN, else here."""

    def page(self) -> Path:
        """The file to write; ArgumentError where that is a folder, or in a folder that is missing."""
        path = self.output or (self.runs[0] if len(self.runs) == 1 else Path()) / "report.html"
        if path.is_dir():
            raise ArgumentError(f"--output {path} is a folder; name a file, such as {path / 'report.html'}")
        if not path.parent.is_dir():
            raise ArgumentError(f"--output {path}: there is no folder {path.parent}")
        return path


@command("janus_ext.report")
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    report(tyro.cli(ReportConfig, prog="janus_ext.report", args=argv))
    return 0


def report(config: ReportConfig) -> Path:
    """Writes the page of the runs that are named, says what it shows and where it is; returns the file."""
    runs, skipped = find_runs(config.runs)
    path = config.page()
    for line in skipped:
        print(f"janus_ext.report: {line}", file=sys.stderr)
    write_page(path, runs, skipped)
    print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}: {path}")
    return path


if __name__ == "__main__":
    sys.exit(main())
