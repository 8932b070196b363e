"""--validation: training images that are held out are measured, and the test images rest."""

from dataclasses import replace

import pytest
import torch
from conftest import make_trainer, without_time
from matplotlib.figure import Figure
from results import made_up, read, set_settings, write_run
from trees import folders

from janus_ext import ContinualLearner, evaluate, train
from janus_ext.config import TrainConfig
from janus_ext.data import emoji, folder, images
from janus_ext.data.benchmark import Split
from janus_ext.data.tasks import draw_share
from janus_ext.errors import DataError
from janus_ext.exports import card
from janus_ext.reports import plots, table
from janus_ext.reports.found import find_runs
from janus_ext.reports.groups import group_runs
from janus_ext.runs import checkpoint
from janus_ext.training.trainer import Trainer

FLAGS = "--tasks 2 --limit-per-class 3 --validation 0.34 --epochs 1 --batch-size 200 --method lora --rank 4 --no-plots"
HELD_OUT, TEST = "held-out training images", "test images"


def counts(split) -> list[int]:
    return torch.bincount(split.labels).tolist()


# which images are held out --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("samples", "share", "held"),
    [(5, 0.2, 1), (10, 0.2, 2), (100, 0.25, 25), (6, 0.2, 1), (3, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1), (1, 0.5, 0)],
)
def test_the_nearest_whole_number_is_drawn_one_at_least_and_never_all(samples, share, held):
    drawn = draw_share([f"{n}.jpg" for n in range(samples)], share, seed=3)
    assert len(drawn) == len(set(drawn)) == held and set(drawn) < set(range(samples))


def test_a_draw_is_the_same_on_every_machine():
    assert draw_share(list("abcdefgh"), 0.5, seed=0) == [1, 3, 7, 2]
    assert draw_share(list("hgfedcba"), 0.5, seed=0) == [6, 4, 0, 5], "names count, and not places"


