"""benchmarks/study.py: what is chosen and said of finished runs, from runs that never were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, orthonormal

from janus_ext import ops
from janus_ext.rectification import Rectification

SHARES = {"linear": 40.0, "ncm": 45.0, "lda": 50.0, "ridge": 48.0}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """A study whose runs are all finished: `accuracy(row, seed, head)` says what each has reached."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import study as module

    class Finished(module.Study):
        accuracy_of: Callable[[str, int, str], float]
        known: dict[str, dict[str, Any]]

        def line(self, change: dict[str, Any], seed: int) -> dict[str, Any]:
            own = "aligned" if change.get("head") == "aligned" else "lda 2000" if "head_width" in change else None
            heads = [*SHARES, own] if own else SHARES
            alike = [row for row, c in self.known.items() if c.items() <= change.items()]
            row = max(alike, key=lambda row: len(self.known[row]), default="janus | of the ablation")
            shown = {h: {"acc": self.accuracy_of(row, seed, h), "maa": 60.0, "bwt": -9.0} for h in heads}
            shown = {h: of | {"plasticity": self.accuracy_of(row, seed, h) + 9} for h, of in shown.items()}
            return {"row": row, "seed": seed, "heads": shown, "movement": None, "violation": None}

    def make(accuracy: Callable[[str, int, str], float], data: str = "emoji") -> Any:
        made = Finished(data, Path())
        made.accuracy_of = accuracy
        places = [(m, at) for m, grid in module.METHODS.items() for at in grid.every()]
        runs = [(m, at, head) for m, at in places for head in ("linear", *module.OWN_RUNS)]
        runs = [run for run in runs if run[2] == "linear" or run[0] in module.OWN_RUNS[run[2]]]
        made.known = dict(module.candidate(data, *run) for run in runs)
        return made

    return make


def plain(row: str, seed: int, head: str) -> float:
    """Joint is 20 ahead, frozen 2 behind, what is tried at 0.004 the best; other methods are level but for the seed."""
    method, setting = row.split(" | ")[:2]
    share = SHARES.get(head, 49.0) + (20 if method == "joint" else -2 if method == "frozen" else 0)
    return share + (1 if setting.startswith("lr 0.004") else 0) + (0.5 * seed if method == "lora" else 0)


def test_the_best_candidate_of_the_selection_seeds_is_chosen(study):
    assert study(plain).chosen("janus", "lda").startswith("janus | lr 0.004")
    late = study(lambda row, seed, head: plain(row, seed, head) + (9 if "lr 0.016" in row and seed == 101 else 0))
    assert late.chosen("bilora", "lda").startswith("bilora | lr 0.004"), "only the best are run on seed 101"


def test_of_equal_candidates_all_go_on_and_the_lowest_rate_is_chosen(study):
    rates = ("lr 0.002", "lr 0.004", "lr 0.016")
    equal = study(lambda row, seed, head: 50 + (1e-13 * seed if rates[2] in row else 0) + row.endswith(rates))
    finalists = [f"lora | {rate}" for rate in rates]
    assert equal.finalists("lora", "lda") == finalists, "three of them share the first place"
    assert equal.chosen("lora", "lda") == finalists[0]
    tied = study(lambda row, seed, head: plain(row, 0, head) + (seed == 101 and "lr 0.032" in row))
    assert tied.finalists("lora", "lda")[0] == "lora | lr 0.004" and len(tied.finalists("lora", "lda")) > 5
    assert tied.chosen("lora", "lda") == "lora | lr 0.004", "of 51 twice, and of 50 and 51"


def test_what_went_to_the_reported_seeds_is_shown_with_every_head(study):
    made = study(plain)
    shares = "42.00 ± 0.79 | 47.00 ± 0.79 | 52.00 ± 0.79 | 50.00 ± 0.79"  # 1 for its rate, 0 to 2 by seed
    assert f"| lora, lr 0.004 | {shares} |" in made.finished_on_reported().splitlines()
    whole = made.line
    made.line = lambda change, seed: None if seed == 3 and change.get("lr") == 0.004 else whole(change, seed)
    assert "lr 0.004" not in made.finished_on_reported() and "lora, lr 0.008" in made.finished_on_reported()


