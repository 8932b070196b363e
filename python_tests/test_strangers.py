"""What SECURITY.md says of strangers' files: they fail in a line, give the same results, and never run code."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import learner_of
from results import set_settings
from trees import folders

from janus_ext import ContinualLearner, evaluate, predict, train
from janus_ext.backbone import load_backbone
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs import checkpoint
from janus_ext.runs.folder import require_within

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("a\n\x1b]0;title\x07", "b\u202e\x9b2J")  # of classes: a new line, a terminal's title, a turned direction


class Harmful:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path) -> Iterator[Path]:
    """What must not be there in the end."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def bomb(tmp_path, trace) -> Path:
    """A file of weights whose reading would leave it."""
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": Harmful(trace)}, path)
    return path


@pytest.fixture(scope="module")
def saved(weights, tmp_path_factory) -> Path:
    """A learner of two classes, in a folder."""
    root = tmp_path_factory.mktemp("saved")
    folders(root / "images", 2, 4)
    learner = learner_of(weights, head="ncm", epochs=1)
    learner.learn(root / "images")
    learner.save(root / "learner")
    return root / "learner"


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a wait that nobody should begin."""
    signal.alarm(30)
    yield
    signal.alarm(0)


def rewritten(folder: Path, to: Path, change: dict[str, Any]) -> Path:
    """A copy with other settings, all of whose sums are right, as a stranger would make it."""
    (to / "checkpoints").mkdir(parents=True)
    for path in ["config.json", *(f"checkpoints/{name}.safetensors" for name in ("factors-0", "method-0", "model"))]:
        shutil.copy(folder / path, to / path)
    set_settings(to, change)
    return to


# whole folders --------------------------------------------------------------------------------------------------------
def test_altered_files_are_refused_or_change_nothing():
    """Some of what the script does at length; it forks, so it has a process of its own."""
    call = [sys.executable, str(BENCHMARKS / "fuzz_folders.py"), "--flips", "60", "--others", "7", "--forged", "8"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "faults: 0" in done.stdout, done.stdout + done.stderr
    tally = dict(line.rsplit(None, 1) for line in done.stdout.splitlines() if line.startswith("flip: "))
    assert int(tally["flip: refused"]) >= 20 and int(tally["flip: the same"]) >= 20


def test_the_fuzz_notices_what_no_file_may_do(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from fuzz_commands import Outcome, _watched, in_child
    from fuzz_folders import Case, fault

    case, right = Case("flip", "finished", "config.json", 0), Outcome(status=0, out="a")
    assert fault(case, right, right) is None
    assert "other results" in fault(case, Outcome(status=0, out="b"), right)
    assert "status 3" in fault(case, Outcome(status=3), right)
    assert "other results" in fault(case, Outcome(status=2, err="no name"), right)
    assert fault(case, Outcome(status=2, err="janus_ext.train: config.json was altered"), right) is None
    assert "signal 9" in in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)).trouble
    assert "ZeroDivisionError" in in_child(lambda: _watched(lambda: 1 // 0)).trouble
    assert "os.system" in in_child(lambda: _watched(lambda: os.system("true"))).trouble


# code -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "BOMB"},
        {"pretrained": True, "pretrained_cfg": {"file": "BOMB"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "BOMB"}},
        {"pretrained": True},
        {"cache_dir": "BOMB"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_a_run_says_of_its_network_loads_nothing(saved, tmp_path, bomb, options):
    """timm unpickled some of these before it had weights_only."""
    options = json.loads(json.dumps(options).replace("BOMB", str(bomb)))
    network = checkpoint.read_json(saved / "config.json")["network"]
    network |= {"options": network["options"] | options}
    with pytest.raises(CheckpointError, match="its description names what is to be loaded"):
        ContinualLearner.load(rewritten(saved, tmp_path / "run", {"network": network}))
    folder = tmp_path / "folder"
    folder.mkdir()
    described = {"architecture": "vit_tiny_patch16_224", "model_args": options, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="its description names what is to be loaded"):
        load_backbone(f"local-dir:{folder}")


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "local-dir:/", "os:system", 7, ["x"], "no_such_model"])
def test_a_network_is_one_of_timms(saved, tmp_path, name):
    network = checkpoint.read_json(saved / "config.json")["network"] | {"name": name}
    with pytest.raises(CheckpointError, match="timm has no network|no backbone can be made"):
        ContinualLearner.load(rewritten(saved, tmp_path / "run", {"network": network}))


@pytest.mark.parametrize(
    "change",
    [
        {"network": "x"},
        {"network": {}},
        {"network": {"name": None, "options": {}, "cfg": None}},
        {"probe": [[]]},
        {"probe": "x"},
        {"view_margin": "1.0"},
        {"view_margin": 1e300},
        {"view_crop_mode": "border"},
        {"view_interpolation": 'BILINEAR); import os; os.system("x"'},
        {"learned_from": "photos"},
        {"learned_from": [7]},
        {"data_dir": 7},
        {"seed": "longer than a number may be"},
        {"tasks": "9" * 5000},
        {"method": "os:system"},
        {"rank": 10**30},
    ],
    ids=lambda change: f"{change}"[:50],
)
def test_settings_that_cannot_be_are_one_line(saved, tmp_path, capsys, change):
    if "seed" in change:
        run = rewritten(saved, tmp_path / "run", {})
        text = (run / "config.json").read_text().replace('"seed": [0]', f'"seed": [{"9" * 5000}]')
        (run / "config.json").write_text(text)
    else:
        run = rewritten(saved, tmp_path / "run", change)
    assert predict.main([str(run), str(saved.parent / "images")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("janus_ext.predict: ") and len(message) < 700


@pytest.mark.parametrize("kind", ["pth", "pt", "bin", "npz", "npy", "safetensors"])
def test_weight_files_run_no_code(tmp_path, trace, kind):
    path = tmp_path / f"x.{kind}"
    if kind in ("npz", "npy"):
        values = np.array([Harmful(trace)], dtype=object)
        np.savez(path, **{"Transformer/encoderblock/x": values}) if kind == "npz" else np.save(path, values)
    elif kind == "safetensors":
        path.write_bytes(pickle.dumps(Harmful(trace)))
    else:
        torch.save({"state_dict": {"x": torch.zeros(2)}, "optimizer": Harmful(trace)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_backbone("vit_tiny_patch16_224", weights=str(path))
    assert "\n" not in str(caught.value)


# files that are none --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["config.json", "checkpoints/model.safetensors", "checkpoints/method-0.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_nobody_waits_for_a_pipe(saved, tmp_path, alarm, capsys, make, name):
    run = rewritten(saved, tmp_path / "run", {})
    (run / name).unlink()
    make(run / name)
    assert predict.main([str(run), str(saved.parent / "images")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "it is no file" in message


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "checkpoints", "plots", "tensorboard", "evaluation"])
def test_a_run_writes_nowhere_else(photos, weights, tmp_path, capsys, name):
    """Where a stranger's folder has a link, or a pipe."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("mine")
    (mine / "text").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    settings = checkpoint.to_json({"benchmark": "folder", "method": "janus", "seed": [0]})
    (run / "config.json").write_text(settings)
    (run / name).symlink_to(mine / "text" if "." in name else mine)
    flags = f"--benchmark folder --data-dir {photos} --backbone emoji --weights {weights} --workers 0 --output {run}"
    assert train.main(flags.split()) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{name} is a link" in message and "within its own folder" in message
    assert {path.name: path.read_text() for path in mine.iterdir()} == dict.fromkeys(
        ("model.safetensors", "text"), "mine"
    )
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(ArgumentError, match=f"{name} is no (file|folder)"):
        require_within(run)


