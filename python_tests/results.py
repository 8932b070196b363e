"""Results of runs that never were, of the size and shape of real ones."""

import random
from typing import Any

from janus_ext.runs import metrics


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
