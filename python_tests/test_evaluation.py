"""What is counted of a model's scores, and how it is shown: properties that hold for any number of classes."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.reports.evaluation import Evaluation, evaluate, format_columns
from janus_ext.runs.metrics import Confusion, hits

NAMES = ("cat", "dog", "bird", "fish")
# Of four cats two are right, one is a dog and one a fish; of two dogs both are fish; the bird is right; no fish at all.
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
WINNERS = torch.tensor([0, 1, 0, 3, 3, 3, 2])


def scores_for(winners, classes=4):
    return torch.nn.functional.one_hot(winners, classes).float()


def random_case(images=500, classes=12):
    """Scores with ties, as half precision has them."""
    return torch.randint(0, 8, (images, classes)).bfloat16(), torch.randint(0, classes, (images,))


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# counting ------------------------------------------------------------------------------------------------------------
def test_rows_are_true_classes_and_columns_what_they_were_taken_for():
    confusion = evaluate([(scores_for(WINNERS), LABELS)], NAMES).confusion
    assert confusion.tolist() == [[2, 1, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_batches_add_up_on_every_device(device):
    scores, labels = random_case()
    whole, pieces = Confusion(12, [4, 8]), Confusion(12, [4, 8])
    whole.add(scores, labels)
    for rows in torch.randperm(500).split(33):
        pieces.add(scores[rows].to(device), labels[rows].to(device))
    pieces.add(scores[:0], labels[:0])
    assert torch.equal(whole.counts, pieces.counts) and torch.equal(whole.hits, pieces.hits)
    assert int(whole.counts.sum()) == 500 and whole.counts.sum(1).tolist() == torch.bincount(labels).tolist()


def test_a_tasks_counts_are_those_of_the_trainers_metric():
    scores, labels = random_case()
    confusion = Confusion(12, [3, 5, 4])
    confusion.add(scores, labels)
    for task, (first, size) in enumerate([(0, 3), (3, 5), (8, 4)]):
        rows = (labels >= first) & (labels < first + size)
        assert torch.equal(confusion.hits[task], hits(scores[rows], labels[rows], first, size))
        block = confusion.counts[first : first + size]
        assert confusion.hits[task, 0] == block[:, first : first + size].diagonal().sum()
        assert confusion.hits[task, 2] == block[:, first : first + size].sum()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.tensor([0, 4]), "labels must lie in 0..3, got 4"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "labels must lie in 0..3, got -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), "Confusion: scores must be floating [2, 4], got [2, 3]"),
        (torch.zeros(2, 4), torch.tensor([0, 1, 2]), "scores must be floating [3, 4], got [2, 4]"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), "labels must be int64 [b], got [2] of torch.float32"),
        (torch.full((2, 4), torch.nan), torch.tensor([0, 1]), "scores must be numbers, got NaN"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_not_counted(scores, labels, message):
    confusion = Confusion(4, [2, 2])
    with pytest.raises(ArgumentError, match=re.escape(message)):
        confusion.add(scores, labels)
    assert not confusion.counts.any() and not confusion.hits.any()


@pytest.mark.parametrize("sizes", [[2, 3], [4, 0], [5, -1]])
def test_sizes_of_tasks_add_up_to_the_classes(sizes):
    with pytest.raises(ArgumentError, match="task_sizes must (be integers from 1|add up to 4 classes)"):
        Confusion(4, sizes)


# shares --------------------------------------------------------------------------------------------------------------
def test_shares_worked_out_by_hand():
    result = evaluate([(scores_for(WINNERS), LABELS)], NAMES, [2, 2])
    assert (result.images, result.right, result.accuracy) == (7, 3, pytest.approx(300 / 7))
    cat, dog, bird, fish = result.per_class
    assert (cat.images, cat.right, cat.accuracy, cat.taken_for, cat.times) == (4, 2, 50.0, "dog", 1)
    assert (dog.accuracy, dog.taken_for, dog.times) == (0.0, "fish", 2)
    assert (bird.accuracy, bird.taken_for, bird.times) == (100.0, None, 0)
    assert (fish.images, fish.accuracy, fish.taken_for) == (0, None, None)
    first, second = result.per_task
    # Where a fish won, cat and dog have the same score, and the first of equals wins: one more cat is right among them.
    assert (first.task, first.classes, first.images) == (1, 2, 6)
    assert first.accuracy == pytest.approx(200 / 6) and first.accuracy_task_known == pytest.approx(300 / 6)
    assert first.task_recognition == pytest.approx(300 / 6)
    assert (second.images, second.accuracy, second.accuracy_task_known, second.task_recognition) == (1, 100, 100, 100)


def test_without_tasks_and_without_images():
    assert evaluate([(scores_for(WINNERS), LABELS)], NAMES).per_task == ()
    nothing = evaluate([], NAMES, [1, 3])
    assert nothing.accuracy is None and nothing.per_task[0].accuracy_task_known is None
    assert "accuracy - of 0 images, 4 classes" in nothing.format(80)


# files ---------------------------------------------------------------------------------------------------------------
def random_evaluation(classes, tasks=1, name="class {}, \u00e4"):
    labels = torch.arange(classes).repeat_interleave(4)[4 * (classes > 5) :]
    scores = torch.randn(len(labels), classes)
    return evaluate([(scores, labels)], [name.format(c) for c in range(classes)], [classes // tasks] * tasks)


@pytest.mark.parametrize(("classes", "tasks"), [(2, 1), (24, 3), (345, 5)])
def test_the_files_hold_what_was_counted(tmp_path, classes, tasks):
    result = random_evaluation(classes, tasks)
    assert {path.name for path in result.save(tmp_path / "new" / "folder")} == {
        *("evaluation.json", "per_class.csv", "confusion.csv", "confusion.png")
    }
    folder = tmp_path / "new" / "folder"
    stored = json.loads((folder / "evaluation.json").read_text())
    assert stored == json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert torch.equal(torch.tensor(stored["confusion"]), result.confusion)
    with (folder / "confusion.csv").open(encoding="utf-8", newline="") as file:
        heading, *rows = csv.reader(file)
    assert tuple(heading[1:]) == tuple(row[0] for row in rows) == result.class_names
    assert [[int(n) for n in row[1:]] for row in rows] == result.confusion.tolist()
    with (folder / "per_class.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["number"], row["name"], row["right"]) for row in table] == [
        (str(n), r.name, str(r.right)) for n, r in enumerate(result.per_class, 1)
    ]
    assert [row["accuracy"] for row in table] == [
        "" if r.accuracy is None else str(r.accuracy) for r in result.per_class
    ]
    assert min(pixels_of(folder / "confusion.png").shape[:2]) > 500


def test_names_of_any_kind_can_be_saved_and_shown(tmp_path, recwarn):
    names = ["$x^{", "caf\udce9", "漢字" * 20, 'a, "b"\nc', "\\frac"]
    result = evaluate([(torch.eye(5), torch.arange(5))], names)
    result.save(tmp_path)
    assert "caf\\udce9" in (tmp_path / "confusion.csv").read_text(encoding="utf-8")
    assert [c["name"] for c in json.loads((tmp_path / "evaluation.json").read_text())["classes"]] == names
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert all(sum(2 if ord(c) > 0x2E80 else 1 for c in line) <= 60 for line in result.format(60).splitlines())


def test_the_picture_shows_shares_and_classes_without_images(tmp_path):
    """A perfect model has a dark diagonal; the row of a class without images is neither dark nor the colour of 0."""
    labels = torch.tensor([0, 2, 3])
    evaluate([(scores_for(labels), labels)], NAMES).save(tmp_path)
    pixels = pixels_of(tmp_path / "confusion.png").reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(8, 29, 88), (255, 255, 217), (238, 240, 243)} <= colours  # 100 %, 0 %, no images


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        random_evaluation(3).save(tmp_path / "file")


# the terminal --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize(("classes", "tasks"), [(2, 1), (31, 1), (345, 69)])
def test_lines_fit(width, classes, tasks):
    lines = random_evaluation(classes, tasks, "a class with a name of many words, number {}").format(width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) < 75


def test_of_many_classes_those_that_went_worst_are_shown():
    right = torch.arange(40) % 2 == 0  # every other class is right
    result = evaluate(
        [(scores_for((torch.arange(40) + ~right) % 40, 40), torch.arange(40))], [f"c{c}" for c in range(40)]
    )
    text = result.format(80)
    assert all(re.search(rf"^c{c} +1 +0\.0  c{(c + 1) % 40} +1$", text, re.MULTILINE) for c in range(1, 40, 2))
    assert "10 more with higher accuracy" in text


def test_columns_are_shortened_before_they_are_left_out():
    rows = [["a" * 30, "1", "b" * 30, "22"]]
    heading = ["name", "n", "other", "m"]
    assert format_columns(heading, rows, 80, (0, 2))[1] == f"{'a' * 30}  1  {'b' * 30}  22"
    assert format_columns(heading, rows, 31, (0, 2))[1] == "aaaaaaaa...  1  bbbbbbbb...  22"
    assert format_columns(heading, rows, 24, (0, 2))[1] == "aaaaa...  1  bbbbb..."


def test_an_evaluation_is_read_only():
    result = random_evaluation(3)
    assert isinstance(result, Evaluation)
    with pytest.raises(AttributeError):
        result.confusion = torch.zeros(3, 3)
