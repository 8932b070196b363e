"""Files of a run: JSON without NaN, tensors that come back, and no file that is half written."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from janus_ext.errors import ArgumentError, CheckpointError
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


def test_where_nothing_can_be_deleted_either_the_file_is_named(tmp_path, monkeypatch):
    """As on a file system that is read-only, which says so even of what is not there."""

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match="x.json cannot be written: .*Read-only"):
        checkpoint.write_json(tmp_path / "x.json", {})


@pytest.fixture
def on_disk(monkeypatch) -> list[str]:
    """What happens to files and folders, in its order: flushed or moved."""
    happened, sync, move = [], os.fsync, os.replace

    def syncing(handle: int) -> None:
        happened.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def moving(source, target) -> None:
        happened.append(f"replace {Path(target).name}")
        move(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", syncing)
    monkeypatch.setattr(checkpoint.os, "replace", moving)
    return happened


def test_files_and_the_names_of_files_are_flushed_to_the_disk(tmp_path, on_disk):
    """A name lies in its folder: without that a power cut may lose a file that was moved there."""
    checkpoint.make_folder(tmp_path / "run" / "checkpoints")
    assert sorted(on_disk) == sorted(["fsync run", f"fsync {tmp_path.name}"])
    on_disk.clear()
    checkpoint.write_tensors(tmp_path / "run" / "x", {"a": torch.zeros(2)})
    temporary = on_disk[0].removeprefix("fsync ")
    assert on_disk == [f"fsync {temporary}", "replace x", "fsync run"] and temporary.startswith(".x.")
    on_disk.clear()
    for _ in range(2):
        checkpoint.append_json_line(tmp_path / "run" / "lines", {})
    assert on_disk == ["fsync lines", "fsync run", "fsync lines"]
    on_disk.clear()
    for name in ("learner", "learner"):
        checkpoint.replace_folder(tmp_path / name, lambda made: None)
        assert on_disk[-1] == f"fsync {tmp_path.name}"


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


# folders -------------------------------------------------------------------------------------------------------------
def fill(folder, version: str) -> None:
    (folder / "config.json").write_text(version)
    (checkpoint.make_folder(folder / "checkpoints") / f"{version}.safetensors").touch()


def contents(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(params=[True, False], ids=["at once", "by two renames"])
def place(request, tmp_path, monkeypatch):
    """A folder with a first version, on a system that exchanges two folders at once, and on another."""
    if not request.param:
        monkeypatch.setattr(checkpoint, "_exchange_at_once", lambda made, place: False)
    checkpoint.replace_folder(tmp_path / "x", lambda made: fill(made, "old"))
    return tmp_path / "x"


def test_this_system_exchanges_folders_at_once(tmp_path):
    for name in ("a", "b"):
        fill(checkpoint.make_folder(tmp_path / name), name)
    if not checkpoint._exchange_at_once(tmp_path / "a", tmp_path / "b"):
        pytest.skip("neither this C library nor this file system can")
    assert [(tmp_path / name / "config.json").read_text() for name in ("a", "b")] == ["b", "a"]


def test_a_folder_is_replaced_as_a_whole(place):
    checkpoint.replace_folder(place, lambda made: fill(made, "new"))
    assert contents(place) == {"config.json", "checkpoints/new.safetensors"}
    assert (place / "config.json").read_text() == "new" and [path.name for path in place.parent.iterdir()] == ["x"]


def test_files_of_others_in_a_replaced_folder_stay(place):
    (place / "notes.txt").write_text("mine")
    (checkpoint.make_folder(place / "evaluation" / "checkpoints") / "config.json").write_text("other")
    (place / "link").symlink_to("nowhere")
    checkpoint.replace_folder(place, lambda made: fill(made, "new"))
    others = {"notes.txt", "evaluation/checkpoints/config.json", "link"}
    assert contents(place) == {"config.json", "checkpoints/new.safetensors"} | others
    assert (place / "notes.txt").read_text() == "mine" and (place / "config.json").read_text() == "new"


def test_whether_an_empty_folder_can_be_replaced_is_tried_and_undone(place):
    (place.parent / "empty").mkdir()
    before = (place.parent / "empty").stat().st_ino
    checkpoint.require_replaceable(place.parent / "empty")
    assert (place.parent / "empty").stat().st_ino == before
    assert sorted(path.name for path in place.parent.iterdir()) == ["empty", "x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("calls", range(4))
def test_whatever_ends_the_exchange_a_whole_folder_is_there(place, monkeypatch, error, calls):
    """Before, between and after the renames, and in the writing itself."""
    (place / "notes.txt").touch()
    replace, made = checkpoint.os.replace, []

    def cut(*names):
        made.append(names)
        if len(made) == calls + 1:
            raise error
        return replace(*names)

    def write(folder):
        fill(folder, "new")
        if calls == 3:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "replace", cut)
        try:
            checkpoint.replace_folder(place, write)
        except (KeyboardInterrupt, CheckpointError):
            pass
    version = (place / "config.json").read_text()
    assert contents(place) == {"config.json", f"checkpoints/{version}.safetensors", "notes.txt"}
    assert version == "old" or calls < 3
    assert not (place.parent / f".x.{checkpoint.os.getpid()}.tmp").exists()
    (checkpoint.make_folder(place.parent / f".x.{checkpoint.os.getpid()}.tmp") / "of a kill").touch()
    checkpoint.replace_folder(place, lambda made: fill(made, "newer"))
    assert contents(place) == {"config.json", "checkpoints/newer.safetensors", "notes.txt"}


def test_of_a_link_what_it_leads_to_is_replaced(place):
    link = place.with_name("link")
    link.symlink_to("x")
    checkpoint.replace_folder(link, lambda made: fill(made, "new"))
    assert link.is_symlink() and (place / "config.json").read_text() == "new"
    place.with_name("dangling").symlink_to("later")
    checkpoint.replace_folder(place.with_name("dangling"), lambda made: fill(made, "new"))
    assert (place.with_name("later") / "config.json").read_text() == "new"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/", "file"])
def test_what_no_folder_can_be_put_in_the_place_of_is_named(tmp_path, monkeypatch, name):
    checkpoint.make_folder(tmp_path / "x")
    (tmp_path / "x" / "file").touch()
    monkeypatch.chdir(tmp_path / "x")
    with pytest.raises(ArgumentError, match=f"^'?{name or '.'}'? is (a file|the current folder)"):
        checkpoint.replace_folder(Path(name), lambda made: fill(made, "new"))
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]
