"""benchmarks/study.py: what is said of finished runs, from runs that never were."""

from typing import Any

import pytest
import torch
from conftest import assert_close, orthonormal
from studies import SHARES, plain

from janus_ext import ops
from janus_ext.rectification import Rectification


def test_what_went_to_the_reported_seeds_is_shown_with_every_head(study):
    made = study(plain)
    shares = "42.00 ± 0.79 | 47.00 ± 0.79 | 52.00 ± 0.79 | 50.00 ± 0.79"  # 1 for its rate, 0 to 2 by seed
    assert f"| lora, lr 0.004 | {shares} |" in made.finished_on_reported().splitlines()
    whole = made.line
    made.line = lambda change, seed: None if seed == 3 and change.get("lr") == 0.004 else whole(change, seed)
    assert "lr 0.004" not in made.finished_on_reported() and "lora, lr 0.008" in made.finished_on_reported()


def test_tables_are_of_the_seeds_that_are_asked_for(study, capsys, monkeypatch):
    """Plain LoRA has half a point more a seed, so seeds 5 to 14 have 3.75 points more in the mean than 0 to 4."""
    import study as module
    from study_tables import hypotheses, paired

    made = study(plain)
    known, ahead = made.finished_on_reported(), paired(made, "janus")
    made.seeds = module.FRESH_SEEDS["emoji"]
    assert "| lora, lr 0.004 | 42.00 ± 0.79 |" in known
    assert "| lora, lr 0.004 | 45.75 ± 1.51 |" in made.finished_on_reported()
    assert "| lora | **+1.00 ± 0.98** |" in ahead and "| lora | **+4.75 ± 1.08** † |" in paired(made, "janus")
    assert "On seeds 5 to 14 the choice" in hypotheses(made, "janus")
    monkeypatch.setattr("sys.argv", ["study.py", "parts", "emoji", "--fresh"])
    with pytest.raises(SystemExit):
        module.main()
    assert "--fresh: parts has no fresh seeds" in capsys.readouterr().err
    monkeypatch.setattr(module, "Study", lambda data, folder, seeds: pytest.fail(f"seeds {seeds}"))
    monkeypatch.setattr("sys.argv", ["study.py", "table", "emoji", "--fresh"])
    with pytest.raises(pytest.fail.Exception, match=r"seeds \(5, 6, 7, 8, 9, 10, 11, 12, 13, 14\)"):
        module.main()


def test_seeds_that_diverged_are_counted_out(study):
    made = study(plain)
    found = made.line
    made.line = lambda change, seed: found(change, seed) | ({"heads": {}} if seed in (3, 4) else {})
    row = next(line for line in made.table().splitlines() if line.startswith("| lora |"))
    assert row.count("(3 of 5)") == 6
    assert next(line for line in made.details().splitlines() if line.startswith("| lora, lda |")).endswith("| 3 |")


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


def test_a_line_tells_processors_of_one_name_apart(study, monkeypatch):
    study(plain)
    from study_cells import METRICS, run_cell
    from study_rows import candidate

    import janus_ext.train

    results = dict.fromkeys(METRICS, 1.0) | {"heads": {}, "split_sha256": "", "versions": {}}
    monkeypatch.setattr(janus_ext.train, "train", lambda config: [results])
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    line = run_cell((*candidate("emoji", "lora", (3,)), 100, torch.get_num_threads(), {}))
    assert line["processor"] and line["instructions"] == "AVX2"


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


def test_daggers_are_holms(study):
    """Every part of the step-down, against p-values of the paired test worked out by hand (t of 4 degrees)."""
    from scipy.stats import t as student
    from study_tables import paired, standing

    study(plain)
    far, near, hardly = ([mean + 0.1 * k for k in (-2, -1, 0, 1, 2)] for mean in (1.0, 0.22, 0.19))
    chance = {mean: 2 * student.sf(mean / (0.1 * 2.5**0.5 / 5**0.5), 4) for mean in (1.0, 0.22, 0.19)}
    assert chance[1.0] < 0.05 / 3 and 0.05 / 2 < chance[0.22] < 0.05 < chance[0.19]
    assert standing({"a": near}) == {"a"} and standing({"a": hardly}) == set()
    assert standing({"a": near, "b": far}) == {"a", "b"}, "0.05 for the last of two"
    assert standing({"a": near, "b": hardly, "c": far}) == {"c"}, "0.025 for the second of three"
    assert standing({"a": near, "b": near}) == set(), "from the least p-value on"
    assert standing({"a": [3.0], "b": far}) == {"b"}
    assert standing({"a": [0.0] * 5, "b": [-x for x in far]}) == {"b"} and standing({}) == set()
    made = study(plain)
    assert "| lora | **+1.00 ± 0.98** |" in paired(made, "janus"), "one of five, and 0.047 is no 0.01"
    made = study(lambda row, seed, head: plain(row, seed, head) + 5 * row.startswith(("lora |", "frozen |")))
    text = paired(made, "janus")
    assert "| lora | **+6.00 ± 0.98** † |" in text and "| frozen | **+2.00 ± 0.00** |" in text
    whole = made.line
    made.line = lambda change, seed: None if seed == 4 and change.get("method") == "lora" else whole(change, seed)
    assert "†" not in paired(made, "janus"), "not all seeds"


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


def test_of_what_learns_enough_the_least_forgotten_counts(study):
    from study_tables import NOWHERE, broken, learning, least_forgetting

    study(plain)
    points = [(50.0, 5.0), (55.0, 4.0), (60.0, 9.0), (58.0, 9.5)]
    assert least_forgetting(points, 56.0) == 9.0 and least_forgetting(points, 61.0) is None
    assert learning([(7.0, 1.0), (46.0, 3.0), *points], 50.0) == [(46.0, 3.0), *points]
    assert broken([points[0], (7.0, 1.0), points[1]], points) == [points[0], NOWHERE, points[1]]


@pytest.mark.parametrize("method", ["janus", "lora", "lora-drs"])
def test_a_curve_goes_along_the_rate_at_what_else_is_chosen(study, method):
    from study_tables import along_rate

    made = study(plain)
    chosen, line = made.candidates(method)[made.chosen(method, "lda")], along_rate(made, method, "lda")
    rates = [change["lr"] for change in line]
    assert chosen in line and rates == sorted(set(rates)) and len(rates) >= 3
    assert all(change == chosen | {"lr": change["lr"]} for change in line)
    assert len(line) < len(made.candidates(method)) or method == "lora"  # which has no other ladder


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
