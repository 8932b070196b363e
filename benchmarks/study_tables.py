"""What a study's finished runs say: means, paired intervals, the hypotheses, and stability against plasticity."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import t as student
from scipy.stats import ttest_1samp
from study_rows import HEADS, METHODS, SELECTION_SEEDS

if TYPE_CHECKING:
    from study import Study

OTHERS = ("janus as shipped", "joint", "first task only", "frozen", "frozen as shipped")
LEARNERS = [m for m in METHODS if m not in OTHERS]  # those that are tuned, and learn task after task
RIVALS = ("lora", "lora-gpm", "inflora", "lora-drs", "bilora")
CLOSED = [head for head in HEADS if head != "linear"]
CONFIDENCE = 0.95
LEAST_LEARNED = 0.9  # of the frozen backbone's plasticity, of what the curves show
DRAWN = ("linear", "lda", "ridge")  # the heads of the curves
Point = tuple[float, float]
NOWHERE = (float("nan"), float("nan"))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its two-sided t interval at CONFIDENCE; infinite for one value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), float("inf")
    half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values) / n**0.5
    return statistics.fmean(values), float(half)


def spread(values: list[float | None]) -> str:
    """'mean ± deviation' of the values; a dash where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f}"


def shown(values: list[float]) -> str:
    """A paired difference in Markdown, in bold where its interval excludes zero."""
    if not values:
        return "–"
    mean, half = interval(values)
    text = f"{mean:+.2f} ± {half:.2f}" if half < float("inf") else f"{mean:+.2f}"
    return f"**{text}**" if abs(mean) > half else text


def counted(text: str, count: int, wanted: int) -> str:
    """With the number of runs that it speaks of, and nothing in bold, where some diverged or are still to be run."""
    return text if count in (0, wanted) else f"{text.replace('**', '')} ({count} of {wanted})"


def by_seed(study: Study, method: str, head: str, metric: str = "acc") -> dict[int, float]:
    """A metric of what was chosen, of the reported seeds that are finished."""
    lines = study.reported(method, head)
    return {line["seed"]: line["heads"][head][metric] for line in lines if head in line["heads"]}


def gains(study: Study, ours: tuple[str, str], theirs: tuple[str, str], metric: str = "acc") -> list[float]:
    """ours - theirs, (method, head) each, on the seeds that both have."""
    mine, other = by_seed(study, *ours, metric), by_seed(study, *theirs, metric)
    return [mine[seed] - other[seed] for seed in study.seeds if seed in mine and seed in other]


def difference(study: Study, ours: tuple[str, str], theirs: tuple[str, str], metric: str = "acc") -> str:
    """Mean ± half of the interval of the gains, and of how many seeds where that is not all."""
    values = gains(study, ours, theirs, metric)
    return counted(shown(values), len(values), len(study.seeds))


def standing(found: dict[str, list[float]]) -> set[str]:
    """Those whose mean Holm's correction tells from zero, by paired t tests: all together at CONFIDENCE."""
    chances = {n: ttest_1samp(x, 0).pvalue if len(x) > 1 and any(x) else 1.0 for n, x in found.items()}
    stays: set[str] = set()
    for name in sorted(chances, key=chances.__getitem__):
        if chances[name] > (1 - CONFIDENCE) / (len(chances) - len(stays)):
            break
        stays.add(name)
    return stays


def _stands(study: Study, head: str, against: str) -> set[str]:
    """Of the learners with all seeds of a head, those that Holm's correction over them leaves apart from `against`."""
    found = {method: gains(study, (method, head), (against, head)) for method in LEARNERS if method != against}
    return standing({method: values for method, values in found.items() if len(values) == len(study.seeds)})