def test_samples_of_one_family_are_drawn_together():
    names = [f"{family}{n}" for family in "abcd" for n in range(3)]
    for seed in range(20):
        drawn = [names[place] for place in draw_share(names, 0.5, seed, family=lambda name: name[0])]
        assert len(drawn) == 6 and len({name[0] for name in drawn}) == 2
    assert len(draw_share(names, 0.1, 0, family=lambda name: name[0])) == 3, "the least that can be drawn"
    assert draw_share(names[:3], 0.5, 0, family=lambda name: name[0]) == [], "nothing else is left to learn"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_of_every_class_exactly_the_share_is_held_out_and_the_rest_is_learned(patterns, share):
    split = patterns.with_validation(share, seed=0)
    assert counts(split.test) == [8 * share] * 6 and counts(split.train) == [8 - 8 * share] * 6
    assert not set(split.train.samples) & set(split.test.samples)
    assert {*split.train.samples, *split.test.samples} == set(patterns.train.samples)
    assert split.validation and not patterns.validation
    pixels = dict(zip(patterns.train.samples, patterns.train.images, strict=True))
    for part in (split.train, split.test):
        labels = [int(name.split("/")[1]) // 8 for name in part.samples]
        assert part.labels.tolist() == labels
        assert all(torch.equal(pixels[name], image) for name, image in zip(part.samples, part.images, strict=True))


def test_the_seed_alone_says_which(patterns):
    first, again, other = (patterns.with_validation(0.5, seed) for seed in (0, 0, 1))
    assert first.test.samples == again.test.samples != other.test.samples
    assert first.split_sha256 == again.split_sha256
    assert len({benchmark.split_sha256 for benchmark in (patterns, first, other)}) == 3
    held = [{place % 8 for place in first.test.of_classes([label]).tolist()} for label in range(6)]
    assert len(set(map(frozenset, held))) > 1, "every class is drawn by itself"


def test_a_class_with_one_training_image_is_named(patterns):
    rows = torch.tensor([row for row in range(48) if not 8 < row < 16])
    with pytest.raises(
        DataError, match="two different training images of each class, .*; 1 of 6 classes have fewer: b$"
    ):
        replace(patterns, train=patterns.train.take(rows)).with_validation(0.5, seed=0)


def test_the_limit_comes_first():
    benchmark = emoji.load(TrainConfig(limit_per_class=4, validation=0.5).resolved())
    limited = emoji.load(TrainConfig(limit_per_class=4).resolved())
    assert counts(benchmark.train) == counts(benchmark.test) == [2] * 200
    assert {*benchmark.train.samples, *benchmark.test.samples} == set(limited.train.samples)
    with pytest.raises(DataError, match="200 of 200 classes have fewer: mahjong red dragon, "):
        emoji.load(TrainConfig(limit_per_class=1, validation=0.5).resolved())


@pytest.mark.parametrize(("share", "held"), [(0.2, 1), (0.33, 2)])
def test_drawings_of_one_family_stay_on_one_side(share, held):
    for seed in range(3):
        benchmark = emoji.load(TrainConfig(validation=share, seed=seed).resolved())
        assert counts(benchmark.test) == [held] * 200
        learned = {benchmark.family(sample) for sample in benchmark.train.samples}
        assert not learned & {benchmark.family(sample) for sample in benchmark.test.samples}
    assert benchmark.family("openmoji/1f600") == benchmark.family("openmoji-black/1f600") != "openmoji/1f601"


# what is read ---------------------------------------------------------------------------------------------------------
class Untouchable(Split):
    """A test split that must rest; but that its labels are of the classes is looked at when a benchmark is made."""

    stream = take = None

    def __getattribute__(self, name):
        if name == "labels":
            return torch.zeros(1, dtype=torch.int64)
        if name == "__class__":
            return Untouchable
        raise AssertionError(f"{name} of the test images was asked for")


def test_the_test_images_are_neither_read_nor_asked_for(patterns, weights, tmp_path):
    resting = replace(patterns, test=Untouchable()).with_validation(0.25, seed=0)
    results = make_trainer(resting, weights, tmp_path / "run", epochs=1).run()
    assert results["validation"] and results["test_sizes"] == [4, 4, 4]
    assert results["split_sha256"] == resting.split_sha256


def test_images_in_files_are_shown_as_test_images_are_and_the_test_folder_is_not_opened(tmp_path, monkeypatch):
    folders(tmp_path / "data" / "train", 4, 4, "abcd".__getitem__)
    folders(tmp_path / "data" / "test", 4, 1, "abcd".__getitem__)
    (tmp_path / "tasks.txt").write_text("d\na\n\nc\nb\n")
    opened, read_image = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, upright: opened.append(path) or read_image(path, upright))
    settings = {"benchmark": "folder", "data_dir": tmp_path / "data", "workers": 0, "task_list": tmp_path / "tasks.txt"}
    held = folder.load(TrainConfig(**settings, validation=0.25).resolved())
    assert held.tasks == ((3, 0), (2, 1)) and counts(held.test) == [1] * 4 and held.test.margin == held.train.margin
    shown = torch.cat([pixels for pixels, _ in held.testing(0).batches(8)])
    assert len(opened) > 16 and all(path.is_relative_to(tmp_path / "data" / "train") for path in opened)
    plain = folder.load(TrainConfig(**settings).resolved()).train
    rows = [plain.samples.index(held.test.samples[row]) for row in held.testing(0).rows.tolist()]
    assert torch.equal(shown, torch.stack([plain[row][0] for row in rows])), "not augmented"


def test_check_data_says_what_is_held_out(capsys):
    assert train.main(["--validation", "0.33", "--check-data"]) == 0
    assert f"emoji: 800 training and 400 {HELD_OUT}, 200 classes in 10 tasks, split " in capsys.readouterr().out
    assert train.main(["--check-data"]) == 0
    assert f"emoji: 1,200 training and 400 {TEST}, 200 classes" in capsys.readouterr().out


# runs -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """(the call, its folder): two seeds, one of three images of a class held out."""
    place = tmp_path_factory.mktemp("runs") / "held"
    call = [*FLAGS.split(), "--weights", str(weights), "--seed", "3", "4", "--device", "cpu", "--output", str(place)]
    assert train.main(call) == 0
    return call, place


def test_a_run_says_on_what_it_was_measured(finished):
    _, place = finished
    results = [checkpoint.read_json(place / f"seed-{seed}" / "results.json") for seed in (3, 4)]
    for found, seed in zip(results, (3, 4), strict=True):
        benchmark = emoji.load(TrainConfig(tasks=2, limit_per_class=3, validation=0.34, seed=seed).resolved())
        assert found["validation"] is True and found["test_sizes"] == [100, 100]
        assert found["split_sha256"] == benchmark.split_sha256
    assert results[0]["split_sha256"] != results[1]["split_sha256"]
    assert f"400 training and 200 {HELD_OUT}" in (place / "seed-3" / "log.txt").read_text()
    assert checkpoint.read_json(place / "summary.json")["validation"] is True
    assert len(group_runs(find_runs([place])[0])) == 1


