"""Warnings: they name the line that the caller wrote, and within a command they are lines of its log."""

import _thread
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learners import FIRST, SECOND, learner_of
from torch import nn

import janus_ext
from janus_ext import ContinualLearner, GradientRectifier, LoRALinear, LoRAPair, OnlineEstimator, _native, learn, train
from janus_ext.config import TrainConfig
from janus_ext.data import emoji
from janus_ext.errors import JanusWarning, warn
from janus_ext.terminal import logging_to


# whose line ----------------------------------------------------------------------------------------------------------
def capped_commit() -> None:
    estimator = OnlineEstimator(8, "gram")
    estimator.observe(torch.randn(50, 8))
    estimator.commit(1.0, max_rank=5)


def capped_preview() -> None:
    estimator = OnlineEstimator(8, "gram")
    estimator.observe(torch.randn(50, 8))
    estimator.extended(1.0, max_rank=5)


def rounded_merge() -> None:
    LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2).merge()


def rounded_weights() -> None:
    layer = nn.Linear(8, 8).bfloat16()
    GradientRectifier({"fc": LoRAPair(torch.randn(2, 8), torch.zeros(8, 2), module=layer)})


@pytest.mark.parametrize("call", [capped_commit, capped_preview, rounded_merge, rounded_weights])
def test_a_warning_names_the_line_of_the_caller(call: Callable[[], None]) -> None:
    with pytest.warns(UserWarning) as said:
        call()
    code = call.__code__
    lines = {line for _, _, line in code.co_lines()}
    assert [(w.filename, w.lineno) for w in said] == [(__file__, max(lines))]


def test_so_does_one_of_a_learner(weights, photos) -> None:
    learner = learner_of(weights, head="lda")
    with pytest.warns(UserWarning, match="a task of one class teaches the head alone, here lda") as said:
        learner.learn(photos, FIRST[:1])
    assert said[0].filename == __file__


@pytest.mark.parametrize(("learn", "is_said"), [("none", (False, False)), ("first", (True, False))])
def test_a_backbone_that_rests_anyway_is_no_news(weights, photos, learn, is_said) -> None:
    learner = ContinualLearner("emoji", "lora", head="lda", learn=learn, weights=str(weights), device="cpu")
    for name, said in zip((FIRST[0], SECOND[0]), is_said, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learner.learn(photos, [name])
        assert any("the backbone learns nothing" in str(w.message) for w in caught) == said


def test_code_of_no_module_is_warned_too() -> None:
    """As `exec` runs it, in a notebook's kernel or a template."""
    for name in ({}, {"__name__": None}):
        with pytest.warns(JanusWarning, match="the cap is 5 of 8") as said:
            exec(compile("\n\ncall()", "template", "exec"), name | {"call": capped_commit})
        assert said[0].filename == __file__
        with pytest.warns(JanusWarning, match="here") as said:
            exec(compile("\n\nwarn('here')", "template", "exec"), name | {"warn": warn})
        assert (said[0].filename, said[0].lineno) == ("template", 3)


def test_a_thread_that_begins_in_the_library_is_warned_too() -> None:
    estimator, latest = OnlineEstimator(8, "gram"), time.monotonic() + 60
    estimator.observe(torch.randn(50, 8))
    with pytest.warns(JanusWarning, match="the cap is 5 of 8") as said:
        _thread.start_new_thread(estimator.commit, (1.0, 5))
        while not estimator.basis.shape[1] and time.monotonic() < latest:
            time.sleep(0.01)
    assert "janus_ext" in said[0].filename


def test_an_import_without_its_library_names_the_line_that_imports(tmp_path) -> None:
    package, program = tmp_path / "janus_ext", tmp_path / "mine.py"
    shutil.copytree(Path(janus_ext.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "assets"))
    (package / _native.OPS).touch()
    program.write_text("import sys\nimport janus_ext\n")
    plain = {name: value for name, value in os.environ.items() if name != "JANUS_EXT_REQUIRE_NATIVE"}
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, env=plain)
    assert f"{program}:2: JanusWarning: janus_ext runs its plain-torch kernels" in ended.stderr


# within a command ----------------------------------------------------------------------------------------------------
def trained(output: Path, weights: Path, *flags: str) -> None:
    settings = "--limit-per-class 1 --epochs 1 --no-plots".split()
    assert train.main([*settings, *flags, "--weights", str(weights), "--output", str(output)]) == 0


def test_each_run_logs_its_own_and_names_no_line_of_code(weights, tmp_path, capsys) -> None:
    shown, filters = warnings.showwarning, list(warnings.filters)
    flags = "--tasks 2 --energy-start 1 --energy-end 1 --seed 0 1".split()
    trained(tmp_path / "runs", weights, *flags)
    printed = capsys.readouterr()
    for seed in (0, 1):
        logged = (tmp_path / "runs" / f"seed-{seed}" / "log.txt").read_text().splitlines()
        said = [line.split(" ", 2)[2] for line in logged if "warning" in line]
        assert len(said) == 2 and all(
            re.fullmatch(r"warning: blocks\.\d.*, the cap is 24 of 32", line) for line in said
        )
        assert all(printed.out.count(line) == 2 for line in said)
    assert "arning" not in printed.err
    assert warnings.showwarning is shown and warnings.filters == filters


def test_those_of_others_come_as_ever(capsys) -> None:
    with pytest.warns(UserWarning, match="not of this package"), logging_to():
        warnings.warn("not of this package", stacklevel=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("learn", "is_said"), [("all", True), ("first", False), ("none", False)])
def test_a_run_says_which_tasks_teach_the_head_alone(weights, tmp_path, capsys, learn, is_said) -> None:
    names = emoji.load(TrainConfig()).class_names
    listed = tmp_path / "tasks.txt"
    listed.write_text("\n".join(names[:-1]) + f"\n\n{names[-1]}\n")
    flags = ["--learn", learn] if learn == "none" else ["--learn", learn, "--method", "lora"]
    settings = ["--limit-per-class", "1", "--no-plots", "--task-list", str(listed), *flags]
    assert train.main([*settings, "--weights", str(weights), "--output", str(tmp_path / "run")]) == 0
    assert ("tasks of one class teach the head alone, here lda" in capsys.readouterr().out) == is_said


def test_learning_single_classes_later_is_said_once(weights, photos, tmp_path, capsys) -> None:
    learner = learner_of(weights, head="lda")
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    for name in SECOND:
        shutil.copytree(photos / name, tmp_path / "new" / name)
    call = [str(tmp_path / "saved"), "--data-dir", str(tmp_path / "new"), "--output", str(tmp_path / "more")]
    assert learn.main([*call, "--tasks", "2"]) == 0
    printed = capsys.readouterr()
    assert (
        printed.out.count("warning: a task of one class teaches the head alone") == 1 and "Warning" not in printed.err
    )
