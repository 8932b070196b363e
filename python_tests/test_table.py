"""What a finished run shows: the text fits the terminal, pictures have one size, marks and older results are right."""

import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
from conftest import make_trainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from results import made_up

from janus_ext.reports import plots, table
from janus_ext.runs import metrics

WIDE = 10_000


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells behind each label of the text's columns."""
    lines = [line for line in text.splitlines() if line.startswith("  ") and len(line) > table.LABEL]
    return {line[: table.LABEL].strip(): line[table.LABEL :].split() for line in lines}


def ends_of_words(line: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\S+", line)]


# the text -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tasks", [1, 2, 8, 10, 20, 200])
@pytest.mark.parametrize("width", [60, 80, 133])
def test_no_line_is_wider_than_the_terminal_and_columns_stand_below_each_other(tasks, width):
    text = table.format_table(made_up(tasks), width)
    assert max(map(len, text.splitlines())) <= width
    heading = next(line for line in text.splitlines() if line.startswith("      t"))
    for label in ("task known", "violation", "danger", "basis rank", "seconds"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {label}"))
        assert ends_of_words(line)[-1] == ends_of_words(heading)[-2]
        assert set(ends_of_words(line[table.LABEL :])) < set(ends_of_words(heading[table.LABEL :]))


def test_ten_tasks_fit_into_80_columns():
    assert table.ELLIPSIS not in table.format_table(made_up(10, seconds=[9.9] * 10), 80)


def test_the_first_and_the_last_tasks_are_shown_where_not_all_fit():
    results = made_up(200)
    text = table.format_table(results, 80)
    rows, whole = rows_of(text), rows_of(table.format_table(results, WIDE))
    shown = [int(cell) - 1 for cell in whole["t \\ j"][:-1]]
    assert shown == list(range(200))
    columns = rows["t \\ j"]
    assert columns[:2] == ["1", "2"] and table.ELLIPSIS in columns and columns[-3:] == ["199", "200", "mean"]
    for label in ("violation", "danger", "200"):
        everything = whole[label]
        assert rows[label][0] == everything[0] and rows[label][-1] == everything[-1]
    assert len(text.splitlines()) <= table.MOST_ROWS + 20 and "195" in rows and "100" not in rows


def test_the_width_is_the_terminals_or_80_where_there_is_none(monkeypatch):
    results = made_up(20)
    monkeypatch.setenv("COLUMNS", "100")
    assert table.format_table(results) == table.format_table(results, 100)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(shutil.os, "get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError("no terminal")))
    assert table.format_table(results) == table.format_table(results, 80)


@pytest.mark.parametrize(("count", "room"), [(5, 5), (6, 5), (100, 8), (100, 1), (3, 2)])
def test_thinned_keeps_both_ends_in_order(count, room):
    kept = table.thinned(count, room)
    known = [index for index in kept if index is not None]
    assert known == sorted(set(known)) and known[0] == 0 and known[-1] == count - 1
    assert len(kept) <= max(room, 3) and (None in kept) == (count > room)


def test_accuracy_with_the_task_known_and_recognition_stand_beside_acc():
    results = made_up(4)
    text = table.format_table(results, WIDE)
    assert (
        f"ACC {results['acc']:.2f}   ACC with the task known {results['acc_task_known']:.2f}   task recognition "
        in text
    )
    known = [f"{value:.1f}" for value in metrics.trajectory(results["accuracy_matrix_task_known"])]
    recognised = [f"{value:.1f}" for value in metrics.trajectory(results["task_recognition_matrix"])]
    rows = rows_of(text)
    assert (rows["task known"], rows["recognised"]) == (known, recognised)


def test_what_older_results_lack_is_left_out(tmp_path):
    results = made_up(4, recognition=False)
    text = table.format_table(results, 80)
    assert "known" not in text and "recogni" not in text and "~" not in text
    assert [path.stem for path in plots.save_plots(results, tmp_path)] == list(plots.PLOTS)


def test_every_head_that_was_measured_is_shown():
    def heads(**accuracies):
        return {name: metrics.summarize_head([[acc]]) for name, acc in accuracies.items()}

    runs = [made_up(3, seed=0, head="lda", heads=heads(lda=60.0, ncm=50.0)), made_up(3, heads=heads(lda=62.0))]
    text = table.format_table(runs[0], WIDE)
    assert "method janus, head lda, seed 0" in text and "ACC by head:   lda 60.00   ncm 50.00" in text
    assert "by head" not in table.format_table(runs[1], WIDE)  # its own alone
    summary = table.summarize_runs(runs)
    assert list(summary["heads"]) == ["lda"] and summary["heads"]["lda"]["acc"]["values"] == [60.0, 62.0]
    assert "by head" not in table.format_summary(runs) and "ncm 50.00 +- 0.00" in table.format_summary([runs[0]] * 2)


def test_several_seeds_are_summed_up_with_what_all_of_them_have():
    runs = [made_up(3), made_up(3, acc_task_known=80.0, seed=1)]
    summary = table.summarize_runs(runs)
    assert summary["heads"] == {}
    assert summary["acc_task_known"]["values"] == [runs[0]["acc_task_known"], 80.0]
    assert summary["task_recognition"]["std"] == 0.0
    assert f"ACC with the task known {summary['acc_task_known']['mean']:.2f} +- " in table.format_summary(runs, WIDE)
    assert max(map(len, table.format_summary(runs, 70).splitlines())) <= 70
    mixed = [*runs, made_up(3, recognition=False)]
    assert "acc_task_known" not in table.summarize_runs(mixed) and "known" not in table.format_summary(mixed)


# violations at the rounding of the weights ---------------------------------------------------------------------------
def test_only_tasks_with_every_layer_at_the_rounding_are_marked():
    violation = [{}, {"a": 1e-2, "b": 0.0}, {"a": 2e-2, "b": 4e-2}, {"a": 1e-2, "b": 1e-2}]
    rounding = [{}, {"a": 2e-2, "b": 0.0}, {"a": 1.0, "b": 1e-2}, {"a": 1.0}]
    results = made_up(4, violation_per_layer=violation, violation_rounding_per_layer=rounding)
    results["violation"] = [None, 5e-3, 3e-2, 1e-2]
    assert table.violations_rounded(results) == [False, True, False, False]
    text = table.format_table(results, 80)
    assert rows_of(text)["violation"] == ["-", "~5e-3", "3e-2", "1e-2"]
    assert "violation 1.5e-02" in text and table.ROUNDED in text, "the mean of all is marked where all are"


def test_a_tiny_update_is_marked_and_a_real_violation_is_not(patterns, weights, tmp_path):
    trial = make_trainer(patterns, weights, tmp_path / "trial", method="janus", epochs=1, lr=1e-6).run()
    assert all(v > 1e-4 for v in trial["violation"][1:])
    assert table.violations_rounded(trial) == [False, True, True]
    mean = sum(trial["violation"][1:]) / 2
    assert f"violation ~{mean:.1e}" in table.format_table(trial, WIDE)
    free = make_trainer(patterns, weights, tmp_path / "free", method="janus", rectify="none", epochs=1).run()
    assert table.violations_rounded(free) == [False, False, False]
    assert "~" not in table.format_table(free, WIDE)


# pictures ------------------------------------------------------------------------------------------------------------
def drawn(name: str, results: dict[str, Any]) -> Figure:
    figure = Figure(layout="constrained")
    assert plots.PLOTS[name](figure, results)
    return figure


def texts(figure: Figure) -> set[str]:
    figure.draw_without_rendering()
    return {text.get_text() for text in figure.findobj(Text) if text.get_visible()}


@pytest.mark.parametrize("name", plots.PLOTS)
def test_pictures_of_many_tasks_are_no_larger_and_have_no_more_parts(name):
    few, many = drawn(name, made_up(20)), drawn(name, made_up(300, layers=40))
    assert all(m <= f for m, f in zip(many.get_size_inches(), few.get_size_inches(), strict=True))
    assert max(many.get_size_inches()) <= 14
    assert len(many.findobj()) <= len(few.findobj()) + 150  # twenty more names of layers
    assert len(texts(many)) <= 120


def test_pictures_of_two_hundred_tasks_have_a_bounded_size(tmp_path):
    for path in plots.save_plots(made_up(200), tmp_path):
        with Image.open(path) as image:
            assert max(image.size) <= 2100, path.name


def test_the_matrix_has_its_numbers_where_they_can_be_read():
    results = made_up(20)
    assert f"{results['accuracy_matrix'][19][0]:.0f}" in texts(drawn("accuracy_matrix", results))
    assert texts(drawn("accuracy_matrix", results)) >= {str(t) for t in range(1, 21)}
    many = texts(drawn("accuracy_matrix", made_up(21, accuracy_matrix=[[77.0] * (t + 1) for t in range(21)])))
    assert "77" not in many and "20" in many


def test_the_trajectory_shows_what_accuracy_is_made_of():
    results = made_up(10)
    figure = drawn("trajectory", results)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert lines["with the task known"] == metrics.trajectory(results["accuracy_matrix_task_known"])
    assert lines["right task recognised"] == metrics.trajectory(results["task_recognition_matrix"])
    ends = {f"ACC {results['acc']:.1f}", f"{results['acc_task_known']:.1f}", f"{results['task_recognition']:.1f}"}
    assert ends <= texts(figure)
    older = drawn("trajectory", made_up(10, recognition=False))
    assert [line.get_label() for line in older.axes[0].get_lines()] == ["all tasks seen so far", "newest task"]


def test_labels_at_the_end_of_lines_do_not_overlap():
    assert plots._apart([50.0, 40.0, 51.0], 5) == [50.0, 40.0, 55.0]
    assert plots._apart([50.0, 50.0], 5) == [50.0, 55.0]


def test_layers_that_are_guarded_in_some_tasks_only_are_drawn():
    violation = [{}, {"blocks.1.attn.qkv": 1e-3}, {"blocks.0.attn.qkv": 1e-1, "blocks.1.attn.qkv": 3e-3}]
    axes = drawn("violation", made_up(3, violation_per_layer=violation, violation_rounding_per_layer=violation)).axes[0]
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0, 1e-3], [1, 1e-1], [0, 3e-3]]
    assert dots.get_array().tolist() == [2, 3, 3]
    mean, rounding = axes.get_lines()
    assert mean.get_ydata().tolist() == pytest.approx([2e-3, 1e-1])
    assert rounding.get_label().startswith("rounding of the weights")
    assert rounding.get_ydata().tolist() == pytest.approx([2e-3, 1e-1])


def test_layers_are_named_by_all_their_numbers():
    names = ["blocks.3.attn.qkv", "layers.2.blocks.11.attn.qkv", "stages.0.1.attn.qkv2", "attn.qkv"]
    assert [plots.short_name(name) for name in names] == ["4", "3.12", "1.2", "attn.qkv"]


def test_a_single_task_without_basis_can_be_reported(patterns, weights, tmp_path):
    single = replace(patterns, tasks=((0, 1, 2, 3, 4, 5),))
    results = make_trainer(single, weights, tmp_path / "run", method="lora").run()
    assert results["bwt"] is None and results["forgetting"] is None
    text = table.format_table(results, 80)
    assert "BWT -" in text and "violation -   danger -" in text
    written = plots.save_plots(results, tmp_path / "plots")
    assert [path.stem for path in written] == ["accuracy_matrix", "trajectory"]
