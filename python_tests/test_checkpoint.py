"""Files of a run: JSON without NaN, tensors that come back, and no file that is half written."""

import json

import pytest
import torch

from janus_ext.errors import CheckpointError
from janus_ext.runs import checkpoint


def test_json_has_null_instead_of_nan(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, float("-inf")], "b": {"c": (1, None)}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5, None], "b": {"c": [1, None]}}


def test_json_has_a_list_of_numbers_on_one_line_or_on_full_ones(tmp_path):
    value = {
        "matrix": [[1.5], [2.0, None]],
        "ids": list(range(200)),
        "names": ["a [\n 1\n]", "caf\udce9", "[ 2 ]"],
        "nested": {"seed": [0], "none": [], "flags": [True, -1e-30]},
    }
    checkpoint.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="ascii")
    assert checkpoint.read_json(tmp_path / "x.json") == value
    for line in (
        "    [1.5],",
        "    [2.0, null]",
        '    "seed": [0],',
        '    "flags": [true, -1e-30]',
        "    0, 1, 2, 3, ",
    ):
        assert f"\n{line}" in text, line
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) < 35


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"version": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="x.json cannot be written: .*No space left"):
        checkpoint.write_json(path, {"version": 2})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.write_tensors(tmp_path / "y.safetensors", {"t": torch.zeros(2)})
    assert json.loads(path.read_text()) == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_tensors_survive_a_round_trip_and_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    shared = torch.arange(6.0)
    checkpoint.write_tensors(path, {"a": shared, "b": shared.view(2, 3).T, "empty": torch.zeros(4, 0)}, {"task": "3"})
    tensors, metadata = checkpoint.read_tensors(path)
    assert torch.equal(tensors["b"], shared.view(2, 3).T) and tensors["empty"].shape == (4, 0)
    assert metadata == {"task": "3", checkpoint.SHA256: metadata[checkpoint.SHA256]}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="x.safetensors"):
        checkpoint.read_tensors(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.read_tensors(tmp_path / "nowhere.safetensors")
