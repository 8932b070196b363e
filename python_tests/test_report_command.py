"""janus_ext.report: where the page goes, what is said, and the exit codes."""

from pathlib import Path
from typing import Any

import pytest
from results import write_run

from janus_ext.errors import CheckpointError
from janus_ext.report import main
from janus_ext.reports import html
from janus_ext.reports.found import find_runs


def test_the_page_goes_to_the_folder_of_one_run_and_else_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(Path(name), lr=0.1)
    assert main(["a"]) == 0
    assert capsys.readouterr().out == "1 run: a/report.html\n"
    assert main(["a", "b"]) == 0
    assert capsys.readouterr().out == "2 runs: report.html\n"
    assert main(["a", "b", "--output", "b/compared.html"]) == 0
    assert sorted(str(path) for path in Path().rglob("*.html")) == ["a/report.html", "b/compared.html", "report.html"]
    assert not [path for path in Path().rglob("*.tmp")]


def test_runs_that_are_left_out_are_named(tmp_path, capsys):
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "results.json").unlink()
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"1 run: {tmp_path / 'report.html'}\n"
    assert printed.err == f"janus_ext.report: {tmp_path / 'b'} is left out: it has not finished (no results.json)\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name the folder of at least one RUN; --help has an example"),
        (["absent"], "RUN absent is missing; name the folder of a run"),
        (["empty"], "RUN empty is no run and holds none: there is no config.json or results.json"),
        (["a", "--output", "empty"], "--output empty is a folder; name a file, such as empty/report.html"),
        (["a", "--output", "absent/x.html"], "--output absent/x.html: there is no folder absent"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    Path("empty").mkdir()
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"janus_ext.report: {message}\n"
    assert not list(Path().rglob("*.html"))


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path / "a") / "report.html"
    path.write_text("before")

    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main([str(path.parent)]) == 2
    assert "report.html cannot be written" in capsys.readouterr().err
    assert path.read_text() == "before" and not list(path.parent.glob(".report*"))
    with pytest.raises(CheckpointError):
        html.write_page(path, find_runs([path.parent])[0])


def test_ctrl_c_is_status_130(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("janus_ext.report.find_runs", interrupted)
    assert main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\njanus_ext.report: interrupted\n"


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "janus_ext.report runs/emoji-janus-0" in capsys.readouterr().out