def test_a_grid_grows_until_its_best_is_within_or_the_ladder_ends(study):
    import study as module
    from study_rows import METHODS

    def rises(row: str, seed: int, head: str) -> float:
        """LDA is best at a rate of 0.064 and an energy of 0.999, linear at the lowest rate, others in the middle."""
        change = dict(pair.rsplit(" ", 1) for pair in row.split(" | ")[1].split(", ") if pair)
        lr, energy = float(change.get("lr", 1)), float(change.get("energy_start", 1))
        best = {"lda": (0.064, 0.999), "linear": (0.0, 0.97)}.get(head, (0.004, 0.97))
        return 50 - abs(lr - best[0]) - abs(energy - best[1])

    made = study(rises)
    grid, known = METHODS["janus"], made.candidates("janus")
    names = {place: module.candidate("emoji", "janus", place)[0] for place in grid.every()}
    assert {names[place] for place in grid.start()} < known.keys() and len(known) < len(grid.every())
    best = {place for place in names for head in SHARES if names[place] in made.finalists("janus", head)}
    assert all(names[beside] in known for place in best for beside in grid.beside(place))
    assert "janus | lr 6.25e-05, energy_start 0.5, energy_end 0.7" not in known, "far from what is best of any head"
    assert made.chosen("janus", "lda") == "janus | lr 0.064, energy_start 0.999, energy_end 0.9999"
    assert len(made.candidates("frozen")) == 1


def test_a_grid_does_not_grow_while_trials_are_missing(study):
    made = study(lambda row, seed, head: 50.0 + ("lr 0.016" in row))
    found = made.line
    assert len(made.candidates("janus")) > 9
    made._grown.clear()
    made.line = lambda change, seed: None if change.get("lr") == 0.004 else found(change, seed)
    assert len(made.candidates("janus")) == 9


def test_a_run_that_diverged_is_done_and_never_chosen(study):
    made = study(plain)
    found = made.line
    made.line = lambda change, seed: found(change, seed) | ({"heads": {}} if change.get("lr") == 0.004 else {})
    assert "lr 0.004" not in made.chosen("janus", "lda") and "lr 0.004" in made.trials()
    assert made.reported("janus", "lda")


@pytest.mark.parametrize("head", ["aligned", "lda 2000"])
@pytest.mark.parametrize("data", ["emoji", "glyphs"])
def test_runs_of_their_own_are_tuned_or_follow_another_heads_choice(study, data, head):
    """Without the guard. Heads trained on samples have a choice of their own; LDA's is that of wider features, too."""
    rates = {"linear": "0.004", "lda": "0.001", "aligned": "0.00025"}
    settings_of = "lda" if head == "lda 2000" else "aligned" if data == "emoji" else "linear"
    made = study(lambda row, seed, head: 50.0 + 9 * (head in rates and f"lr {rates[head]}," in row), data)
    row, change = made.pick("inflora", head)
    assert row.startswith(f"inflora | lr {rates[settings_of]},") and change["lr"] == float(rates[settings_of])
    assert row.endswith(f" | {head}") and change["head"] == head.split()[0] and change["drift_budget"] == 1e9
    assert change.get("head_width") == {"aligned": None, "lda 2000": 2000}[head]
    assert made.pick("frozen", head)[0] == f"frozen |  | {head}", "nothing is to be tuned"
    assert made.pick("bilora", head) is None and not made.is_tuned("bilora", head)


def test_heads_that_are_tuned_on_their_own_have_trials_of_their_own(study):
    made = study(plain)
    known = made.candidates("lora", "aligned")
    assert all(row.endswith(" | aligned") and change["head"] == "aligned" for row, change in known.items())
    assert known.keys().isdisjoint(made.candidates("lora"))
    assert any(line.startswith("| lora, lr 0.004, aligned | 100 |") for line in made.trials().splitlines())
    found = made.line
    made._grown.clear()
    made.line = lambda change, seed: None if change["head"] == "aligned" else found(change, seed)
    assert made.chosen("lora", "linear") and made.chosen("lora", "aligned") is None is made.pick("lora", "aligned")


