"""Which runs the report takes for seeds of one group, what it calls groups, and how they differ."""

import json
from typing import Any

import pytest
from results import made_up, read, stored, write_run

from janus_ext.reports.found import find_runs
from janus_ext.reports.groups import differences, group_runs
from janus_ext.reports.table import summarize_runs
from janus_ext.runs.checkpoint import append_json_line, write_json


@pytest.mark.parametrize(
    "first, second, groups",
    [
        ({}, {}, 1),
        ({"lr": 0.001}, {"lr": 0.002}, 2),
        ({"method": "lora", "energy_start": 0.5}, {"method": "lora", "energy_start": 0.7}, 1),  # lora does not read it
        ({"method": "lora"}, {"method": "janus"}, 2),
        ({"split_sha256": "c" * 64}, {}, 2),
        ({"shuffle_classes": True, "split_sha256": "c" * 64}, {"shuffle_classes": True}, 1),
        ({"shuffle_classes": True, "class_names": ["other"]}, {"shuffle_classes": True}, 2),
        ({"validation": 0.2, "split_sha256": "c" * 64}, {"validation": 0.2}, 1),
        ({"validation": 0.2}, {"validation": 0.3}, 2),
        ({"data_dir": "/here"}, {"data_dir": "/there"}, 1),
        ({"validation": 0.2, "data_dir": "/photos"}, {"validation": 0.2, "data_dir": "/sketches"}, 2),
        ({"shuffle_classes": True, "data_dir": "/here"}, {"shuffle_classes": True, "data_dir": "/there"}, 2),
        ({"split_sha256": None, "data_dir": "/here"}, {"split_sha256": None, "data_dir": "/there"}, 2),
        ({"device": "cuda:0"}, {"device": "cuda:1"}, 1),
        ({"device": "cuda"}, {"device": "cpu"}, 2),
        ({"workers": 1, "plots": False, "output": "x"}, {"workers": 2, "output": "y"}, 1),
        ({"tasks": 4}, {"tasks": 5}, 2),
    ],
)
def test_runs_that_differ_only_in_seed_are_one_group(tmp_path, first, second, groups):
    for seed, settings in enumerate((first, second)):
        folder = write_run(tmp_path / f"run-{seed}", seed, method=settings.get("method", "janus"))
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | settings)
    assert len(group_runs(find_runs([tmp_path])[0])) == groups


def test_a_seed_that_is_run_again_is_no_further_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 0), ("copy-2", 0)):
        write_run(tmp_path / name, seed)
    groups = group_runs(find_runs([tmp_path])[0])
    assert [[run.results["seed"] for run in group.runs] for group in groups] == [[0, 1], [0], [0]]
    assert len({group.name for group in groups}) == 3


@pytest.mark.parametrize("line", [{"task": 0, "epoch": -1}, {"task": 10**400, "epoch": 0}, {"task": 4, "epoch": 0}])
def test_epochs_that_there_are_not_are_left_out(tmp_path, line):
    folder = write_run(tmp_path / "run")
    before = read(folder)
    append_json_line(folder / "metrics.jsonl", line | {"loss": 1.0, "accuracy": 1.0})
    assert read(folder) == before


def test_what_one_run_lacks_is_in_no_mean(tmp_path):
    for seed in range(2):
        lda = {"accuracy_matrix": made_up(4)["accuracy_matrix"], "acc": 5.0} | ({} if seed else {"maa": 6.0})
        write_run(tmp_path / f"run-{seed}", results=made_up(4, seed=seed) | {"heads": {"lda": lda}})
    (group,) = group_runs(find_runs([tmp_path])[0])
    summary = summarize_runs([run.results for run in group.runs])["heads"]["lda"]
    assert summary["acc"]["mean"] == 5.0 and "maa" not in summary


@pytest.mark.parametrize("settings", [{"margin_weight": None}, {"lr": None}])
def test_settings_that_are_missing_are_no_error(tmp_path, settings):
    folder = write_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | settings)
    assert len(group_runs(find_runs([tmp_path])[0])) == 1
    write_json(folder / "config.json", {name: config[name] for name in ("benchmark", "method", "seed")})
    assert len(group_runs(find_runs([tmp_path])[0])) == 1


def test_a_setting_that_came_later_was_what_it_is_by_default(tmp_path):
    for seed, scale in enumerate((1.0, 1.0, 0.5)):
        folder = write_run(tmp_path / f"run-{seed}", seed, merge_scale=scale)
        if seed == 0:  # of a version that did not know them
            config = json.loads((folder / "config.json").read_text())
            write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("merge_scale", "drift")})
    groups = group_runs(find_runs([tmp_path])[0])
    assert [[run.results["seed"] for run in group.runs] for group in groups] == [[0, 1], [2]]


def test_a_run_without_its_settings_is_a_group_of_its_own(tmp_path):
    for seed in range(2):
        (write_run(tmp_path / f"run-{seed}", seed) / "config.json").unlink()
    groups = group_runs(find_runs([tmp_path])[0])
    assert [group.name for group in groups] == ["janus, run-0", "janus, run-1"]
    assert differences(groups) == []


def test_groups_have_short_names_that_tell_them_apart(tmp_path):
    def names(*settings: dict[str, Any]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for i, each in enumerate(settings):
            write_run(folder / f"run-{i}", **each)
        return [group.name for group in group_runs(find_runs([folder])[0])]

    assert names({}, {"method": "lora"}) == ["janus", "lora"]
    assert names({"lr": 0.01}, {"lr": 0.02}, {"method": "lora"}) == ["janus, lr 0.01", "janus, lr 0.02", "lora"]
    many = [{"lr": 0.01 * i, "rank": i, "epochs": i, "batch_size": i} for i in (2, 3)]
    assert names(*many) == ["janus, run-0", "janus, run-1"]
    folder = {"benchmark": "cifar100", "data_dir": "/data"}
    assert names({}, folder) == ["emoji: janus", "cifar100: janus"]


def test_a_group_lies_where_all_its_seeds_do(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "several" / f"seed-{seed}", seed)
    write_run(tmp_path / "one", lr=0.5)
    groups = {group.folder.name: len(group.runs) for group in group_runs(find_runs([tmp_path])[0])}
    assert groups == {"one": 1, "several": 2}


def test_differences_are_the_settings_and_versions_in_which_runs_differ(tmp_path):
    write_run(tmp_path / "a", lr=0.01, balance=False)
    for seed, torch in enumerate(("2.12", "2.13")):
        folder = write_run(tmp_path / f"b-{seed}", seed, lr=0.01, limit_per_class=7)
        write_json(folder / "results.json", stored(folder) | {"versions": {"torch": torch}})
    write_run(tmp_path / "c", method="lora", lr=0.5)
    found = dict(differences(group_runs(find_runs([tmp_path])[0])))
    assert found == {
        "--method": ["janus", "janus", "lora"],
        "--rectify": ["exact", "exact", "none"],
        "--estimator": ["gram", "gram", "none"],
        "--margin-weight": ["0.5", "0.5", "0.0"],
        "--balance": ["no", "yes", "–"],
        "--limit-per-class": ["left out", "7", "left out"],
        "--lr": ["0.01", "0.01", "0.5"],
        "torch": ["2.13", "2.12, 2.13", "2.13"],
    }
