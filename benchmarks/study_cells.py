"""Cells of a study, one row at one seed: trained, written as a line of JSON, and told apart."""

import hashlib
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from preconditioned import preconditioned
from provenance import commit

ASSETS = Path(__file__).resolve().parent.parent / "janus_ext" / "assets"
TRACKED = ("--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")  # these grow with every cell
OFF = {"drift_budget": 1e9}  # the guard, which fitted heads would bring along
METRICS = ("acc", "maa", "bwt", "plasticity", "violation", "danger", "movement", "merged", "seconds")
Cell = tuple[str, dict[str, Any], int]


def resolved(change: dict[str, Any], seed: int) -> Any:
    """The resolved configuration of one cell."""
    return _resolved(json.dumps(of_program(change)), seed)


@cache
def _resolved(change: str, seed: int) -> Any:  # a table asks for the same ones again and again
    from janus_ext.config import TrainConfig

    return TrainConfig(**json.loads(change), seed=(seed,), shuffle_classes=True, plots=False).resolved()


def of_program(change: dict[str, Any]) -> dict[str, Any]:
    """Without what only benchmarks know: "preconditioned", see preconditioned.py."""
    return {name: value for name, value in change.items() if name != "preconditioned"}


def cell_config(change: dict[str, Any], seed: int) -> dict[str, Any]:
    """The resolved configuration of one cell as JSON, without what does not touch the result."""
    config = resolved(change, seed)
    idle = {"output", "data_dir", "cache_images", "workers", *config.without_effect()}
    return {key: value for key, value in config.to_json().items() if key not in idle}


@cache
def assets_sha256(*names: str) -> str:
    """Fingerprint of the embedded images, classes and backbone, or of those files of them that are named."""
    digest = hashlib.sha256()
    for name in names or ("backbone.safetensors", "emoji.json", "emoji.zip"):
        digest.update((ASSETS / name).read_bytes())
    return digest.hexdigest()


def fingerprint(change: dict[str, Any]) -> str:
    """Of what of the package's data a cell depends on."""
    embedded = change.get("benchmark", "emoji") == "emoji"
    return assets_sha256() if embedded else assets_sha256("backbone.safetensors")


def run_cell(cell: tuple[str, dict[str, Any], int, int, dict[str, Any]]) -> dict[str, Any]:
    """Trains one cell (row, change, seed, threads, where its images lie) in this process and returns its line."""
    import torch

    from janus_ext.config import TrainConfig
    from janus_ext.devices import device_name
    from janus_ext.errors import TrainingError
    from janus_ext.train import train

    row, change, seed, threads, where = cell
    torch.set_num_threads(threads)
    line = {"row": row} | identity(change, seed)
    with tempfile.TemporaryDirectory() as folder:
        own = {"seed": (seed,), "shuffle_classes": True, "plots": False, "output": Path(folder) / "run"}
        with preconditioned(change.get("preconditioned", False)):
            try:
                results = train(TrainConfig(**of_program(change), **where, **own))[0]
            except TrainingError as error:
                if "not finite" not in str(error):
                    raise
                # of a rate that is too large, which is a result as well
                return line | {"heads": {}, "diverged": str(error), "commit": commit(*TRACKED)}
    line |= {metric: total_of(metric, results[metric]) for metric in METRICS}
    shown = ("acc", "maa", "bwt", "plasticity")
    return line | {
        "heads": {head: {name: of[name] for name in shown} for head, of in results["heads"].items()},
        "split_sha256": results["split_sha256"],
        "versions": results["versions"],
        "processor": device_name(torch.device("cpu")),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # by which processors of one name differ
        "commit": commit(*TRACKED),
    }


def try_cell(cell: tuple[str, dict[str, Any], int, int, dict[str, Any]]) -> dict[str, Any]:
    """`run_cell`, or what it failed with: the cells beside it go on."""
    try:
        return run_cell(cell)
    except Exception as error:
        return {"row": cell[0], "seed": cell[2], "error": f"{type(error).__name__}: {error}"}