def test_a_run_goes_from_the_trials_to_the_seeds_and_runs_nothing_twice(study, monkeypatch):
    import study as module

    made, ran = study(plain), []
    found = made.line

    def line(change, seed):
        return found(change, seed) if (repr(sorted(change.items())), seed) in ran else None

    def run_cells(cells, jobs, threads, path, where):
        ran.extend((repr(sorted(change.items())), seed) for _, change, seed in cells)

    made.line = line
    monkeypatch.setattr(module, "run_cells", run_cells)
    monkeypatch.setattr(module, "read_lines", lambda path: [])
    made.run(["lora", "frozen"], 1)
    assert all(made.pick("lora", head) and len(made.reported("lora", head)) == 5 for head in module.ALL_HEADS)
    tried = [seed for text, seed in ran if "validation" in text and "'aligned'" in text]
    assert tried.count(100) >= 9 and tried.count(101) >= 2, "runs of their own are tried as well"
    frozen = {(text, seed) for text, seed in ran if "'learn', 'none'" in text and "validation" in text}
    assert {seed for _, seed in frozen} == {100, 101} and len(frozen) == 2, "nothing to tune: the same for all heads"
    ran_before, made.seeds = len(ran), module.FRESH_SEEDS
    assert not made.heads()
    made.run(["lora", "frozen"], 1)
    again = ran[ran_before:]
    assert {seed for text, seed in again if "validation" not in text} == {5, 6, 7, 8, 9}
    assert made.heads() == list(module.HEADS), "no runs of heads' own"
    assert [x["seed"] for x in made.reported("lora", "lda")] == [5, 6, 7, 8, 9]


def test_a_finalist_that_diverges_later_leaves_the_other(study):
    made = study(plain)
    found = made.line
    made.line = lambda change, seed: (
        found(change, seed) | ({"heads": {}} if change.get("lr") == 0.004 and seed == 101 else {})
    )
    assert made.finalists("lora", "lda")[0].startswith("lora | lr 0.004")
    assert made.chosen("lora", "lda") == made.finalists("lora", "lda")[1]


def test_seeds_that_diverged_are_counted_out(study):
    made = study(plain)
    found = made.line
    made.line = lambda change, seed: found(change, seed) | ({"heads": {}} if seed in (3, 4) else {})
    row = next(line for line in made.table().splitlines() if line.startswith("| lora |"))
    assert row.count("(3 of 5)") == 6
    assert next(line for line in made.details().splitlines() if line.startswith("| lora, lda |")).endswith("| 3 |")


def test_nothing_is_chosen_while_trials_are_missing(study):
    from study_tables import best_head, hypotheses, is_tried

    made = study(lambda row, seed, head: 50.0 + ("lr 0.064" in row) + 0.5 * ("lr 0.016" in row))
    assert "lr 0.064" in made.chosen("janus", "lda") and is_tried(made)
    made._grown.clear()
    found = made.line
    made.line = lambda change, seed: None if change.get("energy_start") == 0.5 else found(change, seed)
    assert len(made.candidates("janus")) > 9 and made.chosen("janus", "lda") is None and not is_tried(made)
    assert best_head(made, "janus") is None
    with pytest.raises(SystemExit, match="trials are missing"):
        hypotheses(made, "janus")


def test_a_best_head_is_none_while_one_head_is_undecided(study):
    from study_tables import best_head

    made = study(plain)
    chosen = made.chosen
    assert best_head(made, "janus") == "lda"
    made.chosen = lambda method, head: None if head == "ncm" else chosen(method, head)
    assert best_head(made, "janus") is None


def test_cells_of_missing_seeds_say_so_and_are_not_in_bold(study):
    from study_tables import hypotheses, paired

    made = study(plain)
    found = made.line
    made.line = lambda change, seed: None if seed == 4 and change.get("method") == "lora" else found(change, seed)
    row = next(line for line in made.table().splitlines() if line.startswith("| lora |"))
    assert row.count("(4 of 5)") == 6
    row = next(line for line in paired(made, "janus").splitlines() if line.startswith("| lora |"))
    assert row.count("(4 of 5)") == 6 and "**" not in row
    assert "it has 51.0) (4 of 5)" in hypotheses(made, "janus")
    made.line = lambda change, seed: (
        found(change, seed) | ({"heads": {}} if seed == 4 and "lora" in change.values() else {})
    )
    row = next(line for line in paired(made, "janus").splitlines() if line.startswith("| lora |"))
    assert row.count("(4 of 5)") == 6 and "**" not in row


