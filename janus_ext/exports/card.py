"""The model card beside an export: what was learned of which data, how well, and the lines that load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_ext.config import LearnConfig
from janus_ext.exports.contents import Contents
from janus_ext.runs.checkpoint import replace_file
from janus_ext.runs.metrics import measured_on
from janus_ext.runs.settings import with_own
from janus_ext.versions import installed

PRIVATE = {  # settings that say where things lie, how a machine is used, or what stands elsewhere in the card
    "data_dir",
    "task_list",
    "network",
    "view_margin",
    "own_backbone",
    "unprotected",
    "split_sha256",
    "view_interpolation",
    "view_crop_mode",
    "tasks",
    "benchmark",
    "split_files",
    "class_list",
    "class_names",
    "output",
    "resume",
    "plots",
    "tensorboard",
    "workers",
    "cache_images",
    "check_data",
    "device",
}


def write(folder: Path, contents: Contents, loading: str) -> None:
    """Writes README.md; ``loading`` is the section that says how to load the files beside it."""
    parts = (_head(contents), loading, _classes(contents), _accuracy(contents.results), _settings(contents.settings))
    text = "\n".join(part for part in parts if part)
    replace_file(folder / "README.md", lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


def _head(contents: Contents) -> str:
    settings, count = contents.settings, len(contents.class_names)
    tasks = f", learned in {len(contents.updates)} tasks one after another" if contents.updates else ""
    scores = (
        "Scores are the softmax of 16 times the cosines to class means (of the plain timm model: of dot products with "
        "them, which have the same order)."
        if contents.decision.unit
        else "Scores are the softmax over all classes."
    )
    made = ", ".join(f"{name} {installed(name)}" for name in ("janus-ext", "timm", "torch"))
    return (
        f"# An image classifier of {count} classes\n\n"
        f"The backbone `{settings['backbone']}` with the classes below{tasks}, by `{settings['method']}` of janus_ext"
        f"{_benchmark(settings)}. Weights are float32, images "
        f"{contents.model.input_size} x {contents.model.input_size} pixels. {scores} Made with {made}.\n"
    )


def _benchmark(settings: Mapping[str, Any]) -> str:
    name = settings.get("benchmark")
    return f", on the benchmark `{name}`" if name not in (None, "folder") else ""


def _classes(contents: Contents) -> str:
    groups = [update.class_names for update in contents.updates] or [contents.class_names]
    lines = [f"{index}. {', '.join(map(_cell, names))}" for index, names in enumerate(groups, 1)]
    kind = "Classes, task by task" if contents.updates else "Classes"
    return f"## {kind}\n\n" + "\n".join(lines) + "\n"


def _accuracy(results: Mapping[str, Any] | None) -> str:
    """The accuracy matrix, in per cent."""
    results = results or {}
    matrix: Sequence[Sequence[float]] = results.get("accuracy_matrix", ())
    if not matrix:
        return ""
    tasks = range(1, len(matrix) + 1)
    head = f"| after task | {' | '.join(f'on {t}' for t in tasks)} | mean |\n|{'---|' * (len(matrix) + 2)}\n"
    rows = []
    for task, row in enumerate(matrix, 1):
        cells = [f"{value:.2f}" for value in row] + [""] * (len(matrix) - len(row))
        rows.append(f"| {task} | {' | '.join(cells)} | {sum(row) / len(row):.2f} |")
    images = measured_on(results.get("validation", False))
    about = f"## Accuracy\n\nIn per cent, on {images}, among all classes seen so far.\n\n"
    return about + head + "\n".join(rows) + "\n"


def _settings(settings: Mapping[str, Any]) -> str:
    known = {name: settings[name] for name in LearnConfig.__dataclass_fields__ if name in settings}
    idle = LearnConfig(**known).without_effect() if "estimator" in known else {}
    left_out = PRIVATE | idle.keys()
    settings = with_own(settings)
    shown = {key: value for key, value in settings.items() if key not in left_out and value not in (None, [], ())}
    if isinstance(shown.get("seed"), list):
        shown["seed"] = shown["seed"][0]
    if "weights" in shown:
        shown["weights"] = Path(shown["weights"]).name
    rows = [f"| {key} | {_cell(str(value))} |" for key, value in shown.items()]
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Text that stands for itself in a table or a list of Markdown, on one line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