def total_of(metric: str, value: Any) -> float | None:
    """One number of a metric: the sum of the seconds, the mean over the tasks that have one, or the number itself."""
    if not isinstance(value, list):
        return value
    known = [v for v in value if v is not None]
    if metric == "seconds":
        return sum(known)
    return statistics.fmean(known) if known else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All finished cells in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identity(change: dict[str, Any], seed: int) -> dict[str, Any]:
    """What tells a cell from others of its data set, whatever row asks for it; not the images, nor the code."""
    preconditioned = {"preconditioned": True} if change.get("preconditioned") else {}
    return {"seed": seed, "config": cell_config(change, seed), "assets": fingerprint(change)} | preconditioned


def is_done(line: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a finished cell is the one of this identity.

    Settings that came into the program after the cell had run must stand at their defaults. No guard is none, however
    it was said.
    """
    if any(line.get(name) != wanted.get(name) for name in ("seed", "assets", "preconditioned")):
        return False
    config, ran = _unguarded(wanted["config"]), _unguarded(line["config"])
    if all(config.get(name) == value for name, value in ran.items() if name in config):
        defaults = resolved({"method": config["method"], "head": config["head"]}, line["seed"]).to_json()
        return all(value == defaults[name] for name, value in config.items() if name not in ran)
    return False


def named(line: dict[str, Any] | None) -> dict[str, Any] | None:
    """A run whose head has random features, with that head under a name of its own, too."""
    width = line["config"].get("head_width") if line else None
    if not width or not line["heads"]:
        return line
    head = line["config"]["head"]
    return line | {"heads": line["heads"] | {f"{head} {width}": line["heads"][head]}}


def accuracies(path: Path, change: dict[str, Any], head: str, seeds: Iterable[int]) -> dict[int, float | None]:
    """ACC of a configuration with a head, by seed, of the runs in the file; None where one diverged."""
    lines, wanted = read_lines(path), {seed: identity(change, seed) for seed in seeds}
    done = {seed: named(x) for seed, cell in wanted.items() for x in lines if is_done(x, cell)}
    return {seed: line["heads"][head]["acc"] if line["heads"] else None for seed, line in done.items() if line}


def finite(found: dict[int, float | None]) -> dict[int, float]:
    """Without those that diverged."""
    return {seed: acc for seed, acc in found.items() if acc is not None}


def _unguarded(config: dict[str, Any]) -> dict[str, Any]:
    """With a budget that nothing exceeds as none: so it is said where a head would bring one along."""
    return config | {"drift_budget": None} if (config.get("drift_budget") or 0) >= OFF["drift_budget"] else config


def missing(cells: list[Cell], finished: list[dict[str, Any]]) -> list[Cell]:
    """Those that are not finished; of several rows with one identity the first."""
    by_identity: dict[str, Cell] = {}
    for cell in cells:
        wanted = identity(*cell[1:])
        if not any(is_done(line, wanted) for line in finished):
            by_identity.setdefault(json.dumps(wanted), cell)
    return list(by_identity.values())


def run_cells(cells: list[Cell], jobs: int, threads: int, path: Path, where: dict[str, Any] | None = None) -> None:
    """Runs those of `cells` that `path` lacks, `jobs` at a time, appending each as it ends.

    `where` is what a configuration says of the place of the images.
    """
    path.parent.mkdir(exist_ok=True)
    wanted = missing(cells, read_lines(path))
    print(f"{path.stem}: {len(wanted)} of {len(cells)} cells to run, {jobs} at a time")
    failed = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        finishing = pool.imap_unordered(try_cell, [(*cell, threads, where or {}) for cell in wanted])
        for count, line in enumerate(finishing, 1):
            name = f"{line['row']}, seed {line['seed']}"
            if "error" in line:
                failed.append(name)
            else:
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            said = line.get("error") or line.get("diverged") or format(line["acc"], ".2f")
            print(f"[{count}/{len(wanted)}] {name}: {said}", flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")
