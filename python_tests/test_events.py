"""--tensorboard: what the event files hold, and what is said where the package is missing."""

import json
import sys

import pytest
from conftest import make_trainer

from janus_ext import train


def test_event_files_hold_the_run(benchmark, weights, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = make_trainer(benchmark, weights, tmp_path / "run", tensorboard=True).run()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "accuracy", "lr", "head_lr")
    expected = {f"epoch/{name}": [(i + 1, line[name]) for i, line in enumerate(lines)] for name in names}
    means = [sum(row) / len(row) for row in results["accuracy_matrix"]]
    ranks = [sum(rank.values()) / len(rank) for rank in results["basis_rank"]]
    expected |= {"task/acc": [*enumerate(means, 1)], "task/basis_rank": [*enumerate(ranks, 1)]}
    expected |= {f"task/{name}": [*enumerate(results[name], 1)][1:] for name in ("violation", "danger")}
    assert found.keys() == expected.keys() and len(lines) == 9
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(value)) for step, value in values], tag


def test_without_the_flag_nothing_is_written(benchmark, weights, tmp_path):
    make_trainer(benchmark, weights, tmp_path / "run").run()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train.main(["--tensorboard", "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--tensorboard" in message and "pip install tensorboard" in message
    assert not (tmp_path / "run").exists()
