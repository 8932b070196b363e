"""Terminals that lack characters, users without a home, folders that cannot be written: a line, never a traceback."""

import os
import subprocess
import sys

import pytest
from trees import folders

from janus_ext import train

ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def run(*words, **environment):
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, *map(os.fsencode, words)], env=environment, capture_output=True, timeout=120, check=False
    )


def test_an_ascii_terminal_shows_escapes():
    code = "from janus_ext.terminal import escaping\nwith escaping():\n    print('caf\\u00e9 \\udce9 \\u00b1')"
    found = run("-c", code, **ASCII)
    assert found.stdout == rb"caf\xe9 \udce9 \xb1" + b"\n" and not found.stderr


def test_the_streams_are_as_they_were_afterwards():
    code = "import sys\nfrom janus_ext.terminal import escaping\nwith escaping():\n    pass\nprint(sys.stdout.errors)"
    assert run("-c", code, PYTHONIOENCODING="utf-8").stdout == b"strict\n"


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}])
def test_the_commands_print_names_that_the_terminal_lacks(tmp_path, environment):
    """A file with a sound name that ASCII lacks, and one that is no text anywhere."""
    folders(tmp_path / "tree", 2, 3, lambda label: f"thing {label}")
    for name in ("café.heic".encode(), b"caf\xe9.heic"):
        with open(os.fsencode(tmp_path / "tree" / "thing 0") + b"/" + name, "wb") as file:
            file.write(b"x")
    flags = ["--benchmark", "folder", "--data-dir", str(tmp_path / "tree"), "--check-data"]
    found = run("-m", "janus_ext.train", *flags, **environment)
    assert found.returncode == 0 and b"Traceback" not in found.stderr
    lines = [line for line in found.stdout.splitlines() if b".heic" in line]
    assert len(lines) == 2 and any(rb"caf\udce9.heic" in line for line in lines)


def test_info_prints_on_an_ascii_terminal():
    found = run("-m", "janus_ext.info", **ASCII)
    assert found.returncode == 0 and b"compiled CPU ops" in found.stdout


def test_a_folder_that_cannot_be_made_names_the_flag(tmp_path, monkeypatch, weights, capsys):
    """As in a checkout that is read-only; a file in the way stops even the super-user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    assert train.main(["--weights", str(weights), "--limit-per-class", "1"]) == 2
    message = capsys.readouterr().err
    assert "the folder runs/emoji-janus-0 cannot be made" in message
    assert message.rstrip().endswith("choose another folder with --output") and message.count("\n") == 1