def test_another_share_is_refused_and_the_same_one_is_taken(finished, capsys):
    call, place = finished
    again = [*call, "--resume"]
    assert train.main(again) == 0
    out = capsys.readouterr().out
    assert "has finished before" in out and f"2 seeds, on {HELD_OUT}, mean" in out
    for flags, asked in ((["--validation", "0.25"], "0.25"), ([], "left out")):
        others = call[: call.index("--validation")] + flags + call[call.index("--validation") + 2 :]
        assert train.main([*others, "--resume"]) == 2
        expected = f"seed-3 holds a run with other settings: --validation 0.34 (asked: {asked}); choose another folder"
        assert expected in capsys.readouterr().err


def test_a_run_that_is_cut_off_goes_on_with_the_same_images(patterns, weights, tmp_path, monkeypatch):
    class CutOff(BaseException):
        pass

    def cut(self, index, *rest):
        if index == 2:
            raise CutOff
        learn(self, index, *rest)

    split, learn = patterns.with_validation(0.25, seed=0), Trainer._learn
    whole = make_trainer(split, weights, tmp_path / "whole", epochs=1).run()
    with monkeypatch.context() as patched, pytest.raises(CutOff):
        patched.setattr(Trainer, "_learn", cut)
        make_trainer(split, weights, tmp_path / "run", epochs=1).run()
    second = make_trainer(split, weights, tmp_path / "run", epochs=1)
    second.restore()
    assert len(second.matrix) == 2 and without_time(second.run()) == without_time(whole)


def test_evaluate_measures_the_test_images(finished, tmp_path, capsys):
    """Those of the run's own settings, and without a word about other images: these are the run's."""
    _, place = finished
    assert evaluate.main([str(place / "seed-4"), "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "not those of the run" not in captured.err and HELD_OUT not in captured.out
    found = checkpoint.read_json(tmp_path / "evaluation.json")
    assert [one["images"] for one in found["classes"]] == [2] * 200
    plain = emoji.load(TrainConfig(tasks=2).resolved())
    wanted = ContinualLearner.load(place / "seed-4").evaluate_split(plain.test, plain.class_names)
    assert found["confusion"] == wanted.confusion.tolist()
    set_settings(place / "seed-4", {"seed": [5]})  # as if other images had been held out
    assert evaluate.main([str(place / "seed-4"), "--output", str(tmp_path)]) == 0
    assert "the images are not those of the run" in capsys.readouterr().err
    set_settings(place / "seed-4", {"seed": [4]})


# reports --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "wanted", "other"), [({"validation": True}, HELD_OUT, TEST), ({}, TEST, HELD_OUT)])
def test_tables_pictures_and_cards_say_on_what(changes, wanted, other):
    results = made_up(4, **changes)
    texts = [table.format_table(results, 200), table.format_summary([results] * 2), card._accuracy(results)]
    for name, labels in (("accuracy_matrix", "get_xlabel"), ("trajectory", "get_ylabel")):
        figure = Figure()
        plots.PLOTS[name](figure, results)
        texts.append(getattr(figure.axes[0], labels)())
    assert all(wanted in text and other not in text for text in texts)
    assert max(map(len, table.format_table(results, 60).splitlines())) <= 60


def test_the_page_says_on_what_and_tells_runs_apart(tmp_path):
    write_run(tmp_path / "plain")
    write_run(tmp_path / "rival", method="lora")
    held = write_run(tmp_path / "held", validation=0.2)
    checkpoint.write_json(held / "results.json", checkpoint.read_json(held / "results.json") | {"validation": True})
    assert [read(tmp_path / name)["measured"] for name in ("plain", "held")] == [TEST, HELD_OUT]
    page = read(tmp_path)
    assert page["measured"] == f"{HELD_OUT} or {TEST}"
    assert [group["name"] for group in page["groups"]] == [
        f"janus on {HELD_OUT}",
        f"janus on {TEST}",
        f"lora on {TEST}",
    ]
    assert {"name": "--validation", "values": ["0.2", "left out", "left out"]} in page["differences"]