@pytest.mark.parametrize(("message", "is_kept"), [("task 2: the loss is not finite", True), ("--compile fails", False)])
def test_numbers_that_end_at_infinity_are_a_result_and_other_errors_are_none(study, monkeypatch, message, is_kept):
    study(plain)
    from study_cells import run_cell
    from study_rows import candidate

    import janus_ext.train
    from janus_ext.errors import TrainingError

    def fails(config):
        raise TrainingError(message)

    monkeypatch.setattr(janus_ext.train, "train", fails)
    cell = (*candidate("emoji", "lora", (3,)), 100, torch.get_num_threads(), {})
    if not is_kept:
        with pytest.raises(TrainingError):
            run_cell((cell[0], cell[1], *cell[2:]))
        return
    line = run_cell(cell)
    assert line["heads"] == {} and line["diverged"] == message and line["seed"] == 100


def test_runs_of_their_own_can_run_and_their_head_has_its_own_name(study):
    made = study(plain)
    from study_cells import cell_config, named
    from study_rows import OWN_RUNS

    for head, changes in OWN_RUNS.items():
        for method in changes:
            assert cell_config(made.pick(method, head)[1], 0)["head"] == head.split()[0]
    heads = {"linear": {"acc": 1.0}, "lda": {"acc": 2.0}}
    wide = {"config": {"head": "lda", "head_width": 2000}, "heads": heads}
    assert named(wide)["heads"] == heads | {"lda 2000": {"acc": 2.0}}
    assert named({"config": {"head_width": None}, "heads": heads})["heads"] == heads
    assert named(wide | {"heads": {}})["heads"] == {} and named(None) is None


def test_the_ablation_has_rows_that_can_run(study):
    """At both settings of janus, which are one here; the program knows every key but the benchmark's own."""
    from study_cells import cell_config

    rows = study(plain).ablation()
    assert len(rows) == 14 and all(row.startswith("janus | lr 0.004") for row in rows)
    for change in rows.values():
        assert "preconditioned" not in cell_config(change, 0)
    text = study(plain).ablation_table().splitlines()[2:]
    learn_less = ["first task only | lr 0.004", "frozen | "]  # as they were chosen for the same heads
    assert [" | ".join(line.split(" | ")[:2]) for line in text[14:]] == [f"| {row}" for row in learn_less], text


def test_what_a_part_adds_is_its_row_less_the_one_without_it(study):
    from study_rows import ABLATION
    from study_tables import PARTS, parts

    made = study(plain)
    made.line = lambda change, seed: {
        "seed": seed,
        "heads": {head: {"acc": 40.0 + seed + 3.0 * (change.get("margin_weight") == 0.0)} for head in SHARES},
    }
    text = parts(made).splitlines()[2:]
    assert len(text) == len(PARTS)
    without = {name for name, change in ABLATION.items() if change.get("margin_weight") == 0.0}
    for line, (with_it, without_it) in zip(text, PARTS.values(), strict=True):
        adds = 3 * ((with_it in without) - (without_it in without))
        assert line.count(f"{adds:+.2f} ± 0.00") == len(SHARES), line


def test_preconditioning_is_its_formula_and_stays_within(study):
    study(plain)
    from preconditioned import preconditioned

    V = orthonormal(12, 4)
    A, B = ops.project(torch.randn(3, 12, dtype=torch.float64), V), torch.randn(8, 3, dtype=torch.float64)
    gA, gB = torch.randn_like(A), torch.randn_like(B)
    dA, dB, kept = gA.clone(), gB.clone(), ops.rectify_
    with preconditioned():
        ops.rectify_([A], [B], [dA], [dB], [V], [1.0], Rectification("exact", damping=1e-9))
    safe = gA - gA @ V @ V.mT
    assert_close(dA, torch.linalg.solve(B.mT @ B, safe) * (B.mT @ B).trace() / 3, torch.float64, 1e6)
    assert_close(dB, torch.linalg.solve(A @ A.mT, gB.mT).mT * (A @ A.mT).trace() / 3, torch.float64, 1e6)
    with preconditioned(False):
        assert ops.rectify_ is kept
    assert ops.rectify_ is kept


def test_intervals_are_students(study):
    from study_tables import interval, shown

    study(plain)
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776445 * 2.5**0.5 / 5**0.5, rel=1e-6)
    assert shown([1.0, 2.0, 3.0, 4.0, 5.0]) == "**+3.00 ± 1.96**" and shown([-1.0, 1.0]).startswith("+0.00 ± ")
    assert shown([2.0]) == "+2.00" and shown([]) == "–"


