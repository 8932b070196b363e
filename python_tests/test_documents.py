"""The documents say what is there: snippets run, commands parse, links lead somewhere, names and flags exist."""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml

import janus_ext
from janus_ext.config import command_line

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {"build", "runs", "node_modules"}
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in IGNORED or part.startswith(".") for part in path.relative_to(ROOT).parts)
}
PRESENT = {name: text for name, text in DOCUMENTS.items() if name != "CHANGELOG.md"}  # which tells of the past, too
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = re.findall(r'^"(janus_ext\.\w+)" = "janus_ext\.\w+:main"$', PROJECT, re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FOREIGN_FLAGS = {
    "--no-build-isolation",
    "--no-deps",
    "--force-reinstall",
    "--no-cache-dir",
    "--no-isolation",
}  # pip's, build's
FOREIGN_FLAGS |= {"--dist", "--maxprocesses", "--nproc-per-node"}  # pytest-xdist's, torchrun's
FOREIGN_FLAGS |= {"--signals-to-handle", "--shutdown-timeout", "--signal"}  # torchrun's, Slurm's
FOLDERS = "janus_ext|python_tests|benchmarks|csrc|cmake|examples|docs|\\.ci"


def blocks(language: str) -> list:
    """(code, what the comment above it says) of every block in that language."""
    return [
        pytest.param(found["code"], found["mark"] or "", id=f"{name}-{number}")
        for name, text in DOCUMENTS.items()
        for number, found in enumerate(f for f in FENCE.finditer(text) if f["language"] == language)
    ]


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block, in words; lines that end with a backslash go on."""
    lines = code.replace("\\\n", " ").splitlines()
    parts = (shlex.split(part, comments=True) for line in lines for part in line.split(" && "))
    return [words for words in parts if words]


def run(*arguments: str, folder: Path) -> str:
    """What a program prints, run in an empty folder as a reader would run it."""
    places = os.pathsep.join((str(ROOT), str(ROOT / "examples")))  # whose modules documents name, as in that folder
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# what is to run ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("code", "mark"), blocks("python"))
def test_a_snippet_runs_as_it_stands(code, mark, tmp_path):
    needed = mark.partition("needs: ")[2]
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    run("-c", code, folder=tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_as_it_stands(path, tmp_path):
    wanted = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = [name for name in sorted(wanted) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    run(str(path), folder=tmp_path)


@pytest.mark.parametrize("code", [block.values[0] for block in blocks("bash") if block.values[1] == "run"])
def test_commands_that_are_marked_run(code, tmp_path):
    for words in commands_of(code):
        assert run("-m", *words, folder=tmp_path)


def test_there_are_snippets_and_examples_and_commands():
    in_readme = [block for block in blocks("python") + blocks("bash") if block.id.startswith("README.md")]
    assert len(in_readme) >= 3 and EXAMPLES and {"janus_ext.train", "janus_ext.info"} <= set(SCRIPTS)


# what is to parse ----------------------------------------------------------------------------------------------------
class Parsed(Exception):
    """Stops a command behind its parser."""


@pytest.fixture
def parse(monkeypatch):
    """Gives a documented call of ours to the command's own `main`, which ends once it is parsed."""

    def stopping(parser):
        def stopped(*args, **kwargs):
            parser(*args, **kwargs)
            raise Parsed

        return stopped

    monkeypatch.syspath_prepend(ROOT / "examples")

    def parse(words: list[str]) -> None:
        assert words[0] in SCRIPTS, f"{words[0]} is none of the scripts in pyproject.toml"
        if words[0] == "janus_ext.train":
            command_line.parse(words[1:]).resolved()  # raises where flags do not go together
            return
        with monkeypatch.context() as patch:
            patch.setattr(tyro, "cli", stopping(tyro.cli))
            patch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
            patch.setattr(sys, "argv", words)
            with pytest.raises(Parsed):
                importlib.import_module(words[0]).main()

    return parse


def check_python(words: list[str]) -> None:
    """A script of ours with flags that it knows, or a module that is there."""
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
        for path in (word for word in words[3:] if word.startswith("python_tests")):
            assert (ROOT / path).exists(), path
        return
    script = ROOT / words[1]
    source = script.read_text(encoding="utf-8")
    if "from splits import" in source:  # which is the command line of several scripts
        source += (script.parent / "splits.py").read_text(encoding="utf-8")
    unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
    assert not unknown, f"{words[1]} has no {unknown}"


def check_pip(words: list[str]) -> None:
    """An installation of this checkout, with extras that it has."""
    assert words[1] == "install", words
    (target,) = (word for word in words[2:] if word.startswith("."))
    for extra in re.findall(r"\w+", target):
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), f"no extra {extra}"


