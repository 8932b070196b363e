"""--task-list: the tasks are the file's, whatever the names hold; every mistake is named by its line."""

import re

import pytest
from trees import folders

from janus_ext.config import TrainConfig
from janus_ext.data import emoji, folder
from janus_ext.data.task_list import read_task_list
from janus_ext.errors import ArgumentError, DataError
from janus_ext.runs import checkpoint
from janus_ext.runs.settings import check_same_settings, settings_of

ODD = ("a, b", "tab\there", "no", "7", "# c", "é 'quoted' \"twice\"", "- dash: colon")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tasks_and_their_order_are_the_files(tmp_path, end, encoding):
    lines = ["", ODD[6], ODD[0], "", "  ", *ODD[3:6], "", ODD[2] + "  ", ODD[1], ""]
    path = write(tmp_path / "tasks.txt", end.join(lines), encoding)
    assert read_task_list(path, ODD) == ((6, 0), (3, 4, 5), (2, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndgo\n", "tasks.txt:2 names no class of the benchmark: 'dgo' (similar: dog)"),
        ("cat\n\nzebra crossing\n", "tasks.txt:3 names no class of the benchmark: 'zebra crossing'"),
        ("cat, dog\n\nbird\n", "tasks.txt:1 names no class of the benchmark: 'cat, dog'"),
        ("cat\ndog\n\nbird\ncat\n", "tasks.txt:5 repeats cat of line 1"),
        ("bird\ndog\n", "tasks.txt must name every class of the benchmark"),
        ("bird\ndog\n", "2 of 4 are in no task: cat, fish"),
        ("", "4 of 4 are in no task: cat, dog, bird, ..."),
        (" \n\n", "4 of 4 are in no task"),
    ],
)
def test_a_mistake_is_named_by_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_task_list(write(tmp_path / "tasks.txt", text), ["cat", "dog", "bird", "fish"])
    assert str(caught.value).startswith("--task-list: ") and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="--task-list .*none.txt cannot be read: No such file or directory"):
        read_task_list(tmp_path / "none.txt", ["cat", "dog"])
    with pytest.raises(DataError, match="--task-list .* cannot be read: Is a directory"):
        read_task_list(tmp_path, ["cat", "dog"])


# benchmarks ----------------------------------------------------------------------------------------------------------
def written(path, names, sizes):
    """A list of tasks of these sizes, over the names in reverse."""
    names = iter(sorted(names, reverse=True))
    return write(path, "\n\n".join("\n".join(next(names) for _ in range(size)) for size in sizes))


def test_the_embedded_benchmark_in_the_tasks_of_a_list(tmp_path):
    plain = emoji.load(TrainConfig().resolved())
    path = written(tmp_path / "tasks.txt", plain.class_names, (150, 2, 48))
    listed = emoji.load(TrainConfig(task_list=path).resolved())
    assert [len(classes) for classes in listed.tasks] == [150, 2, 48]
    assert [listed.class_names[c] for c in listed.class_order] == sorted(plain.class_names, reverse=True)
    assert listed.split_sha256 != plain.split_sha256


def test_a_tree_of_ones_own_in_the_tasks_of_a_list(tmp_path):
    folders(tmp_path / "tree", 5, 2, lambda c: f"thing, {c}")
    path = write(tmp_path / "tasks.txt", "thing, 4\nthing, 1\nthing, 0\n\nthing, 2\nthing, 3\n")
    settings = {"benchmark": "folder", "data_dir": tmp_path / "tree", "workers": 0, "task_list": path}
    assert folder.load(TrainConfig(**settings).resolved()).tasks == ((4, 1, 0), (2, 3))
    assert folder.load(TrainConfig(**settings, tasks=2).resolved()).tasks == ((4, 1, 0), (2, 3))
    with pytest.raises(ArgumentError, match=r"--task-list .*tasks.txt has 2 tasks, --tasks 3 asks for others"):
        folder.load(TrainConfig(**settings, tasks=3).resolved())
    with pytest.raises(ArgumentError, match=r"has 2 tasks, --tasks 1 asks for others: .*--method joint has one"):
        folder.load(TrainConfig(**settings, method="joint").resolved())


def test_a_task_of_one_class_needs_a_head_that_learns_it(tmp_path):
    names = emoji.load(TrainConfig()).class_names
    path = written(tmp_path / "tasks.txt", names, (199, 1))
    with pytest.raises(ArgumentError, match="--task-list .*: task 2 has one class, .*, or --head lda"):
        emoji.load(TrainConfig(task_list=path, head="linear").resolved())
    assert len(emoji.load(TrainConfig(task_list=path, head="ncm").resolved()).tasks[1]) == 1


def test_a_run_is_the_same_under_another_name_of_its_list_and_not_with_another_list(tmp_path):
    names = emoji.load(TrainConfig()).class_names

    def settings(path):
        config = TrainConfig(task_list=path).resolved()
        return settings_of(config, emoji.load(config), None)

    first = settings(written(tmp_path / "tasks.txt", names, (100, 100)))
    checkpoint.write_json(tmp_path / "config.json", first)
    check_same_settings(settings(written(tmp_path / "moved.txt", names, (100, 100))), first, tmp_path)
    with pytest.raises(ArgumentError, match="--task-list .*others.txt"):
        check_same_settings(settings(written(tmp_path / "others.txt", names, (150, 50))), first, tmp_path)
    with pytest.raises(ArgumentError, match="other image files, or another order of classes"):
        check_same_settings(settings(written(tmp_path / "tasks.txt", names, (150, 50))), first, tmp_path)
