"""The run folder: which one is taken, that nobody's files are touched, and that one process alone works in it."""

import multiprocessing
import pathlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs import checkpoint, choice
from janus_ext.runs import folder as run_folder


def test_the_default_folder_is_numbered_when_it_holds_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(seed=(7,))
    assert choice.choose_folder(config) == Path("runs/emoji-janus-7")
    for name in ("emoji-janus-7", "emoji-janus-7-2"):
        checkpoint.make_folder(Path("runs") / name)
        checkpoint.write_json(Path("runs") / name / "results.json", {})
    assert choice.choose_folder(config) == Path("runs/emoji-janus-7-3")
    assert choice.choose_folder(replace(config, seed=(1, 2))) == Path("runs/emoji-janus")


def save_learner(folder: Path) -> dict[Path, bytes]:
    """The files of what stands for a saved learner, which no training may touch."""
    checkpoint.make_folder(folder / "checkpoints")
    checkpoint.write_json(folder / "config.json", TrainConfig().resolved().to_json() | {"benchmark": None})
    checkpoint.write_tensors(folder / "checkpoints" / "model.safetensors", {})
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_learner_is_no_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = (Path("runs") / f"emoji-janus-0{end}" for end in ("", "-2", "-3"))
    plain, resuming = (TrainConfig(resume=resume).resolved() for resume in (False, True))
    save_learner(second)
    checkpoint.write_json(checkpoint.make_folder(first) / "results.json", {})
    assert choice.choose_folder(plain) == third and choice.choose_folder(resuming) == first
    checkpoint.make_folder(third)
    assert choice.choose_folder(resuming) == third
    save_learner(Path("runs") / "emoji-janus-1")
    for resume in (False, True):
        config = TrainConfig(resume=resume, seed=(1,)).resolved()
        assert choice.choose_folder(config) == Path("runs/emoji-janus-1-2")


