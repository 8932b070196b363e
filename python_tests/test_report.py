"""The page of many runs: which runs, in which groups, with which numbers, and that the page itself works."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, probe
from conftest import make_trainer
from results import data_of, made_up, read, stored, write_run

from janus_ext.errors import ArgumentError
from janus_ext.report import main
from janus_ext.reports import html, spreads
from janus_ext.reports.found import find_runs
from janus_ext.runs.checkpoint import append_json_line, write_json
from janus_ext.runs.metrics import trajectory

MISCHIEF = """</script><script>window.ran = 1</script><img src=x onerror="window.ran = 1">&amp; <!-- ' \udcff"""


# which runs -----------------------------------------------------------------------------------------------------------
def test_a_folder_is_a_run_or_holds_seeds_or_holds_such_folders(tmp_path):
    one = write_run(tmp_path / "runs/one")
    seeds = [write_run(tmp_path / f"runs/several/seed-{seed}", seed) for seed in (10, 2)]
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes.txt").write_text("")
    everything = [one, seeds[1], seeds[0]]
    assert [run.folder for run in find_runs([one])[0]] == [one]
    assert [run.folder for run in find_runs([tmp_path / "runs/several"])[0]] == everything[1:]
    assert find_runs([tmp_path / "runs"])[1] == []
    assert [run.folder for run in find_runs([tmp_path / "runs"])[0]] == everything


def test_a_run_that_is_named_twice_is_shown_once(tmp_path):
    one = write_run(tmp_path / "runs/one")
    (tmp_path / "link").symlink_to(one)
    assert len(find_runs([one, tmp_path / "runs", tmp_path / "link"])[0]) == 1


def test_what_is_unfinished_or_damaged_is_left_out_with_the_reason(tmp_path):
    whole, unfinished, damaged, lacking = (write_run(tmp_path / name) for name in ("a", "b", "c", "d"))
    (unfinished / "results.json").unlink()
    (damaged / "config.json").write_text("{")
    write_json(lacking / "results.json", {"method": "janus"})
    runs, skipped = find_runs([tmp_path])
    assert [run.folder for run in runs] == [whole]
    assert len(skipped) == 3 and not any("\n" in line for line in skipped)
    assert f"{unfinished} is left out: it has not finished (no results.json)" in skipped
    assert any(str(damaged / "config.json") in line and "cannot be read" in line for line in skipped)
    assert any(
        str(lacking / "results.json") in line and "lacks benchmark, seed, accuracy_matrix" in line for line in skipped
    )
    assert read(tmp_path)["skipped"] == skipped


