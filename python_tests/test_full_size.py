"""The published grid: calls that the program accepts, a table of what was run, a dry run without data or weights."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from janus_ext.config import command_line

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def full_size(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("full_size")


def printed(full_size, monkeypatch, capsys, words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["full_size.py", *shlex.split(words)])
    full_size.main()
    return capsys.readouterr().out


def test_every_call_is_one_that_the_program_accepts(full_size, monkeypatch, capsys, tmp_path):
    (tmp_path / "list.txt").touch()
    seen = {}
    for benchmark in full_size.BENCHMARKS:
        more = f"--class-list {tmp_path / 'list.txt'}" if benchmark == "imagenet-100" else ""
        for line in printed(full_size, monkeypatch, capsys, f"list {benchmark} --data-dir D {more}").splitlines():
            program, *words = shlex.split(line)
            config = command_line.parse(words).resolved()
            assert program == "janus_ext.train" and config.resume and config.preset == "paper"
            assert config.seed == (0, 1, 2, 3, 4)
            seen[str(config.output)] = (config.benchmark, config.tasks, config.method, config.rectify, config.estimator)
    rows = sum(len(reported) + len(full_size.OURS) for reported in full_size.REPORTED.values())
    assert len(seen) == rows, "two rows write to one folder"
    for setting in full_size.REPORTED:
        folder = "runs/full-size/{}-{}".format(*setting)
        assert seen[f"{folder}/Janus-LoRA"][3] == "tangent", "the paper's rectification"
        assert seen[f"{folder}/Janus-LoRA-exact"][3] == "exact"
    assert seen["runs/full-size/imagenet-r-20/InfLoRA"] == ("imagenet-r", 20, "inflora", "none", "gram")
    assert seen["runs/full-size/imagenet-r-10/ablation-GR"] == ("imagenet-r", 10, "janus", "tangent", "none")
    assert seen["runs/full-size/imagenet-r-10/LoRA-GPM-with-GR"] == ("imagenet-r", 10, "lora-gpm", "tangent", "gram")


def test_the_table_has_means_of_finished_seeds_beside_what_is_reported(full_size, monkeypatch, capsys, tmp_path):
    values = {0: (76.0, 82.0, -6.0), 3: (75.0, 81.0, None)}
    for seed, (acc, maa, bwt) in values.items():
        folder = tmp_path / "imagenet-r-10" / "Janus-LoRA" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"acc": acc, "maa": maa, "bwt": bwt}))
        of_grid = full_size.call(("imagenet-r", 10), "Janus-LoRA", tmp_path, tmp_path, ["--device", "cuda:1"])
        config = command_line.parse(of_grid[1:]).resolved().to_json()
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "imagenet-r-10" / "InfLoRA" / "seed-0").mkdir(parents=True)  # not finished
    *_, line = printed(full_size, monkeypatch, capsys, f"table --output {tmp_path}").splitlines()
    figures = "2 of 5 | 75.50 ± 0.71 | 75.78 | 81.50 ± 0.71 | 81.64 | -6.00 | -6.05 |"
    assert line == f"| imagenet-r | 10 | Janus-LoRA | {figures}"
    (folder / "config.json").write_text(json.dumps(config | {"epochs": 1, "limit_per_class": 2}))
    *_, line = printed(full_size, monkeypatch, capsys, f"table --output {tmp_path}").splitlines()
    assert line == f"| imagenet-r | 10 | Janus-LoRA (epochs 1, limit_per_class 2) | {figures}"
    with pytest.raises(SystemExit, match="holds no finished run"):
        printed(full_size, monkeypatch, capsys, f"table --output {tmp_path / 'imagenet-r-10'}")


def test_a_row_that_fails_is_named_and_the_others_go_on(full_size, monkeypatch, tmp_path, capsys):
    called, ends = [], iter([2, 0, 143])
    monkeypatch.setattr(full_size, "ended", lambda words: called.append(words) or next(ends))
    with pytest.raises(SystemExit, match=r"^failed: InfLoRA \(domainnet, 5 tasks\): exit status 2$"):
        words = f"run domainnet --data-dir D --rows InfLoRA Janus-LoRA --output {tmp_path} --device cuda:1 --amp bf16"
        printed(full_size, monkeypatch, capsys, words)
    assert len(called) == 2 and all(words[-4:] == ["--device", "cuda:1", "--amp", "bf16"] for words in called)
    with pytest.raises(SystemExit) as stopped:
        printed(full_size, monkeypatch, capsys, words)
    assert stopped.value.code == 143 and len(called) == 3


def test_ctrl_c_waits_for_what_the_call_still_keeps(tmp_path):
    child = "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: (time.sleep(1), sys.exit(130)))\n"
    child += "print('ready', flush=True)\ntime.sleep(60)"
    parent = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import full_size\n"
    parent += f"sys.exit(full_size.ended([sys.executable, '-c', {child!r}]))"
    heed = "import signal, os; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever the shell has
    words = [sys.executable, "-c", heed + parent]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as run:
        assert run.stdout.readline() == b"ready\n"
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        assert run.wait(timeout=60) == 130


def test_a_dry_run_needs_neither_data_nor_weights(full_size, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(full_size, "CLASSES", 4)
    monkeypatch.setattr(full_size, "EPOCHS", 2)
    small = "--backbone emoji --normalize model --batch-size 8 --workers 0 --amp off"
    printed(full_size, monkeypatch, capsys, f"dry --json {tmp_path / 'dry.json'} {small}")
    measured = json.loads((tmp_path / "dry.json").read_text())
    assert (measured["method"], measured["images"], measured["batch_size"]) == ("janus", 24, 8)
    assert 0 < 3 * measured["observing_step_seconds"] < measured["task_seconds"] and measured["peak_mb"] > 100
    for wrong, said in (
        ("--tasks 3", "--tasks is the dry run's own and cannot be chosen"),
        ("--batch-size 0", "--batch-size must lie in"),
        ("--device cup", "--device cup: no such device"),
    ):
        with pytest.raises(SystemExit) as ended:
            printed(full_size, monkeypatch, capsys, f"dry {small} {wrong}")
        message = capsys.readouterr().err
        assert ended.value.code == 2 and said in message and message.count("\n") == 1
    with pytest.raises(SystemExit):
        printed(full_size, monkeypatch, capsys, f"dry --table {BENCHMARKS / 'results' / 'cpu.json'}")
    assert "is no result of `dry --json`" in capsys.readouterr().err
    measured |= {"step_seconds": 3.0, "observing_step_seconds": 4.0}
    (tmp_path / "dry.json").write_text(json.dumps(measured))
    table = printed(full_size, monkeypatch, capsys, f"dry --table {tmp_path / 'dry.json'}")
    wanted = 289_082 / 8 * (4 * 3.0 + 4.0) / 3600
    assert f"| the steps of one run of domainnet, at that speed | {wanted:.3g} h |" in table
