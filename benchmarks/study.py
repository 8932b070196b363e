"""Methods times heads on three data sets: every method is tuned on held-out training images, for its heads alike.

    python benchmarks/study.py run emoji                          # trials, choice, reported seeds; goes on with them
    python benchmarks/study.py run glyphs --data-dir DATA/glyphs  # built by benchmarks/glyphs/build.py
    python benchmarks/study.py run fashion-mnist --data-dir DATA/fashion-mnist
    python benchmarks/study.py table emoji                        # methods x heads on the reported seeds, as Markdown
    python benchmarks/study.py details emoji                      # what was chosen for each, and more of what came out
    python benchmarks/study.py paired emoji                       # how far each is behind janus, with intervals
    python benchmarks/study.py hypotheses emoji                   # what was expected, and what came out
    python benchmarks/study.py ablation emoji                     # Janus-LoRA with and without each of its parts
    python benchmarks/study.py parts emoji                        # what each part adds, with intervals
    python benchmarks/study.py trials emoji                       # every candidate on the held-out images
    python benchmarks/study.py finished emoji                     # all heads of what was chosen for any, reported seeds
    python benchmarks/study.py curves emoji                       # forgetting over plasticity, of all data sets
    python benchmarks/study.py run emoji --fresh                  # the choices once more, on other seeds
    python benchmarks/study.py paired emoji --fresh               # what came out on these

A run trains once and measures all heads, which training does not know of. Every method begins with nine candidates.
All are run on seed 100 with `--validation`, so that the test images are not seen. Where one of the best two of a head
(or what equals the second) lies at the edge of what was tried, the settings beyond are tried as well, until none does,
or their ladder ends. These are run on seed 101, too, and the best mean ACC goes to seeds 0 to 4, which are trained on
all training images and tested on the test images; of equal ones that which was better on seed 100. Two heads are not
measured in every run, but in runs of their own, of three methods, Janus-LoRA as shipped, joint training, "first task
only" and frozen: "aligned", with trials of their own like the others, and "lda 2000" (random features), at what was
chosen for "lda". "As shipped" has the defaults' rate, energies, guard and epochs: nothing is chosen; of the frozen
backbone it has the epochs, for linear and aligned heads. The class order is drawn from the seed. Fresh seeds run what
is chosen, without trials of their own: the rule of choice had changed when seeds 0 to 4 were known (on fashion-mnist
that of aligned heads alone). Every finished run is a line in benchmarks/results/study-<data>.jsonl; one whose numbers
end at infinity has a line without heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from study_cells import Cell, identity, is_done, named, read_lines, run_cells
from study_rows import (
    ALL_HEADS,
    DATA,
    FRESH_SEEDS,
    HEADS,
    METHODS,
    OWN_RUNS,
    SEEDS,
    SELECTION_SEEDS,
    VALIDATION,
    Position,
    ablation,
    candidate,
    chosen_for,
    located,
    titled,
)
from study_tables import best_head, counted, draw, hypotheses, is_tried, paired, parts, spread

from janus_ext.terminal import until_closed

RESULTS = Path(__file__).resolve().parent / "results"
Lines = list[dict[str, Any]]
Key = TypeVar("Key")


class Study:
    """The runs of one data set: those that are there, and those that are still to be made."""

    def __init__(self, data: str, folder: Path | None = None, seeds: tuple[int, ...] = SEEDS) -> None:
        self.data = data
        self.seeds = seeds
        self.path = RESULTS / f"study-{data}.jsonl"
        self.where = located(data, folder)
        self.finished: Lines = read_lines(self.path)
        self._found: dict[tuple[str, int], dict[str, Any] | None] = {}
        self._grown: dict[tuple[str, tuple[str, ...]], dict[str, dict[str, Any]]] = {}

    def candidates(self, method: str, head: str = "linear") -> dict[str, dict[str, Any]]:
        """The configurations tried, by the name of their setting: the grid, grown where the best are at its edge."""
        deciding = HEADS if head in HEADS else (head,)  # what every run measures is tried at once
        if (method, deciding) not in self._grown:
            places = METHODS[method].start()
            while more := self._beyond(method, deciding, places):
                places += more
            known = dict(candidate(self.data, method, place, head) for place in sorted(places))
            self._grown[method, deciding] = known
        return self._grown[method, deciding]

    def _beyond(self, method: str, deciding: tuple[str, ...], places: list[Position]) -> list[Position]:
        """What lies beside the best of a head and was not tried; nothing while some of `places` are still to be run."""
        known = {place: candidate(self.data, method, place, deciding[0])[1] for place in sorted(places)}
        first = SELECTION_SEEDS[:1]
        if any(self.line(self.trial(change), *first) is None for change in known.values()):
            return []
        best = [place for head in deciding for place in self._best(known, head)]
        beside = [place for at in best for place in METHODS[method].beside(at) if place not in places]
        return list(dict.fromkeys(beside))

    def tuned(self, methods: Iterable[str]) -> list[tuple[str, str]]:
        """The methods and heads that have trials."""
        return [(m, head) for m in methods for head in ALL_HEADS if chosen_for(m, head) == head]

    def tried(self, methods: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Their candidates, by the name of their row."""
        return {titled(row, head): c for m, head in self.tuned(methods) for row, c in self.candidates(m, head).items()}

    def trial(self, change: dict[str, Any]) -> dict[str, Any]:
        """A candidate as it is tried: on held-out training images."""
        return change | {"validation": VALIDATION[self.data]}

    def line(self, change: dict[str, Any], seed: int) -> dict[str, Any] | None:
        """The finished run, if it is there; looked for once."""
        key = json.dumps(change, sort_keys=True), seed
        if key not in self._found:
            wanted = identity(change, seed)
            self._found[key] = named(next((x for x in self.finished if is_done(x, wanted)), None))
        return self._found[key]

    def accuracy(self, change: dict[str, Any], head: str, seeds: tuple[int, ...]) -> float | None:
        """Mean ACC of a candidate's trials with a head; None where one is missing, or the head was not measured."""
        found = [self.line(self.trial(change), seed) for seed in seeds]
        values = [x["heads"].get(head, {}).get("acc") for x in found if x is not None]
        return statistics.fmean(values) if len(values) == len(seeds) and None not in values else None

    def _scores(self, known: dict[Key, dict[str, Any]], head: str, seeds: tuple[int, ...]) -> dict[Key, float]:
        """Mean ACC of the trials of those that were tried on all of `seeds`, best first, equal ones in their order.

        Rounded: of equal ones the last bit of a mean must not decide.
        """
        found = {key: self.accuracy(change, head, seeds) for key, change in known.items()}
        scores = {key: round(value, 6) for key, value in found.items() if value is not None}
        return dict(sorted(scores.items(), key=lambda item: -item[1]))

    def _best(self, known: dict[Key, dict[str, Any]], head: str) -> list[Key]:
        """The best two of the first selection seed, and those that equal the second."""
        scores = self._scores(known, head, SELECTION_SEEDS[:1])
        least = min(list(scores.values())[:2], default=0.0)
        return [key for key, score in scores.items() if score >= least]

    def finalists(self, method: str, head: str) -> list[str]:
        """Those that the second selection seed decides between; none while trials of the first are missing."""
        known = self.candidates(method, head)
        is_whole = all(self.line(self.trial(change), SELECTION_SEEDS[0]) is not None for change in known.values())
        return self._best(known, head) if is_whole else []

    def chosen(self, method: str, head: str) -> str | None:
        """The candidate that goes to the reported seeds; None while trials are missing."""
        known, finalists = self.candidates(method, head), self.finalists(method, head)
        if any(self.line(self.trial(known[row]), seed) is None for row in finalists for seed in SELECTION_SEEDS):
            return None
        return next(iter(self._scores({row: known[row] for row in finalists}, head, SELECTION_SEEDS)), None)

    def run(self, methods: list[str], jobs: int) -> None:
        """Runs what is missing: trials, then what they chose, then the ablation; on fresh seeds what is chosen."""
        is_first = self.seeds == SEEDS
        if is_first:
            self._run_trials(methods, jobs)
        wanted = [(m, head) for m in methods for head in ALL_HEADS]
        picked = {pair: self.pick(*pair) for pair in wanted if chosen_for(*pair)}
        if lacking := [", ".join(pair) for pair, cell in picked.items() if cell is None]:
            raise SystemExit(f"nothing is chosen for {'; '.join(lacking)}: `run {self.data}` goes on with the trials")
        for rows in (dict(picked.values()), self.ablation() if is_first and "janus" in methods else {}):
            self._run([(row, c, seed) for seed in self.seeds for row, c in rows.items()], jobs)

    def _run_trials(self, methods: list[str], jobs: int) -> None:
        first, second = SELECTION_SEEDS
        known: dict[str, dict[str, Any]] = {}
        while known != (known := self.tried(methods)):
            self._run([(row, self.trial(c), first) for row, c in known.items()], jobs)
        best = [titled(row, head) for m, head in self.tuned(methods) for row in self.finalists(m, head)]
        self._run([(row, self.trial(known[row]), second) for row in dict.fromkeys(best)], jobs)

    def _run(self, cells: list[Cell], jobs: int) -> None:
        run_cells(cells, jobs, 1, self.path, self.where)
        self.finished = read_lines(self.path)
        self._found.clear()
        self._grown.clear()

    # what came out ----------------------------------------------------------------------------------------------------
    def pick(self, method: str, head: str) -> tuple[str, dict[str, Any]] | None:
        """What the reported seeds run for a method with a head; None while trials are missing."""
        trials_of = chosen_for(method, head)
        row = self.chosen(method, trials_of) if trials_of else None
        if row is None:
            return None
        change = self.candidates(method, trials_of)[row]
        return titled(row, head), change | OWN_RUNS.get(head, {}).get(method, {})

    def reported(self, method: str, head: str) -> Lines:
        """The finished runs of what was chosen, on the reported seeds."""
        picked = self.pick(method, head)
        found = [self.line(picked[1], seed) for seed in self.seeds] if picked else []
        return [x for x in found if x is not None]

    def heads(self) -> list[str]:
        """Those that were measured on a reported seed."""
        return [head for head in ALL_HEADS if any(self.reported(method, head) for method in METHODS)]

    def ablation(self) -> dict[str, dict[str, Any]]:
        """The ablation's rows at the settings that janus has with linear heads, and with its best closed-form head."""
        chosen = self._picked_for_ablation("janus")
        return {f"{row} | {name}": c for row, change in chosen.items() for name, c in ablation(change).items()}

    def _picked_for_ablation(self, method: str) -> dict[str, dict[str, Any]]:
        heads = ["linear", best_head(self, "janus")]
        return dict(cell for head in heads if head and (cell := self.pick(method, head)))

    def ablation_table(self) -> str:
        """ACC by head, BWT and plasticity with linear heads, mean violation, of the rows whose seeds are all run.

        Last come those who learn little or nothing, as they were chosen for the same heads.
        """
        text = [f"| row | setting | {' | '.join(HEADS)} | BWT, linear | plasticity, linear | violation | seeds |"]
        text.append("|" + "---|" * 10)
        last = {m: self._picked_for_ablation(m) for m in ("first task only", "frozen")}
        rows = self.ablation() | {f"{row} | {m}": change for m in last for row, change in last[m].items()}
        for row, change in rows.items():
            _, *setting, name = row.split(" | ")
            lines = [self.line(change, seed) for seed in self.seeds]
            if None in lines:
                continue
            lines = [x for x in lines if x["heads"]]  # numbers that ended at infinity have none
            cells = [spread([x["heads"][head]["acc"] for x in lines]) for head in HEADS]
            cells += [spread([x["heads"]["linear"][m] for x in lines]) for m in ("bwt", "plasticity")]
            violations = [x["violation"] for x in lines if x["violation"] is not None]
            cells.append(f"{statistics.fmean(violations):.1e}" if violations else "–")
            text.append(f"| {name} | {', '.join(setting)} | {' | '.join(cells)} | {len(lines)} |")
        return "\n".join(text)

    def table(self) -> str:
        """ACC of methods times heads, mean and deviation."""
        heads = self.heads()
        text = [f"| ACC | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
        known = [m for m in METHODS if any(self.reported(m, head) for head in heads)]
        text += [f"| {m} | {' | '.join(self._cell(m, head, 'acc') for head in heads)} |" for m in known]
        return "\n".join(text)

    def details(self) -> str:
        """What was chosen for every method and head, and all metrics that a head has."""
        metrics = ("acc", "maa", "bwt", "plasticity")
        text = ["| method, head | chosen | ACC | MAA | BWT | plasticity | seeds |", "|" + "---|" * 7]
        for method in METHODS:
            for head in ALL_HEADS:
                lines = self.reported(method, head)
                if lines:
                    setting = self.pick(method, head)[0].split(" | ")[1]
                    cells = [self._cell(method, head, metric) for metric in metrics]
                    count = sum(head in line["heads"] for line in lines)
                    text.append(f"| {method}, {head} | {setting} | {' | '.join(cells)} | {count} |")
        return "\n".join(text)

    def trials(self) -> str:
        """ACC of every candidate and head on the held-out images of the selection seeds."""
        heads = list(dict.fromkeys((*HEADS, *(head for _, head in self.tuned(METHODS)))))
        text = [f"| candidate | seed | {' | '.join(heads)} | movement |", "|" + "---|" * (len(heads) + 3)]
        for row, change in self.tried(METHODS).items():
            for seed in SELECTION_SEEDS:
                found = self.line(self.trial(change), seed)
                if found:
                    shares = [f"{found['heads'][h]['acc']:.2f}" if h in found["heads"] else "–" for h in heads]
                    moved = "–" if found.get("movement") is None else f"{found['movement']:.3f}"
                    text.append(f"| {row.replace(' | ', ', ')} | {seed} | {' | '.join(shares)} | {moved} |")
        return "\n".join(text)

    def finished_on_reported(self) -> str:
        """ACC of all heads, of every candidate whose reported seeds are all run: each was chosen for one of them."""
        text = [f"| candidate | {' | '.join(HEADS)} |", "|" + "---|" * (len(HEADS) + 1)]
        for method in METHODS:
            for row, change in self.candidates(method).items():
                lines = [self.line(change, seed) for seed in self.seeds]
                if None not in lines:
                    values = [[x["heads"][h]["acc"] for x in lines if h in x["heads"]] for h in HEADS]
                    cells = [counted(spread(found), len(found), len(self.seeds)) for found in values]
                    text.append(f"| {row.replace(' | ', ', ')} | {' | '.join(cells)} |")
        return "\n".join(text)

    def _cell(self, method: str, head: str, metric: str) -> str:
        lines = self.reported(method, head)
        values = [x["heads"][head][metric] for x in lines if head in x["heads"]]
        return counted(spread(values), len(values), len(self.seeds))


def curves() -> None:
    """Draws the data sets whose trials are all run, and names the others."""
    studies = [Study(data, Path()) for data in DATA]
    tried = [study for study in studies if is_tried(study)]
    if tried:
        draw(tried, RESULTS / "study-curves.png")
    print(
        f"drawn: {', '.join(s.data for s in tried) or 'none'}; the trials of a data set that is missing are not all run"
    )


@until_closed
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = ["run", "table", "details", "paired", "hypotheses", "ablation", "parts", "trials"]
    actions += ["finished", "curves"]
    parser.add_argument("action", choices=actions)
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("--data-dir", type=Path, help="where the images of glyphs or fashion-mnist lie")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--fresh", action="store_true", help="seeds behind 4, with what was chosen; no trials")
    parser.add_argument("--against", choices=list(METHODS), default="janus", help="of paired and hypotheses")
    arguments = parser.parse_args()
    if arguments.fresh and arguments.action in ("ablation", "parts", "trials", "curves"):
        parser.error(f"--fresh: {arguments.action} has no fresh seeds; run, table, details, paired and others have")
    seeds = FRESH_SEEDS[arguments.data] if arguments.fresh else SEEDS
    study = Study(arguments.data, arguments.data_dir if arguments.action == "run" else Path(), seeds)
    if arguments.action == "run":
        study.run(arguments.methods, arguments.jobs)
    elif arguments.action == "curves":
        curves()
    elif arguments.action in ("paired", "hypotheses"):
        print({"paired": paired, "hypotheses": hypotheses}[arguments.action](study, arguments.against))
    else:
        shown = {"table": study.table, "details": study.details, "ablation": study.ablation_table}
        shown |= {"parts": lambda: parts(study), "trials": study.trials}
        shown["finished"] = study.finished_on_reported
        print(shown[arguments.action]())


if __name__ == "__main__":
    main()