def paired(study: Study, against: str) -> str:
    """How far each method is ahead of `against` with the same head, seed by seed: mean ± half of the interval.

    A dagger stands where Holm's correction, over those of a head that learn task after task, leaves the difference.
    """
    heads = study.heads()
    stands = {head: _stands(study, head, against) for head in heads}
    text = [f"| ACC less that of {against} | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for method in METHODS:
        if method != against and any(study.reported(method, head) for head in heads):
            cells = [difference(study, (method, head), (against, head)) for head in heads]
            cells = [f"{cell} †" if method in stands[head] else cell for head, cell in zip(heads, cells, strict=True)]
            text.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(text)


# Of the ablation: a row, and the one that lacks what it is named for.
PARTS = {
    "OE": ("OE", "nothing"),
    "GR alone": ("GR", "nothing"),
    "GR behind OE": ("OE + GR", "OE"),
    "exact instead of tangent": ("OE + GR, exact", "OE + GR"),
    "exact behind OE": ("OE + GR, exact", "OE"),
    "exact instead of tangent, with DML": ("OE + GR + DML, exact", "OE + GR + DML"),
    "DML alone": ("DML", "nothing"),
    "DML behind OE": ("OE + DML", "OE"),
    "DML behind OE + GR": ("OE + GR + DML", "OE + GR"),
    "DML behind the exact one": ("OE + GR + DML, exact", "OE + GR, exact"),
    "PEFT's preconditioner instead of GR, exact": ("OE + preconditioner, exact", "OE + GR, exact"),
    "drift where nothing is protected": ("nothing, drift", "nothing"),
    "drift behind all": ("OE + GR + DML, exact, drift", "OE + GR + DML, exact"),
    "merging half behind all": ("OE + GR + DML, exact, half merged", "OE + GR + DML, exact"),
    "2000 random features for lda": ("OE + GR + DML, exact, lda of 2000", "OE + GR + DML, exact"),
}


def parts(study: Study) -> str:
    """What each part of Janus-LoRA adds to ACC, seed by seed, at each setting of the ablation."""
    text = [f"| what it adds | setting | {' | '.join(HEADS)} |", "|" + "---|" * (len(HEADS) + 2)]
    rows = study.ablation()
    for setting in dict.fromkeys(row.rpartition(" | ")[0] for row in rows):
        for part, names in PARTS.items():
            pairs = [[study.line(rows[f"{setting} | {name}"], seed) for name in names] for seed in study.seeds]
            if None in sum(pairs, []):
                continue  # still to be run
            both = [heads for pair in pairs if all(heads := [line["heads"] for line in pair])]
            added = [[with_it[head]["acc"] - without[head]["acc"] for with_it, without in both] for head in HEADS]
            cells = [counted(shown(values), len(values), len(study.seeds)) for values in added]
            text.append(f"| {part} | {setting.partition(' | ')[2].replace(' | ', ', ')} | {' | '.join(cells)} |")
    return "\n".join(text)


def best_head(study: Study, method: str) -> str | None:
    """The closed-form head that did best on the held-out images of both selection seeds; None while trials miss."""
    chosen = {head: study.chosen(method, head) for head in CLOSED}
    if None in chosen.values():
        return None
    known = study.candidates(method)
    return max(CLOSED, key=lambda head: study.accuracy(known[chosen[head]], head, SELECTION_SEEDS))


def hypotheses(study: Study, method: str) -> str:
    """The three that were written down before any run: what came out for `method` on this data set."""
    head = best_head(study, method)
    if head is None:
        raise SystemExit(f"{method}: trials are missing; `run {study.data}` goes on with them")
    text = [f"`{method}` with `{head}`, its best closed-form head on held-out images, on {study.data}:", ""]
    text.append(
        f"1. Of the gap between lora and joint, both with linear heads, it closes {_closed(study, method, head)}."
    )
    ahead = [f"{rival} {difference(study, (method, head), (rival, head))}" for rival in ("frozen", *RIVALS)]
    text.append(f"2. Ahead with the same head of {', '.join(ahead)}.")
    text.append(f"3. {_forgetting(study, method, head)}")
    text.append(f"   {_forgetting(study, method, 'linear')}")
    return "\n".join(text)


def _closed(study: Study, method: str, head: str) -> str:
    own, low, high = (by_seed(study, m, h) for m, h in ((method, head), ("lora", "linear"), ("joint", "linear")))
    seeds = own.keys() & low.keys() & high.keys()
    if not seeds or low == high:
        return "– (runs are missing)"
    mean = [statistics.fmean(side[s] for s in seeds) for side in (own, low, high)]
    share = (mean[0] - mean[1]) / (mean[2] - mean[1])
    return counted(f"{share:.0%} ({mean[1]:.1f} to {mean[2]:.1f}; it has {mean[0]:.1f})", len(seeds), len(study.seeds))


def points(study: Study, candidates: Iterable[dict[str, Any]], head: str) -> list[Point]:
    """(plasticity, forgetting) of candidates on the first selection seed; of those that diverged there is none."""
    lines = [study.line(study.trial(change), SELECTION_SEEDS[0]) for change in candidates]
    found = [line["heads"][head] for line in lines if line is not None and head in line["heads"]]
    return [(of["plasticity"], -of["bwt"]) for of in found if of["bwt"] is not None]


def along_rate(study: Study, method: str, head: str) -> list[dict[str, Any]]:
    """The candidates that differ from what is chosen for a head in the learning rate alone, lowest rate first."""
    known = study.candidates(method)
    chosen = known[study.chosen(method, head)]
    same = [change for change in known.values() if change | {"lr": None} == chosen | {"lr": None}]
    return sorted(same, key=lambda change: change["lr"])


def least_forgetting(points: list[Point], plasticity: float) -> float | None:
    """Of the points with at least this plasticity."""
    return min((forgotten for learned, forgotten in points if learned >= plasticity), default=None)


def _forgetting(study: Study, method: str, head: str) -> str:
    """At the plasticity of InfLoRA's choice for the head; and the choices of both on the reported seeds."""
    row = study.chosen("inflora", head)
    line = study.line(study.trial(study.candidates("inflora")[row]), SELECTION_SEEDS[0]) if row else None
    if line is None:
        return "– (trials are missing)"
    theirs = line["heads"][head]
    ours = least_forgetting(points(study, study.candidates(method).values(), head), theirs["plasticity"])
    said = "no candidate has that" if ours is None else f"forgets {ours:.1f}"
    more, less = (difference(study, (method, head), ("inflora", head), metric) for metric in ("plasticity", "bwt"))
    return (
        f"With `{head}`, on the held-out images of seed {SELECTION_SEEDS[0]}, InfLoRA's choice learns "
        f"{theirs['plasticity']:.1f} and forgets {-theirs['bwt']:.1f}; with at least its plasticity {method} {said}. "
        f"On seeds {study.seeds[0]} to {study.seeds[-1]} the choice for {method} learns {more} more than InfLoRA's, "
        f"and its BWT is {less} above."
    )


def learning(points: list[Point], frozen: float) -> list[Point]:
    """Those that learn about as much as the frozen backbone, or more; what the others have left is of no use."""
    return [p for p in points if p[0] >= LEAST_LEARNED * frozen]


def is_tried(study: Study) -> bool:
    """Whether all trials that the curves show are run, diverged ones as well, and those that choose between them."""
    tried = [change for method in (*LEARNERS, "frozen") for change in study.candidates(method).values()]
    run = all(study.line(study.trial(change), SELECTION_SEEDS[0]) is not None for change in tried)
    return run and all(study.chosen(method, head) for method in LEARNERS for head in DRAWN)


def broken(line: list[Point], shown: list[Point]) -> list[Point]:
    """A line that goes nowhere in place of what is not shown, so that nothing bridges it."""
    return [point if point in shown else NOWHERE for point in line]


def columns(points: list[Point]) -> tuple[list[float], list[float]]:
    """All plasticities, and all that is forgotten."""
    return [learned for learned, _ in points], [forgotten for _, forgotten in points]


def draw(studies: list[Study], path: Path) -> None:
    """Forgetting over plasticity for every candidate of every method: a row a data set, a column a head.

    Of the first selection seed. A line goes along the learning rate, at what else is chosen for the head; paler dots
    are the other candidates.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(studies), len(DRAWN), figsize=(5 * len(DRAWN), 4 * len(studies)), squeeze=False)
    for axis, head, study in ((axes[i][j], h, s) for i, s in enumerate(studies) for j, h in enumerate(DRAWN)):
        (frozen,) = points(study, study.candidates("frozen").values(), head)
        for number, method in enumerate(LEARNERS):
            tried = learning(points(study, study.candidates(method).values(), head), frozen[0])
            line = broken(points(study, along_rate(study, method, head), head), tried)
            axis.scatter(*columns(tried), s=9, color=f"C{number}", alpha=0.4)
            axis.plot(*columns(line), ".-", color=f"C{number}", label=method)
        axis.plot(*frozen, "k+", markersize=12, label="frozen")
        axis.set(title=f"{study.data}, {head}", xlabel="plasticity (%)", ylabel="forgetting (points)")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
