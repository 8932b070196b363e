"""The formulae of the accuracy matrix against numbers worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from janus_ext.errors import ArgumentError
from janus_ext.runs import metrics

# Three tasks of 10, 20 and 70 test images.
MATRIX = [[80.0], [60.0, 90.0], [70.0, 75.0, 50.0]]
SIZES = [10, 20, 70]
KNOWN = [[80.0], [70.0, 95.0], [90.0, 85.0, 50.0]]
RECOGNISED = [[100.0], [75.0, 92.0], [78.0, 82.0, 80.0]]


def test_task_weighted_accuracies():
    assert metrics.accuracy(MATRIX) == pytest.approx(65.0)  # (70 + 75 + 50) / 3
    assert metrics.trajectory(MATRIX) == pytest.approx([80.0, 75.0, 65.0])
    assert metrics.mean_average_accuracy(MATRIX) == pytest.approx(220 / 3)


def test_sample_weighted_accuracies():
    # after task 2: (10 * 60 + 20 * 90) / 30 = 80; after task 3: (700 + 1500 + 3500) / 100 = 57
    assert metrics.trajectory_sample_weighted(MATRIX, SIZES) == pytest.approx([80.0, 80.0, 57.0])
    assert metrics.accuracy_sample_weighted(MATRIX, SIZES) == pytest.approx(57.0)
    assert metrics.mean_average_accuracy_sample_weighted(MATRIX, SIZES) == pytest.approx(217 / 3)


def test_both_weightings_agree_for_equal_sizes():
    assert metrics.accuracy_sample_weighted(MATRIX, [7, 7, 7]) == pytest.approx(metrics.accuracy(MATRIX))


def test_backward_transfer_and_forgetting_look_at_different_peaks():
    rows = [[50.0], [70.0, 90.0], [60.0, 75.0, 40.0]]
    assert metrics.backward_transfer(rows) == pytest.approx(-2.5)  # ((60 - 50) + (75 - 90)) / 2
    assert metrics.forgetting(rows) == pytest.approx(12.5)  # ((70 - 60) + (90 - 75)) / 2


def test_plasticity_is_the_mean_of_the_diagonal():
    assert metrics.plasticity(MATRIX) == pytest.approx(220 / 3)


def test_what_is_counted_of_a_tasks_images():
    scores = torch.tensor(
        [
            [0.0, 5.0, 1.0, 0.0, 2.0],  # right
            [0.0, 1.0, 5.0, 0.0, 2.0],  # another class of the task
            [9.0, 5.0, 1.0, 0.0, 2.0],  # of another task; right if the task is known
            [0.0, 1.0, 5.0, 0.0, 9.0],  # of another task, and wrong even then
        ]
    )
    labels = torch.tensor([1, 1, 1, 1])
    assert metrics.hits(scores, labels, 1, 2).tolist() == [1, 2, 2]
    assert metrics.hits(scores[:, :3], labels, 1, 2).tolist() == [1, 2, 3]


def test_with_all_classes_in_one_task_nothing_is_confused():
    scores, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    right, known, recognised = metrics.hits(scores, labels, 0, 7).tolist()
    assert right == known and recognised == 50


def test_task_known_and_task_recognition_are_means_of_the_last_row():
    assert metrics.accuracy_task_known(KNOWN) == pytest.approx(75.0)
    assert metrics.task_recognition(RECOGNISED) == pytest.approx(80.0)


def test_a_single_task_has_no_transfer():
    assert metrics.backward_transfer([[42.0]]) is None
    assert metrics.forgetting([[42.0]]) is None
    assert metrics.accuracy([[42.0]]) == 42.0


def test_summary_uses_the_names_of_the_results_file():
    summary = metrics.summarize(MATRIX, KNOWN, RECOGNISED, SIZES)
    expected = {"acc", "maa", "bwt", "forgetting", "plasticity", "acc_sample_weighted", "maa_sample_weighted"}
    assert summary.keys() == expected | {"acc_task_known", "task_recognition"}
    assert (summary["acc"], summary["acc_task_known"], summary["task_recognition"]) == pytest.approx((65, 75, 80))


def test_mean_and_sample_deviation():
    assert metrics.mean_and_std([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5))
    assert metrics.mean_and_std([4.0]) == (4.0, None)


@pytest.mark.parametrize("number", [np.int8, np.int64, np.float16, np.float32, int, float, Fraction])
def test_numbers_of_any_kind_are_summed_in_double_precision(number):
    """NumPy's own sums of small integers wrap round, and of halves they lose digits."""
    matrix = [[number(v) for v in row] for row in MATRIX]
    for name, want in metrics.summarize(MATRIX, KNOWN, RECOGNISED, [2**40, 2**41, 2**53]).items():
        assert metrics.summarize(matrix, KNOWN, RECOGNISED, [2**40, 2**41, 2**53])[name] == want
    assert metrics.mean_and_std([number(100)] * 4) == (100.0, 0.0)


def test_sizes_of_any_kind_are_summed_as_integers():
    """Two of 100 are 200 images, and no -56, as NumPy's int8 has it."""
    assert metrics.accuracy_sample_weighted([[50.0], [50.0, 70.0]], [np.int8(100)] * 2) == 60.0
    assert metrics.Confusion(200, [np.int8(100)] * 2).task_sizes == (100, 100)


def test_numbers_that_no_float_holds_are_refused():
    with pytest.raises(ArgumentError, match="^accuracy: matrix must have numbers that a float holds, got"):
        metrics.accuracy([[10**400]])
    with pytest.raises(ArgumentError, match="^mean_and_std: values must have numbers that a float holds, got"):
        metrics.mean_and_std([10**400])
    with pytest.raises(
        ArgumentError, match=r"^accuracy_sample_weighted: test_sizes must be integers from 1 to 2\^53, one a task, got"
    ):
        metrics.accuracy_sample_weighted([[1.0]], [2**53 + 1])


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [1.0]]])
def test_a_matrix_that_is_not_triangular_is_refused(matrix):
    with pytest.raises(ArgumentError, match="rows of 1, 2, 3"):
        metrics.accuracy(matrix)


def test_sizes_must_fit_the_matrix():
    with pytest.raises(ArgumentError, match="3 positive numbers"):
        metrics.accuracy_sample_weighted(MATRIX, [10, 20])
