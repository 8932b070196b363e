"""What ``config.json`` holds: the resolved settings, and digests of the images' names and of the weights."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ext.config import TrainConfig, flag
from janus_ext.errors import ArgumentError
from janus_ext.runs.checkpoint import file_sha256
from janus_ext.runs.folder import OTHER

if TYPE_CHECKING:
    from janus_ext.data.benchmark import Benchmark

NOT_COMPARED = {  # results do not depend on them
    *("output", "resume", "save_every", "plots", "tensorboard", "workers", "cache_images", "checkpointing"),
}
# What a run is on, beside its settings; and the settings that only say where it lies, which may be spelled otherwise.
CONTENTS = {
    "split_sha256": (
        "other image files, or another order of classes",
        ("data_dir", "split_files", "class_list", "task_list"),
    ),
    "class_names": ("classes of other names", ()),
    "weights_sha256": ("backbone weights of other contents", ("weights",)),
}
MISSING = "not stored"


def settings_of(config: TrainConfig, benchmark: Benchmark, weights: Path | None) -> dict[str, Any]:
    """What ``config.json`` holds of a run.

    ``weights`` is the local file that the backbone is read from, None where there is none.
    """
    return config.to_json() | {
        "split_sha256": benchmark.split_sha256,
        "weights_sha256": weights and file_sha256(weights),
        "class_names": list(benchmark.class_names),
    }


def with_own(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those that only the method has among the others: no two have one name."""
    own = settings.get("own")
    others = {name: value for name, value in settings.items() if name != "own"}
    return others | own if isinstance(own, dict) else others


def check_same_settings(asked: dict[str, Any], stored: dict[str, Any], folder: Path) -> None:
    """Raises ArgumentError when the run in ``folder`` was begun with other settings, or has lost one.

    Images are compared by their names and order, weights by their content: the same under another path are the same.
    """
    asked, stored = with_own(asked), with_own(stored)
    same = {key for key in CONTENTS if asked[key] is not None and asked[key] == stored.get(key, MISSING)}
    elsewhere = {name for key in same for name in CONTENTS[key][1]}
    others = differing(asked, stored, but=elsewhere)
    if others:
        values = ", ".join(f"{flag(n)} {_typed(stored.get(n, MISSING))} (asked: {_typed(asked[n])})" for n in others)
        known = stored.keys() >= asked.keys() - NOT_COMPARED - CONTENTS.keys() - elsewhere
        kind = "with other settings" if known else "of another version of this program"
        raise ArgumentError(f"{folder} holds a run {kind}: {values}; {OTHER}, or repeat its flags")
    for key in sorted(CONTENTS.keys() - same):
        if asked[key] != stored.get(key, MISSING):
            found, wanted = (str(value)[:12] for value in (stored.get(key, MISSING), asked[key]))
            digests = f": {key} {found} (asked: {wanted})" if key.endswith("sha256") else ""
            raise ArgumentError(f"{folder} holds a run on {CONTENTS[key][0]}{digests}; {OTHER}")


def differing(asked: dict[str, Any], stored: dict[str, Any], but: Set[str]) -> list[str]:
    """The settings that are others, sorted, of those that results depend on, without `CONTENTS` and ``but``."""
    asked, stored = with_own(asked), with_own(stored)
    compared = asked.keys() - NOT_COMPARED - CONTENTS.keys() - but
    return sorted(name for name in compared if _differs(name, stored, asked))


def _differs(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a setting is another one; what a run lacks that its version did not know was what it is by default."""
    default = TrainConfig().to_json().get(name, MISSING)  # of a setting that only the method has there is none
    if name not in stored and asked[name] == default:
        return False
    return _comparable(name, stored) != _comparable(name, asked)


def _comparable(name: str, settings: dict[str, Any]) -> Any:
    """What two runs must share to be one; of the device, its kind."""
    value = settings.get(name, MISSING)
    return str(value).partition(":")[0] if name == "device" else value


def _typed(value: Any) -> str:
    """A setting as one types it."""
    if value is None or value == []:
        return "left out"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text.isprintable() else repr(text)  # of a stranger's file
