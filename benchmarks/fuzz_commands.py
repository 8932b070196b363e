"""Small real runs, and what the commands make of one: each in a forked process with a limit and a watch on it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from janus_ext import ContinualLearner, evaluate, predict, train
from janus_ext.backbone.network import make_vision_transformer
from janus_ext.reports import evaluation
from janus_ext.runs.checkpoint import read_json, read_tensors
from janus_ext.training.loop import Learner

ACTIONS = {  # what is asked of each run
    "finished": ("predict", "evaluate", "resume"),
    "unfinished": ("predict", "evaluate", "resume"),  # cut off within its second task
    "begun": ("resume",),  # within its first
    "learner": ("predict", "evaluate"),
}
ARCHITECTURE = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = "--benchmark folder --backbone emoji --epochs 2 --batch-size 4 --tasks 2 --workers 0 --device cpu --amp off"
FLAGS += " --head ncm --energy-start 0.6 --energy-end 0.6 --energy-power 1 --no-plots"
CUTS = {"unfinished": 9, "begun": 3}  # steps after which SIGTERM comes; a task has 6
SECONDS = 60
MEMORY = 4 << 30  # bytes more than what is there at the start
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


@dataclass
class Outcome:
    """What a command did: its status, what it printed, what it wrote; and ``trouble``, if it did what none should."""

    status: int | None = None
    out: str = ""
    err: str = ""
    wrote: str = ""
    trouble: str = ""

    def same_as(self, other: Outcome) -> bool:
        """Whether results are equal."""
        return (self.status, self.out, self.wrote) == (other.status, other.out, other.wrote)


# runs -----------------------------------------------------------------------------------------------------------------
def make_runs(root: Path) -> None:
    """The runs of ACTIONS below ``root``, and each with another seed."""
    torch.set_num_threads(1)  # forked processes have none of the threads of others
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    _make_photos(root / "photos")
    torch.manual_seed(0)
    metadata = {
        "architecture": json.dumps(ARCHITECTURE),
        "normalize": json.dumps({"mean": [0.5] * 3, "std": [0.2] * 3}),
    }
    tensors = make_vision_transformer(ARCHITECTURE).state_dict()
    save_file(tensors, root / "weights.safetensors", metadata)
    for seed, end in ((0, ""), (1, "-other")):
        for run in ("finished", *CUTS):
            status = in_child(
                lambda run=run, end=end, seed=seed: _train(root, root / f"{run}{end}", seed, CUTS.get(run))
            )
            assert status == (143 if run in CUTS else 0), (run, status)
        in_child(lambda end=end: ContinualLearner.load(root / f"finished{end}").save(root / f"learner{end}"))


def _make_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcd":
        pattern = rng.integers(0, 200, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = (pattern + rng.integers(0, 56, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def _train(root: Path, folder: Path, seed: int, steps: int | None = None) -> int:
    """The command's status; SIGTERM comes behind so many steps."""
    take, taken = Learner._step, []

    def step(self: Learner, *args: Any) -> Any:
        taken.append(None)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    Learner._step = step
    flags = [*FLAGS.split(), "--seed", str(seed), "--data-dir", str(root / "photos")]
    try:
        return train.main([*flags, "--weights", str(root / "weights.safetensors"), "--resume", "--output", str(folder)])
    finally:
        Learner._step = take


# commands -------------------------------------------------------------------------------------------------------------
def outcomes(root: Path, folder: Path, run: str) -> dict[str, Outcome]:
    """What each action makes of the run in ``folder``, --resume last: it alone changes it."""
    photos = root / "photos"
    where = ["--data-dir", str(photos)] if run == "learner" else []  # by itself, a run says where its images are
    calls: dict[str, Callable[[], int]] = {
        "predict": lambda: predict.main([str(folder), str(photos), "--workers", "0"]),
        "evaluate": lambda: evaluate.main([str(folder), *where, "--output", str(root / "evaluation")]),
        "resume": lambda: _train(root, folder, 0),
    }
    evaluation.save_confusion = lambda *_: None  # a picture of what evaluation.json holds takes most of the time
    found = {action: _watched(calls[action]) for action in ACTIONS[run]}
    if "resume" in found:
        found["resume"].out = ""  # it tells times
        if found["resume"].status == 0:
            found["resume"].wrote = _results(folder, trained=run != "finished")
    return found


def _watched(call: Callable[[], int]) -> Outcome:
    out, err, found = io.StringIO(), io.StringIO(), Outcome()
    done: list[str] = []
    _watchers.append(done)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found.status = call()
    except SystemExit as stop:
        found.status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        found.trouble = traceback.format_exc()[-1500:]
    finally:
        _watchers.remove(done)
    found.trouble = found.trouble or "; ".join(done)
    found.out, found.err = out.getvalue(), err.getvalue()
    return found


def _results(folder: Path, trained: bool) -> str:
    """A digest of what a run has come to: results but for times, and every tensor of a model that was trained now."""
    results = {key: value for key, value in read_json(folder / "results.json").items() if key != "seconds"}
    tensors = read_tensors(folder / "checkpoints" / "model.safetensors")[0] if trained else {}
    digest = hashlib.sha256(json.dumps(results).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


_watchers: list[list[str]] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what no file may make a command do."""
    if _watchers and (event.startswith(FORBIDDEN) or (event == "pickle.find_class" and arguments[0] == "os")):
        _watchers[-1].append(f"{event} {arguments!r:.200}")


# processes ------------------------------------------------------------------------------------------------------------
def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked process; where that does not end by itself, an Outcome that says how it did."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            _work_in_child(work, answer)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        data = answer.read()
    if status or not data:
        how = f"the process ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        return Outcome(trouble=how)
    return pickle.loads(data)


def _work_in_child(work: Callable[[], Any], answer: Any) -> None:
    try:
        signal.alarm(SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.addaudithook(_listen)
        if os.environ.get("FUZZ_SHOW") is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        answer.write(pickle.dumps(work()))
        answer.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
