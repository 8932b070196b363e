"""Results of runs that never were, of the size and shape of real ones."""

import json
import random
import re
from pathlib import Path
from typing import Any

from janus_ext.config import TrainConfig
from janus_ext.reports import html
from janus_ext.reports.found import find_runs
from janus_ext.runs import checkpoint, metrics
from janus_ext.runs.checkpoint import append_json_line, write_json

EPOCHS = 2  # of a task


def made_up(tasks: int, layers: int = 3, recognition: bool = True, **changes: Any) -> dict[str, Any]:
    """Results of a run of ``tasks``, of the size and shape of real ones; ``recognition``: with the newer keys."""
    numbers = random.Random(0)

    def triangle(low: float, high: float) -> list[list[float]]:
        return [[numbers.uniform(low, high) for _ in range(t + 1)] for t in range(tasks)]

    def per_layer(low: float, high: float) -> list[dict[str, float]]:
        names = [f"blocks.{i}.attn.qkv" for i in range(layers)]
        return [{name: 10 ** numbers.uniform(low, high) for name in names} if t else {} for t in range(tasks)]

    matrix, violation = triangle(0, 100), per_layer(-7, -6)
    averages = metrics.trajectory(matrix)
    results = {
        "benchmark": "emoji",
        "method": "janus",
        "seed": 0,
        "accuracy_matrix": matrix,
        "acc": averages[-1],
        "maa": sum(averages) / tasks,
        "bwt": metrics.backward_transfer(matrix),
        "forgetting": metrics.forgetting(matrix),
        "plasticity": metrics.plasticity(matrix),
        "acc_sample_weighted": averages[-1],
        "maa_sample_weighted": sum(averages) / tasks,
        "violation": [sum(v.values()) / layers if v else None for v in violation],
        "violation_per_layer": violation,
        "danger": [numbers.random() if t else None for t in range(tasks)],
        "similarity_own": [[numbers.uniform(0.6, 0.9) for _ in range(5)] for _ in range(tasks)],
        "similarity_old": [[numbers.uniform(0.3, 0.6) for _ in range(5)] if t else None for t in range(tasks)],
        "basis_rank": [{name: 100 for name in v} for v in violation],
        "seconds": [numbers.uniform(1, 20_000) for _ in range(tasks)],
    }
    if recognition:
        known, recognised = triangle(70, 80), triangle(40, 60)
        results |= {"accuracy_matrix_task_known": known, "task_recognition_matrix": recognised}
        results |= {"acc_task_known": metrics.accuracy(known), "task_recognition": metrics.accuracy(recognised)}
        results["violation_rounding_per_layer"] = per_layer(-9, -8)
    return results | changes


def write_run(folder: Path, seed: int = 0, tasks: int = 4, results: dict | None = None, **settings: Any) -> Path:
    """A run folder as the trainer leaves it; what is not said is a method's default on emoji."""
    typed = {name: value for name, value in settings.items() if name in TrainConfig.__dataclass_fields__}
    config = TrainConfig(seed=seed, **typed).resolved()
    stored = {"split_sha256": "a" * 64, "weights_sha256": "b" * 64, "class_names": ["x", "y"], "output": str(folder)}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_json() | stored | settings | {"seed": [seed]})
    made = made_up(tasks, seed=seed, method=config.method, benchmark=config.benchmark, versions={"torch": "2.13"})
    write_json(folder / "results.json", made if results is None else results)
    for task in range(tasks):
        for epoch in range(EPOCHS):
            line = {"task": task, "epoch": epoch, "loss": 2 - epoch + seed, "accuracy": 40.0 + epoch}
            append_json_line(folder / "metrics.jsonl", line)
    return folder


def read(*folders: Path) -> dict[str, Any]:
    """The data in the page of these runs."""
    runs, skipped = find_runs(folders)
    return data_of(html.render(html.page_data(runs, skipped)))


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def set_settings(folder: Path, change: dict[str, Any]) -> None:
    """Other settings for a run or a saved learner, with sums of all its files that fit."""
    checkpoint.write_sealed_json(folder / "config.json", checkpoint.read_json(folder / "config.json") | change)
    seal, state = checkpoint.read_sealed_json(folder / "config.json")[1], ""
    kept = folder / "checkpoints"
    for path in (*sorted(kept.glob("factors-*")), *sorted(kept.glob("method-*")), kept / "model.safetensors"):
        tensors, about = checkpoint.read_tensors(path)
        about |= {"config": seal} | ({"state": state} if path.stem == "model" else {})
        state = checkpoint.write_tensors(path, tensors, about)
