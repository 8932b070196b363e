"""The measurements behind REPRODUCIBILITY.md go on where they stopped, and one command goes through all of them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the checkout")
SCRIPT = """
from pathlib import Path
from splits import command, stored

def measure(case, folder):
    if case["seed"] == 3 and not Path("mended").exists():
        raise ValueError("seed 3 fails")
    return {"acc": case["seed"] + 0.5, "folder": str(folder)}

def table(path):
    return " ".join(str(case["acc"]) for case in stored(path))

if __name__ == "__main__":
    cases = [{"data": data, "seed": seed} for data in ("emoji", "fonts") for seed in (1, 2, 3)]
    command("a script", cases, measure, table)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run_script(folder: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")
    return subprocess.run(
        [sys.executable, "script.py", *words], cwd=folder, capture_output=True, text=True, check=False
    )


def test_what_was_measured_is_kept_and_a_run_goes_on_with_it(tmp_path, monkeypatch):
    words = ("run", "--glyphs", "G", "--fashion-mnist", "F", "--jobs", "1", "--json", "found.json")
    done = run_script(tmp_path, *words, monkeypatch=monkeypatch)
    assert done.returncode != 0 and "seed 3 fails" in done.stderr
    kept: list[dict[str, Any]] = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert [(case["data"], case["seed"], case["acc"]) for case in kept] == [("emoji", 1, 1.5), ("emoji", 2, 2.5)]
    assert kept[0]["about"]["threads"] == 1 and kept[0]["folder"] == "None"
    marked = {"cases": [case | {"acc": 9.0} for case in kept]}
    (tmp_path / "found.json").write_text(json.dumps(marked))
    (tmp_path / "mended").touch()
    done = run_script(tmp_path, *words, monkeypatch=monkeypatch)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert [case["acc"] for case in cases] == [9.0, 9.0, 3.5, 1.5, 2.5, 3.5], "the first two are not run again"
    assert [case["seed"] for case in cases] == [1, 2, 3, 1, 2, 3], "in the order of what is wanted"
    assert cases[-1]["folder"] == "G", "fonts are made of the glyphs"
    done = run_script(tmp_path, "table", "found.json", monkeypatch=monkeypatch)
    assert done.stdout.strip() == "9.0 9.0 3.5 1.5 2.5 3.5"


def test_a_case_is_finished_only_where_all_that_it_says_is_there(module):
    wanted = [{"lr": lr, "data": "emoji", "seed": seed} for lr in (1.0, 2.0) for seed in (0, 1)]
    found = [{"data": "glyphs", "seed": 1, "lr": 1.0, "acc": [5]}, {"data": "emoji", "seed": 0, "lr": 1.0, "acc": [5]}]
    assert module("splits").finished(wanted, found) == {0: found[1]}


def test_one_command_goes_through_every_script_that_keeps_what_the_tables_show(module):
    evidence = module("evidence")
    runs = [run.split() for run in evidence.RUNS]
    trains, *files = [run.split() for run in evidence.FILES.values()]
    assert trains == ["-m", "janus_ext.train", "--output"]
    made = runs + files
    assert all((BENCHMARKS / script).is_file() for script, *_ in made)
    measured = {words[1] for script, *words in files if script == "run.py" and words[0] == "run"}
    assert measured == set(module("cases").GROUPS)
    documents = module("documents")
    tables = [words for page in documents.pages() for words, _ in documents.tables(page.read_text(encoding="utf-8"))]
    shown = {Path(words.split()[1]).name for words in tables}
    assert {"guard.py", "study.py", "defaults.py", "merged.py", "run.py"} < shown
    assert shown - {script for script, *_ in made} == {"traffic.py"}  # which measures nothing
    of = {script: {words[1] for other, *words in runs if other == script and len(words) > 1} for script, *_ in runs}
    assert of["study.py"] == set(module("study_rows").DATA) and of["guard.py"] == set(module("guard").SEEDS)
    assert of["breaks.py"] == set(module("breaks").OF)
    kept = {word.rpartition("/")[2] for words in runs for word in words if word.endswith(".json")}
    assert kept == {"first-task.json", "input-energy.json", "random-features.json"}
    results = {str(path.relative_to(BENCHMARKS / "results")) for path in BENCHMARKS.glob("results/**/*.json")}
    elsewhere = {name for name in results if name.startswith(("gpu-", "cpu-amd")) or name == "dry-h100.json"}
    assert results - elsewhere == kept | evidence.FILES.keys()


def test_what_is_written_once_is_made_where_it_is_missing(module, tmp_path, monkeypatch):
    evidence = module("evidence")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/there.json").write_text("kept")
    (tmp_path / "writes.py").write_text("import sys\nopen(sys.argv[-1], 'x').write(sys.argv[1])\n")
    (tmp_path / "cut.py").write_text("import sys\nopen(sys.argv[-1], 'x').write('a part')\nraise SystemExit(9)\n")
    (tmp_path / "trains.py").write_text(
        "import sys\nfrom pathlib import Path\nrun = Path(sys.argv[-1])\nrun.mkdir()\n"
        "for name in ('log.txt', 'results.json'):\n    (run / name).write_text(name)\n"
    )
    (tmp_path / "documents.py").write_text("from pathlib import Path\nPath(__file__).with_name('documents').touch()\n")
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    monkeypatch.setattr(evidence, "RUNS", ())
    files = {"there.json": "writes.py a", "new.json": "writes.py b", "run/results.json": "trains.py"}
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--glyphs", str(tmp_path), "--fashion-mnist", str(tmp_path)])
    monkeypatch.setattr(evidence, "FILES", files | {"cut.json": "cut.py"})
    with pytest.raises(SystemExit, match=r"cut.py .* ended with 9"):
        evidence.main()
    assert not (tmp_path / "documents").exists()
    monkeypatch.setattr(evidence, "FILES", files)
    evidence.main()
    kept = {str(path.relative_to(tmp_path / "results")): path.read_text() for path in tmp_path.glob("results/**/*.*")}
    assert kept == {"there.json": "kept", "new.json": "b", "run/results.json": "results.json"}
    assert (tmp_path / "documents").exists()


def test_the_command_ends_with_the_first_script_that_fails(module, tmp_path, monkeypatch):
    evidence = module("evidence")
    (tmp_path / "writes.py").write_text("import sys\nopen(sys.argv[1] + '/' + sys.argv[2], 'w').close()\n")
    (tmp_path / "fails.py").write_text("raise SystemExit(7)\n")
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    runs = ("writes.py {glyphs} first", "fails.py", "writes.py {fashion_mnist} second")
    monkeypatch.setattr(evidence, "RUNS", runs)
    (tmp_path / "with a space").mkdir()
    given = ["evidence.py", "--glyphs", str(tmp_path / "with a space"), "--fashion-mnist", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=r"fails.py ended with 7; the same command goes on"):
        evidence.main()
    assert (tmp_path / "with a space" / "first").exists() and not (tmp_path / "second").exists()