def test_paired_differences_are_seed_by_seed(study):
    from study_tables import paired

    text = paired(study(plain), "janus")
    assert "| frozen | **-3.00 ± 0.00** |" in text and "| joint | **+20.00 ± 0.00** |" in text
    assert "| lora | **+1.00 ± 0.98** |" in text, "0, 0.5, ... 2"


def test_hypotheses_say_what_came_out(study):
    from study_tables import hypotheses

    text = hypotheses(study(plain), "janus")
    assert "`janus` with `lda`" in text
    assert "closes 47% (42.0 to 61.0; it has 51.0)" in text  # 9 of 19
    assert "frozen **+3.00 ± 0.00**" in text and "inflora +0.00" in text
    for head, learned in {"lda": 51.0 + 9, "linear": 41.0 + 9}.items():
        said = f"With `{head}`, on the held-out images of seed 100, InfLoRA's choice learns {learned} and forgets 9.0"
        assert f"{said}; with at least its plasticity janus forgets 9.0" in text
    assert "learns +0.00 ± 0.00 more than InfLoRA's, and its BWT is +0.00 ± 0.00 above" in text
    text = hypotheses(study(lambda row, seed, head: plain(row, seed, head) - 2 * row.startswith("inflora")), "janus")
    assert "learns **+2.00 ± 0.00** more than InfLoRA's, and its BWT is +0.00 ± 0.00 above" in text
    made = study(plain)
    whole = made.line

    def forgets_more(change: dict[str, Any], seed: int) -> dict[str, Any]:
        line = whole(change, seed)
        less = 3.0 if line["row"].startswith("inflora") else 0.0
        return line | {"heads": {head: of | {"bwt": of["bwt"] - less} for head, of in line["heads"].items()}}

    made.line = forgets_more
    assert "its BWT is **+3.00 ± 0.00** above" in hypotheses(made, "janus")


def test_the_frontier_keeps_what_nothing_beats(study):
    from study_tables import frontier, learning, least_forgetting

    study(plain)
    points = [(50.0, 5.0), (55.0, 4.0), (60.0, 9.0), (58.0, 9.5)]
    assert frontier(points) == [(55.0, 4.0), (60.0, 9.0)]
    assert least_forgetting(points, 56.0) == 9.0 and least_forgetting(points, 61.0) is None
    assert learning([(7.0, 1.0), (46.0, 3.0), *points], 50.0) == [(46.0, 3.0), *points]


def test_curves_are_drawn(study, tmp_path):
    from study_tables import draw

    draw([study(plain)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_fonts_are_held_out_whole(study, tmp_path):
    from guard import HELD_OUT_FONTS, hold_out_fonts

    names = {f"font-{n}.png" for n in range(10)}
    for letter in ("a", "b"):
        (tmp_path / "glyphs/train" / letter).mkdir(parents=True)
        for name in names:
            (tmp_path / "glyphs/train" / letter / name).write_text(letter + name)

    splits = {}
    for seed in (1, 2):
        folder = hold_out_fonts(tmp_path / "glyphs", seed, tmp_path / str(seed))
        parts = {(part, c): {f.name for f in (folder / part / c).iterdir()} for part in ("train", "test") for c in "ab"}
        assert parts["test", "a"] == parts["test", "b"] and len(parts["test", "a"]) == HELD_OUT_FONTS
        assert parts["train", "a"] == parts["train", "b"] == names - parts["test", "a"]
        assert all(file.read_text() == file.parent.name + file.name for file in folder.glob("*/*/*.png"))
        splits[seed] = parts["test", "a"]
    assert splits[1] != splits[2]


def test_what_methods_take_on_the_embedded_images_is_what_held_out_images_chose(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from study import Study
    from study_tables import RIVALS

    from janus_ext.config import presets

    study = Study("emoji")
    stays = {("lora-drs", "lda", "margin_weight")}  # 0.2, as with linear heads: "lda" chose 0.8, "ncm" 0
    for method, head in [("janus", "linear"), *((rival, head) for rival in RIVALS for head in ("linear", "lda"))]:
        row = study.chosen(method, head)
        assert row is not None
        wanted = dict(words.split(" ") for words in row.split(" | ")[1].split(", "))
        values = presets.values("default", "emoji", method, {}, head=head)
        for name, value in wanted.items():
            if (method, head, name) not in stays:
                assert values[name] == float(value), (method, head, name)