def test_without_any_run_that_can_be_shown_there_is_no_page(tmp_path):
    (write_run(tmp_path / "a") / "results.json").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="no run can be shown: .*has not finished"):
        find_runs([tmp_path])
    with pytest.raises(ArgumentError, match=r"empty is no run and holds none: there is no config.json or results.json"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(ArgumentError, match="RUN .*absent is missing"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(ArgumentError, match="RUN .*results.json is no folder"):
        find_runs([write_run(tmp_path / "b") / "results.json"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("method", None),
        ("seed", "0"),
        ("accuracy_matrix", []),
        ("accuracy_matrix", 7),
        ("accuracy_matrix", [[1.0], [2.0]]),
        ("task_recognition_matrix", [[1.0], [2.0, None], [3.0, 3.0, 3.0], [4.0, 4.0, 4.0, 4.0]]),
        ("violation", [None, 1e-7]),
        ("seconds", [1.0, 2.0, 3.0, "<b>"]),
        ("basis_rank", [{}, {}, {}, {"block": None}]),
        ("violation_per_layer", [{}, {}, {}, []]),
        ("acc", True),
        ("acc", 10**400),
        ("basis_rank", [{}, {}, {}, {"block": 10**400}]),
        ("versions", []),
    ],
)
def test_values_that_no_run_writes_are_named_and_left_out(tmp_path, key, value):
    write_run(tmp_path / "a", results=made_up(4) | {key: value})
    with pytest.raises(ArgumentError, match=f"a/results.json: {key} is not what a run of . tasks writes"):
        find_runs([tmp_path])


# numbers --------------------------------------------------------------------------------------------------------------
def assert_shows(group: dict[str, Any], run: int, results: dict[str, Any]) -> None:
    """Every number of ``results.json`` that the page shows is in its data, to the last bit."""
    for key in ("acc", "maa", "bwt", "forgetting", "plasticity", "acc_task_known", "task_recognition"):
        assert group["numbers"][key]["values"][run] == results[key]
    for key in ("acc_sample_weighted", "maa_sample_weighted"):
        assert group["numbers"][key]["values"][run] == results[key]
    for name, key in spreads.MATRICES.items():
        assert [row["values"][run] for row in group["matrices"][name]] == results[key]
        assert group["curves"][name]["values"][run] == trajectory(results[key])
    for key in ("violation", "danger", "seconds"):
        shown = group["curves"].get(key, {"values": {run: [None] * len(results[key])}})
        assert shown["values"][run] == results[key]
    for key in ("violation_per_layer", "basis_rank"):
        by_task = zip(*(layer["values"][run] for layer in group["layers"][key]), strict=True)
        names = [layer["name"] for layer in group["layers"][key]]
        shown = [{n: v for n, v in zip(names, values, strict=True) if v is not None} for values in by_task]
        assert (shown or [{}] * len(results[key])) == results[key]
    assert group["numbers"]["seconds"]["values"][run] == sum(results["seconds"])


def test_every_number_of_a_run_is_on_the_page(tmp_path):
    folder = write_run(tmp_path / "a")
    (group,) = read(folder)["groups"]
    assert_shows(group, 0, stored(folder))
    assert group["curves"]["newest"]["values"][0] == [row[-1] for row in stored(folder)["accuracy_matrix"]]
    assert group["training"]["places"] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert group["training"]["loss"]["values"] == [[2, 1] * 4]


@pytest.mark.parametrize("method", ["janus", "lora"])
def test_every_number_of_a_run_of_the_trainer_is_on_the_page(tmp_path, patterns, weights, method):
    folder = tmp_path / "run"
    trainer = make_trainer(patterns, weights, folder, method=method)
    results = trainer.run()
    write_json(folder / "results.json", results)
    write_json(folder / "config.json", trainer.config.to_json())
    (group,) = read(folder)["groups"]
    assert_shows(group, 0, stored(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert group["training"]["loss"]["values"] == [[line["loss"] for line in lines]]


def test_a_group_has_mean_and_deviation_over_its_seeds(tmp_path):
    runs = [made_up(4, seed=seed) for seed in range(3)]
    for seed, run in enumerate(runs):
        matrix = [[value / (seed + 1) for value in row] for row in run["accuracy_matrix"]]
        run |= {"accuracy_matrix": matrix, "acc": 10.0 * seed}
        write_run(tmp_path / f"seed-{seed}", seed, results=run)
    (group,) = read(tmp_path)["groups"]
    assert group["seeds"] == [0, 1, 2]
    for seed, run in enumerate(runs):
        assert_shows(group, seed, json.loads(json.dumps(run)))
    last = np.array([run["accuracy_matrix"][-1] for run in runs])
    np.testing.assert_allclose(group["matrices"]["all"][-1]["mean"], last.mean(0), rtol=1e-12)
    np.testing.assert_allclose(group["matrices"]["all"][-1]["std"], last.std(0, ddof=1), rtol=1e-12)
    assert (group["numbers"]["acc"]["mean"], group["numbers"]["acc"]["std"]) == (10, 10)
    curve = group["curves"]["all"]
    np.testing.assert_allclose(
        curve["mean"], np.mean([trajectory(run["accuracy_matrix"]) for run in runs], 0), rtol=1e-12
    )
    assert group["training"]["loss"]["mean"] == [3, 2] * 4


def test_what_rounding_can_make_is_marked(tmp_path):
    results = made_up(3)
    rounding = [{name: 2 * value for name, value in task.items()} for task in results["violation_per_layer"]]
    rounding[2] = {name: value / 4 for name, value in rounding[2].items()}
    write_run(tmp_path / "a", tasks=3, results=results | {"violation_rounding_per_layer": rounding})
    (group,) = read(tmp_path)["groups"]
    assert group["curves"]["violation"]["rounded"] == [False, True, False]
    assert group["numbers"]["violation"]["rounded"] == [False]


OLDER = sorted(made_up(3).keys() - {"benchmark", "method", "seed", "accuracy_matrix"})


@pytest.mark.parametrize(
    "lacking", [*([key] for key in OLDER), OLDER], ids=lambda keys: keys[0] if len(keys) == 1 else "all"
)
def test_what_an_older_run_lacks_is_left_out(tmp_path, lacking):
    results = {key: value for key, value in made_up(3).items() if key not in lacking}
    folder = write_run(tmp_path / "a", tasks=3, results=results)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).unlink()
    (group,) = read(folder)["groups"]
    assert group["training"] == {}
    assert group["matrices"]["all"] and group["curves"]["all"]
    shown = {**group["numbers"], **group["layers"], **{spreads.MATRICES[name]: 1 for name in group["matrices"]}}
    assert not shown.keys() & set(lacking)
    assert main([str(folder)]) == 0


def test_runs_of_one_group_that_were_trained_for_other_epochs_show_no_curve_of_training(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"seed-{seed}", seed)
    append_json_line(tmp_path / "seed-1/metrics.jsonl", {"task": 3, "epoch": 5, "loss": 1.0, "accuracy": 1.0})
    (group,) = read(tmp_path)["groups"]
    assert group["training"] == {}


# the page -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def page(tmp_path: Path) -> str:
    """A page of several groups with names that try to leave their place."""
    runs = tmp_path / "runs"
    for method in ("janus", "lora", "inflora"):
        for seed in range(2):
            write_run(runs / f"{method}-<script>window.ran = 2<" / f"seed-{seed}", seed, method=method)
    joint = made_up(1, method="joint", basis_rank=[{}], violation_per_layer=[{}], violation=[None])
    write_run(runs / "joint", tasks=1, method="joint", results=joint)
    (write_run(runs / "unfinished") / "results.json").unlink()
    layers = [f"{MISCHIEF}{i}" for i in range(30)]
    many = made_up(50, method=MISCHIEF, versions={MISCHIEF: MISCHIEF})
    many["basis_rank"] = [dict.fromkeys(layers, 3 * t) for t in range(50)]
    write_run(runs / "many", tasks=50, results=many, class_list=None, weights=MISCHIEF)
    return html.render(html.page_data(*find_runs([runs])))


def test_no_name_leaves_its_place(page):
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page and "<!--" not in page
    assert data_of(page)["groups"][-1]["method"] == MISCHIEF
    page.encode("utf-8", "xmlcharrefreplace")


def test_the_page_asks_nobody_for_anything(page):
    assert re.findall(r"https?://[^\s\"']*", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|sendBeacon|\bsrc=(?!x)", page)
    assert re.findall(r'<link[^>]*href="([^"]*)"', page) == ["data:,"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


FACTS = """
for (const details of document.querySelectorAll("details")) details.open = true;
const shown = [...document.querySelectorAll("main > section:not([hidden])")].map((one) => one.id);
const table = document.querySelector("#summary table");
const rows = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
const head = table.tHead.rows[0].cells[2];
const orders = [0, 1].map(() => { head.querySelector("button").click(); return [head.ariaSort, rows()]; });
const picture = document.querySelector("#curves svg[tabindex]");
for (const key of ["Home", "ArrowRight"]) picture.dispatchEvent(new KeyboardEvent("keydown", { key }));
const tip = document.querySelector("#curves .tip").innerText;
const cell = () => document.querySelector("#matrices td.low, #matrices td.middle, #matrices td.high").textContent;
const before = cell();
document.querySelector("input[value=known]").click();
return {
  shown, orders, tip, cells: [before, cell()], inner: innerWidth,
  width: document.documentElement.scrollWidth,
  pictures: document.querySelectorAll("figure svg[role]").length,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  ran: window.ran ?? null,
};
"""
SECTIONS = ["summary", "curves", "balance", "matrices", "layers", "training", "settings", "runs"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(page, width, tmp_path):
    facts, console = probe(page, width, FACTS, tmp_path)
    assert console == [] and facts["requests"] == [] and facts["ran"] is None
    assert facts["inner"] == facts["width"] == width, "the page is wider than its window"
    assert facts["shown"] == SECTIONS and facts["pictures"] == 7 + 1 + 2 * 4 + 3
    (up, first), (down, second) = facts["orders"]
    assert (up, down) == ("descending", "ascending")
    values = [float(text.split()[0].replace("−", "-")) for text in first]
    assert values == sorted(values, reverse=True) and second == first[::-1]
    assert facts["tip"].startswith("after task 2") and "lora" in facts["tip"]
    groups = data_of(page)["groups"]
    several = next(group for group in groups if group["tasks"] > 1)
    assert facts["cells"] == [f"{several['matrices'][name][0]['mean'][0]:.1f}" for name in ("all", "known")]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_sections_without_numbers_are_not_shown(tmp_path):
    results = {key: value for key, value in made_up(1).items() if key not in OLDER} | {"acc": 50.0}
    write_run(tmp_path / "runs/a", tasks=1, results=results)
    (tmp_path / "runs/a/metrics.jsonl").unlink()
    page = html.render(html.page_data(*find_runs([tmp_path / "runs"])))
    script = 'return [...document.querySelectorAll("main > section:not([hidden])")].map((one) => one.id)'
    shown, console = probe(page, 390, script, tmp_path)
    assert console == [] and shown == ["summary", "curves", "runs"]
