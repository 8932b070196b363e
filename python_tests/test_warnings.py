"""Warnings: they name the line that the caller wrote, and within a command they are lines of its log."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from learners import FIRST, SECOND, learner_of
from torch import nn

from janus_ext import ContinualLearner, GradientRectifier, LoRALinear, LoRAPair, OnlineEstimator, train

FLAGS = "--tasks 2 --limit-per-class 1 --epochs 1 --no-plots --energy-start 1 --energy-end 1".split()


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
    with pytest.warns(UserWarning, match="one class teaches head lda alone") as said:
        learner.learn(photos, FIRST[:1])
    assert said[0].filename == __file__


@pytest.mark.parametrize(("learn", "is_said"), [("none", (False, False)), ("first", (True, False))])
def test_a_backbone_that_rests_anyway_is_no_news(weights, photos, learn, is_said) -> None:
    learner = ContinualLearner("emoji", "lora", head="lda", learn=learn, weights=str(weights), device="cpu")
    for name, said in zip((FIRST[0], SECOND[0]), is_said, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learner.learn(photos, [name])
        assert any("the backbone rests" in str(w.message) for w in caught) == said


def test_where_there_is_no_caller_it_names_the_program(tmp_path) -> None:
    program = tmp_path / "mine.py"
    program.write_text("import sys\nfrom janus_ext.errors import warn\nwarn('of this line')\n")
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert ended.stderr == f"{program}:3: UserWarning: of this line\n  warn('of this line')\n"


def test_a_command_logs_them_and_names_no_line_of_ours(weights, tmp_path, capsys) -> None:
    shown = warnings.showwarning
    assert train.main([*FLAGS, "--weights", str(weights), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    said = [line for line in printed.out.splitlines() if "Warning" in line]
    assert said and all(re.fullmatch(r"UserWarning: blocks\.\d.*, the cap is 24 of 32", line) for line in said)
    logged = (tmp_path / "run" / "log.txt").read_text()
    assert all(line in logged for line in said) and "Warning" not in printed.err
    assert warnings.showwarning is shown