@pytest.mark.parametrize("call", [[], ["--resume"], ["--seed", "0", "1"]])
def test_a_saved_learner_is_refused_and_stays(tmp_path, capsys, call):
    files = save_learner(tmp_path)
    assert train.main(["--output", str(tmp_path), *call]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "holds a saved learner; choose another folder with --output" in message
    with pytest.raises(ArgumentError, match="holds a saved learner"), opened(tmp_path):
        pass
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_unfinished_run_starts_over(tmp_path):
    with opened(tmp_path):
        pass
    checkpoint.append_json_line(tmp_path / "metrics.jsonl", {"epoch": 0})
    checkpoint.write_tensors(checkpoint.make_folder(tmp_path / "checkpoints") / "factors-9.safetensors", {})
    (checkpoint.make_folder(tmp_path / "tensorboard") / "events.out.tfevents.1.host").touch()
    with opened(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoints", "tensorboard"}
        assert not any((tmp_path / "checkpoints").iterdir()) and not any((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_files_of_others_are_never_touched(tmp_path, name, capsys):
    (tmp_path / name).write_text('{"model_type": "vit"}')
    assert train.main(["--output", str(tmp_path)]) == 2
    assert "no run of this program" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, '{"model_type": "vit"}')]


def test_files_that_are_named_like_ours_are_left_alone_too(tmp_path):
    names = ("a.txt", ".config.json.old.tmp", ".config.json.7.tmp", "checkpoints/.w.safetensors.7.tmp")
    checkpoint.make_folder(tmp_path / "checkpoints")
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ArgumentError, match="no run of this program"), opened(tmp_path):
        pass
    assert all((tmp_path / name).exists() for name in names)


def opened(folder, begin=True):
    return run_folder.opened(folder, TrainConfig().resolved().to_json(), begin)


def test_what_a_kill_in_the_first_write_leaves_is_no_strangers(tmp_path):
    (tmp_path / ".config.json.7.tmp").touch()
    with opened(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_in_use_is_refused_until_it_is_free(tmp_path):
    with opened(tmp_path):
        before = sorted(tmp_path.iterdir())
        for begin in (True, False):
            with pytest.raises(ArgumentError, match="in use by another process"), opened(tmp_path, begin):
                pass
        assert sorted(tmp_path.iterdir()) == before
    with opened(tmp_path, begin=False):
        pass


def test_a_run_that_another_process_has_finished_meanwhile_is_not_cleared(tmp_path):
    with opened(tmp_path):
        checkpoint.write_json(tmp_path / "results.json", {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArgumentError, match="holds a finished run"), opened(tmp_path):
        pass
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_is_reserved_for_one_and_gone_if_nothing_came_into_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty"):
        with run_folder.reserved(tmp_path / name):
            with pytest.raises(ArgumentError, match="in use"), run_folder.reserved(tmp_path / name):
                pass
            assert (tmp_path / name).is_dir()
    assert not (tmp_path / "new" / "deep").exists() and (tmp_path / "empty").is_dir()
    with run_folder.reserved(tmp_path / "new"):
        checkpoint.replace_folder(tmp_path / "new", lambda made: (made / "config.json").touch())
        with pytest.raises(ArgumentError, match="is there already"), run_folder.reserved(tmp_path / "new"):
            pass
    assert (tmp_path / "new" / "config.json").exists()


def test_a_folder_that_keeps_its_place_is_refused_before_anything_is_learned(tmp_path, mounted):
    """As an empty volume that is mounted there does: what is saved takes a folder's place as a whole."""
    (tmp_path / "volume").mkdir()
    with pytest.raises(CheckpointError, match="as a whole: .*busy; "), run_folder.reserved(tmp_path / "volume"):
        pytest.fail("nothing is to be learned")
    assert [path.name for path in tmp_path.rglob("*")] == ["volume"]


def stay(running) -> None:
    running.set()
    time.sleep(60)


def test_processes_that_a_run_started_do_not_keep_its_folder(tmp_path):
    """The workers of a run that was killed live on for seconds."""
    with opened(tmp_path):
        context = multiprocessing.get_context("fork")
        running = context.Event()
        child = context.Process(target=stay, args=(running,))
        child.start()
        assert running.wait(60)
        with pytest.raises(ArgumentError, match="in use"), opened(tmp_path):
            pass  # starting it has not freed the folder either
    with opened(tmp_path, begin=False):
        assert child.is_alive()
    child.kill()
    child.join()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with opened(tmp_path):
        assert "cannot be locked" in caplog.text


class CutOff(BaseException):
    """Ends the process's work on the spot."""


@pytest.mark.parametrize("removals", range(5))
def test_clearing_that_was_cut_off_leaves_a_run_of_ours_without_its_model(tmp_path, monkeypatch, removals):
    with opened(tmp_path):
        checkpoint.make_folder(tmp_path / "checkpoints")
        for name in ("checkpoints/model.safetensors", "checkpoints/method-1.safetensors", "metrics.jsonl", "log.txt"):
            (tmp_path / name).touch()
    unlink, removed = pathlib.Path.unlink, []

    def cut(path, missing_ok=False):
        if path.name.endswith(".tmp"):
            return unlink(path, missing_ok)
        if len(removed) == removals:
            raise CutOff
        removed.append(path)
        return unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "unlink", cut)
        if removals < 4:
            with pytest.raises(CutOff), opened(tmp_path):
                pass
        else:
            with opened(tmp_path):
                pass
    assert (tmp_path / "checkpoints" / "model.safetensors").exists() == (removals == 0)
    with opened(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoints"}


def test_with_resume_the_last_default_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(resume=True).resolved()
    first, second = Path("runs/emoji-janus-0"), Path("runs/emoji-janus-0-2")
    assert choice.choose_folder(config) == first
    checkpoint.make_folder(first)
    checkpoint.write_json(first / "results.json", {})
    assert choice.choose_folder(config) == first
    assert choice.choose_folder(replace(config, resume=False)) == second
    checkpoint.make_folder(second)
    assert choice.choose_folder(config) == second


@pytest.mark.parametrize("several", [False, True])
def test_a_run_that_was_begun_with_other_settings_is_left_alone(tmp_path, monkeypatch, several):
    monkeypatch.chdir(tmp_path)
    config = replace(TrainConfig(seed=(0, 1) if several else (0,)).resolved(), tasks=10)  # of the benchmark
    other = replace(config, lr=0.1)
    first = Path("runs/emoji-janus" if several else "runs/emoji-janus-0")
    second = first.with_name(f"{first.name}-2")
    place = first / "seed-1" if several else first
    checkpoint.make_folder(place)
    begun = replace(config, seed=(1,) if several else (0,))
    checkpoint.write_json(place / "config.json", begun.to_json())
    for resume in (False, True):
        assert choice.choose_folder(replace(config, resume=resume)) == first
    assert choice.choose_folder(other) == second
    assert choice.choose_folder(replace(config, data_dir=Path("elsewhere"))) == second
    assert choice.choose_folder(replace(config, workers=3)) == first  # no result depends on it
    assert choice.choose_folder(replace(config, tasks=5)) == second
    resumed = replace(other, resume=True)
    assert choice.choose_folder(resumed) == first  # where what differs is said
    place = second / "seed-0" if several else second
    checkpoint.make_folder(place)
    checkpoint.write_json(place / "config.json", other.to_json())
    assert choice.choose_folder(resumed) == choice.choose_folder(other) == second


def test_the_same_call_goes_back_to_the_folder_that_it_has_begun(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "run", stop)
    call = f"--weights {weights} --limit-per-class 1 --rank 4 --device cpu --amp off --epochs 1"
    for words in (call, call, f"{call} --resume", f"{call} --lr 0.5", f"{call} --lr 0.5"):
        train.main(words.split())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["emoji-janus-0", "emoji-janus-0-2"]
    for words in (f"{call} --tasks 5 --seed 3", f"{call} --seed 3", f"{call} --tasks 10 --seed 3"):
        train.main(words.split())  # ten, where none are said: runs of five are other runs
    tasks = [
        checkpoint.read_json(tmp_path / "runs" / name / "config.json")["tasks"]
        for name in ("emoji-janus-3", "emoji-janus-3-2")
    ]
    assert tasks == [5, 10] and not (tmp_path / "runs" / "emoji-janus-3-3").exists()


def test_a_damaged_configuration_is_named(tmp_path, capsys):
    for text in ("", "{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert train.main(["--output", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "config.json cannot be read" in message
        assert (tmp_path / "config.json").read_text() == text