def test_an_evaluation_goes_nowhere_else(saved, tmp_path, capsys):
    run = rewritten(saved, tmp_path / "run", {})
    (tmp_path / "mine").mkdir()
    (run / "evaluation").symlink_to(tmp_path / "mine")
    images = str(saved.parent / "images")
    assert evaluate.main([str(run), "--data-dir", images]) == 2
    assert "evaluation is a link" in capsys.readouterr().err and not list((tmp_path / "mine").iterdir())
    assert evaluate.main([str(run), "--data-dir", images, "--output", str(tmp_path / "elsewhere")]) == 0


# what a terminal shows ------------------------------------------------------------------------------------------------
def test_names_are_shown_and_not_obeyed(weights, tmp_path, capsys):
    folders(tmp_path / "images", 2, 3, NAMES.__getitem__)
    flags = f"--benchmark folder --backbone emoji --weights {weights} --epochs 1 --workers 0 --no-plots --tasks 1"
    call = [*flags.split(), "--data-dir", str(tmp_path / "images"), "--output", str(tmp_path / "run")]
    (tmp_path / "images" / NAMES[0] / "x.heic").touch()
    assert train.main(call) == 0 and evaluate.main([str(tmp_path / "run")]) == 0
    assert predict.main([str(tmp_path / "run"), str(tmp_path / "images")]) == 0
    (tmp_path / "images" / NAMES[1] / "y\x1b[2J.jpg").touch()
    assert predict.main([str(tmp_path / "run"), str(tmp_path / "images")]) == 1
    assert train.main([*call[:-1], str(tmp_path / "other")]) == 2
    assert train.main([*call, "--check-data"]) == 2
    assert train.main([*call[:-1], str(tmp_path / "images" / NAMES[0] / "x.heic")]) == 2
    shown = "".join(capsys.readouterr())
    assert shown.count("\\x1b") >= 4 and not set("\x1b\x07\x9b\u202e") & set(shown)
    assert not set("\x1b\x07\x9b\u202e") & set((tmp_path / "run" / "log.txt").read_text())
