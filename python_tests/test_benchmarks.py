"""The benchmarks' registry and tables: figures in the README are those of the JSON files beside them."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def call(command: str) -> subprocess.CompletedProcess[str]:
    """`command` as the documents spell it, run with this Python at the checkout's root."""
    words = shlex.split(command)
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)


def results(path: Path, **ratios: float) -> Path:
    path.write_text(json.dumps({"cases": [{"case": name, "ratio": ratio} for name, ratio in ratios.items()]}))
    return path


def generated_blocks() -> list[tuple[str, str]]:
    """(command, text) of every generated block of the README."""
    parts = (ROOT / "README.md").read_text().split("<!-- end -->")[:-1]
    blocks = [part.rpartition("<!-- ")[2].partition(" -->\n") for part in parts]
    return [(head.partition(": ")[2], text.strip()) for head, _, text in blocks]


@pytest.mark.parametrize(("command", "text"), generated_blocks(), ids=lambda value: value[:40])
def test_tables_are_what_their_commands_print(command: str, text: str) -> None:
    done = call(command)
    assert done.returncode == 0, done.stderr
    assert text == done.stdout.strip()


def test_the_readme_has_all_tables() -> None:
    assert {command.partition(" ")[2] for command, _ in generated_blocks()} == {
        "benchmarks/run.py table benchmarks/results/cpu.json",
        "benchmarks/run.py table benchmarks/results/program.json",
        "benchmarks/estimators.py --table benchmarks/results/estimators.json",
        "benchmarks/loader.py --table benchmarks/results/loader.json",
        "benchmarks/sweep.py table methods",
    }


def test_every_target_is_a_case_and_was_reached() -> None:
    listed = [line.split()[0] for line in call("python benchmarks/run.py list").stdout.splitlines()]
    stored = [json.loads((BENCHMARKS / f"results/{name}.json").read_text()) for name in ("cpu", "program")]
    measured = {row["case"]: row for result in stored for row in result["cases"]}
    assert list(measured) == listed
    with_target = {
        "gram-768",
        "gram-384",
        "gram-bf16-768",
        "gram-bf16-384",
        "rectify",
        "lora-linear",
        "margin",
        "commit",
        "step",
        "step-observing",
        "flatness",
        "task",
    }
    assert with_target <= {name for name, row in measured.items() if row["target"]}
    missed = [name for name, row in measured.items() if row["target"] and row["ratio"] < row["target"]]
    assert missed == ["task"], "a target that is missed stands in the README with its reason, and here by name"


def test_twenty_tasks_stay_flat() -> None:
    ratios = json.loads((BENCHMARKS / "results/flatness.json").read_text())["last_over_first"]
    assert max(ratios.values()) <= 1.05
    readme = (ROOT / "README.md").read_text()
    assert f"{ratios['step_ms']:.3f}" in readme and f"{ratios['peak_mb']:.3f}" in readme


def test_a_case_runs_and_writes_json(tmp_path: Path) -> None:
    done = call(f"python benchmarks/run.py run margin --repeats 2 --json {tmp_path / 'a.json'}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert row["case"] == "margin" and row["ratio"] > 0 and row["difference"] < 1e-4


def test_compare_tells_a_loss(tmp_path: Path) -> None:
    before, same = (
        results(tmp_path / "a.json", gram=1.5, margin=1.1),
        results(tmp_path / "b.json", gram=1.4, margin=1.2),
    )
    worse, other = results(tmp_path / "c.json", gram=1.1, margin=1.1), results(tmp_path / "d.json", gram=1.5)
    codes = [call(f"python benchmarks/run.py compare {before} {after}").returncode for after in (same, worse, other)]
    assert codes == [0, 1, 0]


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", BENCHMARKS / "results/estimators.json"):
        done = call(f"python benchmarks/run.py table {file}")
        assert done.returncode == 2 and f"{file} is no result of `run --json`" in done.stderr


def test_unknown_names_are_refused() -> None:
    done = call("python benchmarks/run.py run nothing")
    assert done.returncode != 0 and "no such case: nothing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("methods --rows nothing", "no such rows: nothing"),
        ("methods --seeds 0 100", "--seeds 100: methods are tuned on them"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_report(arguments: str, said: str) -> None:
    done = call(f"python benchmarks/sweep.py {arguments}")
    assert done.returncode == 2 and said in done.stderr


def test_a_finished_cell_is_told_by_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sweep = importlib.import_module("sweep")

    def config(seed: int = 0, **changes: Any) -> dict[str, Any]:
        return sweep.cell_config({"method": "janus"} | changes, seed)

    line = {"row": "janus", "seed": 0, "assets": "a", "config": config()}
    assert sweep.is_done(line, "janus", config(), "a")
    others = [("lora", config(), "a"), ("janus", config(seed=1), "a"), ("janus", config(), "b")]
    assert not any(sweep.is_done(line, *other) for other in [*others, ("janus", config(lr=1e-3), "a")])
    del line["config"]["clip_norm"]  # as if the option had come later
    assert sweep.is_done(line, "janus", config(), "a")
    assert not sweep.is_done(line, "janus", config(clip_norm=1.0), "a")
