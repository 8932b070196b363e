"""benchmarks/study.py: what is tried, chosen and run, of runs that never were."""

from pathlib import Path
from typing import Any

import pytest
from studies import SHARES, plain


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


def test_a_finalist_that_diverges_later_leaves_the_other(study):
    made = study(plain)
    found = made.line
    made.line = lambda change, seed: (
        found(change, seed) | ({"heads": {}} if change.get("lr") == 0.004 and seed == 101 else {})
    )
    assert made.finalists("lora", "lda")[0].startswith("lora | lr 0.004")
    assert made.chosen("lora", "lda") == made.finalists("lora", "lda")[1]


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


@pytest.mark.parametrize("head", ["aligned", "lda 2000"])
def test_runs_of_their_own_are_tuned_or_follow_another_heads_choice(study, head):
    """Without the guard. Heads trained on samples have a choice of their own; LDA's is that of wider features, too."""
    rates = {"linear": "0.004", "lda": "0.001", "aligned": "0.00025"}
    settings_of = "lda" if head == "lda 2000" else "aligned"
    made = study(lambda row, seed, head: 50.0 + 9 * (head in rates and f"lr {rates[head]}," in row))
    row, change = made.pick("inflora", head)
    first, setting, last = row.split(" | ")
    assert (first, last) == ("inflora", head) and setting.startswith(f"lr {rates[settings_of]},")
    assert change["lr"] == float(rates[settings_of]) and change["head"] == head.split()[0]
    assert change["drift_budget"] == 1e9 and change.get("head_width") == {"aligned": None, "lda 2000": 2000}[head]
    assert made.pick("frozen", head)[0] == f"frozen |  | {head}" and made.pick("bilora", head) is None
    assert (("inflora", head) in made.tuned(["inflora"])) == (settings_of == head)
    assert not {("frozen", head), ("bilora", head)} & set(made.tuned(["frozen", "bilora"])), "nothing is to be tuned"


def test_heads_that_are_tuned_on_their_own_have_trials_of_their_own(study):
    made = study(plain)
    known = {row: change for row, change in made.tried(["lora"]).items() if row.endswith(" | aligned")}
    assert len(known) >= 9 and all(change["head"] == "aligned" for change in known.values())
    assert any(line.startswith("| lora, lr 0.004, aligned | 100 |") for line in made.trials().splitlines())
    found = made.line
    made._grown.clear()
    made.line = lambda change, seed: None if change["head"] == "aligned" else found(change, seed)
    assert made.chosen("lora", "linear") and made.chosen("lora", "aligned") is None is made.pick("lora", "aligned")


def test_a_grid_of_trials_of_their_own_grows_by_that_head_alone(study):
    def rises(row: str, seed: int, head: str) -> float:
        """Aligned heads are best at the highest rate, all others at the lowest."""
        rate = float(row.split(" | ")[1].split(" ")[1]) if "lr" in row else 0.0
        return 50 + rate if head == "aligned" else 50 - rate

    made = study(rises)
    own, others = (set(made.candidates("lora", head)) for head in ("aligned", "linear"))
    assert "lora | lr 0.064" in own - others and "lora | lr 6.25e-05" in others - own


@pytest.fixture
def running(study, monkeypatch):
    """A study of which nothing is run: (it, the (configuration, seed) that it has run so far)."""
    import study as module

    made, ran = study(plain), []
    whole = made.line

    def key(change: dict[str, Any], seed: int) -> tuple[str, int]:
        return repr(sorted(change.items())), seed

    def run_cells(cells, jobs, threads, path, where):
        wanted = dict.fromkeys(key(change, seed) for _, change, seed in cells)
        ran.extend(cell for cell in wanted if cell not in ran)

    made.line = lambda change, seed: whole(change, seed) if key(change, seed) in ran else None
    monkeypatch.setattr(module, "run_cells", run_cells)
    monkeypatch.setattr(module, "read_lines", lambda path: [])
    return made, ran


def test_a_run_goes_from_the_trials_to_the_seeds_of_what_they_chose(running):
    import study as module

    made, ran = running
    made.run(["lora", "frozen"], 1)
    assert all(made.pick("lora", head) and len(made.reported("lora", head)) == 5 for head in module.ALL_HEADS)
    tried = [(text, seed) for text, seed in ran if "validation" in text]
    own = [seed for text, seed in tried if "'aligned'" in text]
    assert own.count(100) == len(made.candidates("lora", "aligned"))
    assert own.count(101) == len(made.finalists("lora", "aligned")) >= 2
    assert sorted(seed for text, seed in tried if "'learn', 'none'" in text) == [100, 101], "one for all heads"


def test_fresh_seeds_run_what_is_chosen_and_nothing_else(running):
    import study as module

    made, ran = running
    made.seeds = module.FRESH_SEEDS["glyphs"]
    with pytest.raises(SystemExit, match="nothing is chosen for janus, linear; janus, ncm"):
        made.run(["janus", "inflora"], 1)
    assert not ran, "no trials on account of fresh seeds"
    made.seeds = module.SEEDS
    made.run(["janus", "inflora"], 1)
    ran_before, made.seeds = len(ran), module.FRESH_SEEDS["glyphs"]
    assert not made.heads()
    made.run(["janus", "inflora"], 1)
    picked = {made.pick(m, head)[0] for m in ("janus", "inflora") for head in module.ALL_HEADS}
    again = ran[ran_before:]
    assert len(again) == 5 * len(picked) and {seed for _, seed in again} == {5, 6, 7, 8, 9}
    assert made.heads() == list(module.ALL_HEADS), "heads' own runs as well, no ablation"
    assert [x["seed"] for x in made.reported("janus", "lda")] == [5, 6, 7, 8, 9]


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