@pytest.mark.parametrize(("code", "mark"), blocks("bash"))
def test_every_command_is_one_that_there_is(code, mark, parse):
    for words in commands_of(code):
        words[0] = words[0].removeprefix(".venv/bin/")
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0].startswith("janus_ext."):
            parse(words)
        elif words[0] in ("python", "python3"):
            check_python(words)
        elif words[0] == "pip":
            check_pip(words)
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words == ["pre-commit", "install"], f"no rule for {words}: say here how it is checked"


# flags ---------------------------------------------------------------------------------------------------------------
def help_of(script: str, monkeypatch, capsys, *words: str) -> str:
    """What `--help` prints, with room for every flag in its line."""
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_place_in_the_commands_page(script, monkeypatch, capsys):
    begin = f"\n## {script}\n"
    page = DOCUMENTS["docs/commands.md"]
    assert begin in page, f"docs/commands.md has no section {script}"
    section = page.partition(begin)[2].partition("\n## ")[0]
    flags = set(re.findall(r"^\W*(--[a-z][a-z-]*)", help_of(script, monkeypatch, capsys), re.MULTILINE))
    assert not {flag for flag in flags if f"`{flag}`" not in section}


def test_flags_in_the_documents_exist(monkeypatch, capsys):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py")]
    texts = sources + [help_of(script, monkeypatch, capsys) for script in SCRIPTS]
    monkeypatch.syspath_prepend(ROOT / "examples")
    texts.append(help_of("janus_ext.train", monkeypatch, capsys, "--method", "own_method:Soft"))
    known = FOREIGN_FLAGS | {flag for text in texts for flag in FLAG.findall(text)}
    named = {(name, flag) for name, text in PRESENT.items() for flag in FLAG.findall(text)}
    assert len(named) > 50 and not {(name, flag) for name, flag in named if flag not in known}


# links and names -----------------------------------------------------------------------------------------------------
def prose(text: str) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name} links to {target}"


def test_anchors_are_githubs():
    assert anchors("# A\n## `janus_ext.train`\n### emoji, the one\n```\n# no heading\n```\n") == {
        "a",
        "janus_exttrain",
        "emoji-the-one",
    }


@pytest.mark.parametrize("name", PRESENT)
def test_files_that_are_named_exist(name):
    spans = re.findall(r"`([^`\n]+)`", prose(PRESENT[name]))
    named = {found for span in spans for found in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*", span)}
    assert not {path for path in named if not list(ROOT.glob(path.rstrip("/")))}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_path_of_somebodys_machine(name):
    assert not re.findall(r"(?<![\w.~/<>-])/(?:work|tmp|home|root|opt|mnt)/\S*", DOCUMENTS[name])


def test_the_readme_stays_short():
    assert len(DOCUMENTS["README.md"].splitlines()) <= 150, "details belong in docs/"


def test_the_map_of_the_house_has_every_room():
    table = DOCUMENTS["CONTRIBUTING.md"].partition("The rooms and files of `janus_ext`")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    on_the_map = re.findall(r"`(\w+)`", "".join(rows))
    rooms = [path for path in (ROOT / "janus_ext").iterdir() if path.is_dir() or path.suffix == ".py"]
    assert sorted(on_the_map) == sorted(path.stem for path in rooms if path.name != "__pycache__")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == janus_ext.__version__
    assert "2605.28495" in str(citation["preferred-citation"])


# properties ----------------------------------------------------------------------------------------------------------
def test_properties_and_their_tests_name_each_other():
    """What docs/method.md lists under a property, and what the tests cite."""
    page = DOCUMENTS["docs/method.md"].partition("\n## Properties\n")[2]
    listed = {
        (int(number), test)
        for number, text in re.findall(r"^### Property (\d+):(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL)
        for test in re.findall(r"python_tests/(\w+)\.py", text)
    }
    cited = {
        (int(number), path.stem)
        for path in (ROOT / "python_tests").glob("test_*.py")
        for numbers in re.findall(r"docs/method\.md, propert(?:y|ies) (\d[\d, and]*)", path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", numbers)
    }
    assert listed == cited and len({number for number, _ in listed}) == 15
