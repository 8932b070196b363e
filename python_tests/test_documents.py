"""Every Python snippet of the documents, and every example, runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IGNORED = {"build", "runs", "node_modules"}
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in IGNORED or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
FENCE = re.compile(r"^```(?:python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(FENCE.findall(path.read_text(encoding="utf-8")))
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*arguments: str, folder: Path) -> str:
    """What a program prints, run in an empty folder as a reader would run it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_it_stands(code, tmp_path):
    run("-c", code, folder=tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_as_it_stands(path, tmp_path):
    run(str(path), folder=tmp_path)


def test_there_are_snippets_and_examples():
    assert any("README.md" in snippet.id for snippet in SNIPPETS) and EXAMPLES
