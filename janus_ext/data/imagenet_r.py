"""``imagenet-r``: 200 classes of renditions, in one of the three splits that circulate under that name.

| --split | where it comes from | class ids |
|---|---|---|
| inflora | a random fifth of the whole folder is for the test (SPLIT_SEED), no file is moved | sorted wnid |
| coda | two yaml files, as CODA-Prompt distributes them (--split-files) | those of the files |
| folders | train/ and test/, as distributed with PILOT or left behind by InfLoRA's code | sorted wnid |

Results on different splits cannot be compared; the split's SHA-256 is in every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.listing import (
    Listing,
    Problem,
    Sample,
    class_samples,
    list_parts,
    require_classes,
    require_root,
    shared_classes,
    subfolders,
)
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

CLASSES = 200
TASKS = 10
OFFICIAL = {"train": 24_000, "test": 6_000}
SPLIT_SEED = 0  # InfLoRA draws from the seed of whichever run comes first and then moves the files
YAML_FILES = ("imagenet-r_train.yaml", "imagenet-r_test.yaml")
PAGE = "https://github.com/hendrycks/imagenet-r"
ADVICE = f"The archive imagenet-r.tar is linked from {PAGE}."
LAYOUTS = {
    "inflora": "<data-dir>/<wnid>/*.jpg     200 folders, as in imagenet-r.tar\n",
    "coda": "<data-dir>/<wnid>/*.jpg     200 folders, as in imagenet-r.tar\n"
    f"<data-dir>/{YAML_FILES[0]}   and {YAML_FILES[1]}, or elsewhere with --split-files\n",
    "folders": "<data-dir>/train/<wnid>/*.jpg     200 folders\n"
    "<data-dir>/test/<wnid>/*.jpg      the same 200 folders\n",
}


def load(config: TrainConfig) -> Benchmark:
    """The images of --data-dir in the split of --split."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists the split; DataError if the tree or a yaml file is not as wanted."""
    split = "inflora" if config.split == "auto" else config.split
    root = require_root("imagenet-r", config.data_dir, LAYOUTS[split], PAGE)
    parts_there = {"train", "test"} <= set(subfolders(root))
    if parts_there != (split == "folders"):
        other = "--split folders is for them" if parts_there else "--split inflora is for what there is"
        has = "train/ and test/" if parts_there else "no train/ and test/"
        raise DataError(f"--data-dir: {root} has {has}; {other}; wanted:\n\n{LAYOUTS[split]}")
    if split == "folders":
        return _read_folders(root)
    if split == "coda":
        return _read_coda(root, config.split_files or tuple(root / name for name in YAML_FILES))
    return _read_inflora(root)


def _listing(
    root: Path,
    classes: Sequence[str],
    train: Sequence[Sample],
    test: Sequence[Sample],
    problems: Sequence[Problem],
    folders: Sequence[str],
) -> Listing:
    return Listing(
        name="imagenet-r",
        root=root,
        class_names=tuple(classes),
        train=tuple(train),
        test=tuple(test),
        default_tasks=TASKS,
        folders=tuple(folders),
        advice=ADVICE,
        problems=tuple(problems),
        expected=OFFICIAL,
        found={"train": len(train), "test": len(test)},
    )


def _read_inflora(root: Path) -> Listing:
    """torch's random_split of the files in the order of torchvision's ImageFolder, kept as indices."""
    classes = subfolders(root)
    require_classes(classes, CLASSES, root, LAYOUTS["inflora"])
    samples, problems = class_samples(root, "", classes)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    size = int(0.8 * len(samples))
    train, test = ([samples[i] for i in part] for part in (order[:size], order[size:]))
    return _listing(root, classes, train, test, problems, classes)


def _read_folders(root: Path) -> Listing:
    classes = shared_classes(root, "train", "test")
    require_classes(classes, CLASSES, root / "train", LAYOUTS["folders"])
    return _listing(root, classes, *list_parts(root, ("train", "test"), classes), ("train", "test"))


# CODA-Prompt's yaml files --------------------------------------------------------------------------------------------
def _read_coda(root: Path, files: Sequence[Path]) -> Listing:
    """Class ids are those of the files; of their paths only <wnid>/<file> counts, the rest is of other machines."""
    names: dict[int, str] = {}
    seen: dict[str, str] = {}
    problems: list[Problem] = []
    parts = []
    for file in files:
        samples = []
        for number, (path, label) in enumerate(_read_yaml(file), start=1):
            where = f"{file.name}, entry {number}"
            sample, complaint = _entry(path, label, names, seen, where)
            if sample is None:
                problems.append(Problem("wrong", where, complaint))
            else:
                samples.append(sample)
        parts.append(samples)
    if len(names) != CLASSES:
        raise DataError(f"--split-files: {files[0]} must have {CLASSES} classes, got {len(names)}")
    classes = [names[label] for label in range(CLASSES)]
    return _listing(root, classes, *parts, problems, subfolders(root))


def _entry(path: Any, label: Any, names: dict[int, str], seen: dict[str, str], where: str) -> tuple[Sample | None, str]:
    """(sample, "") or (None, complaint); notes the class's name and the image in ``names`` and ``seen``."""
    steps = PurePosixPath(path).parts if isinstance(path, str) else ()
    if len(steps) < 2 or ".." in steps[-2:]:
        return None, f"wanted .../<wnid>/<file>, got {path!r:.80}"
    if not isinstance(label, int) or not 0 <= label < CLASSES:
        return None, f"the class id must lie in 0..{CLASSES - 1}, got {label!r:.80}"
    wnid, name = steps[-2], "/".join(steps[-2:])
    if names.setdefault(label, wnid) != wnid:
        return None, f"class {label} is {names[label]} in earlier entries, here {wnid}"
    if name in seen:
        return None, f"{name} is in {seen[name]} already"
    seen[name] = where
    return Sample(name, label), ""


def _read_yaml(file: Path) -> list[tuple[Any, Any]]:
    """The (path, class id) pairs of a file with the lists "data" and "targets"; no code in it is run."""
    import yaml

    try:
        with file.open("rb") as stream:
            table = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        data, targets = list(table["data"]), list(table["targets"])
    except OSError as error:
        raise DataError(f"--split coda: {file} cannot be read: {error.strerror}; name it with --split-files") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--split coda: {file} is no yaml with the lists 'data' and 'targets': {reason}") from error
    if len(data) != len(targets):
        raise DataError(f"--split coda: {file} has {len(data)} entries in 'data' and {len(targets)} in 'targets'")
    return list(zip(data, targets, strict=True))
