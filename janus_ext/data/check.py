"""Finds every image that is missing, empty, unreadable or in no list, before training starts.

What was decoded without a complaint is remembered in the user's cache as one 64-bit fingerprint per file (of its name,
size and time of change), so the next start only asks the file system and decodes what is new or has changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from janus_ext.data.images import Files
from janus_ext.data.listing import Listing, Problem, files_below
from janus_ext.data.names import ENDINGS, is_image, printable, to_bytes
from janus_ext.devices import available_cores
from janus_ext.errors import CheckpointError, DataError, on_one_line
from janus_ext.runs.checkpoint import make_folder, read_tensors, write_tensors

LOG = logging.getLogger("janus_ext")
CHUNK = 64  # images per job: small against the wait for the last job, large against the cost of a job


def verify(listing: Listing, names: Sequence[str]) -> None:
    """DataError naming the first image that cannot be used; at once if all have been decoded before."""
    problems = examine(Files(listing.root, listing.upright), names)
    if problems:
        others = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise DataError(f"--data-dir: {problems[0]}{others}; --check-data lists all and says what to do")


def report(listing: Listing) -> None:
    """Decodes all images of ``listing`` anew, prints every problem, the counts and what to do.

    DataError if an image or a line cannot be used; images that no list names are reported and left alone.
    """
    names = [sample.name for sample in (*listing.train, *listing.test)]
    problems = [*listing.problems, *examine(Files(listing.root, listing.upright), names, afresh=True)]
    unlisted = find_unlisted(listing, names)
    for problem in (*problems, *unlisted):
        detail = f"  ({problem.detail})" if problem.detail else ""
        print(on_one_line(f"{problem.kind:<14}  {problem.where}{detail}"))
    print(format_counts(listing))
    for advice in advise(listing, problems, unlisted):
        print(advice)
    if problems:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(p.kind for p in problems).items())
        raise DataError(f"--check-data: {listing.root} cannot be trained on: {kinds}; each is listed above")


def examine(files: Files, names: Sequence[str], afresh: bool = False) -> list[Problem]:
    """Problems of the images ``names`` of ``files``, in their order; remembers those that are fine.

    Decodes in parallel what is not known to be fine, or everything if ``afresh``. What was decoded before an
    interruption is remembered, too.
    """
    root = files.root
    fingerprints, problems = stat_files(root, names)
    known = read_known(root)
    wanted = fingerprints != 0
    if not afresh:
        wanted &= ~torch.isin(fingerprints, known)
    rows = wanted.nonzero().flatten().tolist()
    fine, broken = [], []
    try:
        with closing(_decode(files, [names[row] for row in rows])) as decoded:
            for row, problem in zip(rows, decoded, strict=True):
                (broken if problem else fine).append(row)
                problems += [problem] if problem else []
    finally:
        if rows:
            remember(root, torch.cat([known[~torch.isin(known, fingerprints[broken])], fingerprints[fine]]))
    return _in_order(problems, names)


def find_broken(files: Files, names: Sequence[str]) -> list[Problem]:
    """Problems of the images ``names`` of ``files``, in their order; decodes all in parallel, remembers nothing."""
    fingerprints, problems = stat_files(files.root, names)
    wanted = [name for name, fingerprint in zip(names, fingerprints.tolist(), strict=True) if fingerprint]
    with closing(_decode(files, wanted)) as decoded:
        return _in_order([*problems, *filter(None, decoded)], names)


def _in_order(problems: Sequence[Problem], names: Sequence[str]) -> list[Problem]:
    order = {name: position for position, name in enumerate(names)}
    return sorted(problems, key=lambda problem: order[problem.where])


def stat_files(root: Path, names: Sequence[str]) -> tuple[Tensor, list[Problem]]:
    """int64 [N] fingerprints of the files (0 where there is none to decode), and the missing and empty ones."""
    fingerprints = []
    problems = []
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
        except (OSError, ValueError) as error:  # no such file, a loop of links, no permission; no name on this system
            problems.append(Problem("missing", name, getattr(error, "strerror", None) or ""))
            fingerprints.append(0)
            continue
        if not stat.S_ISREG(status.st_mode):
            problems.append(Problem("unreadable", name, "it is no file"))
        elif status.st_size == 0:
            problems.append(Problem("empty", name, "0 bytes"))
        sound = stat.S_ISREG(status.st_mode) and status.st_size
        fingerprints.append(_fingerprint(name, status) if sound else 0)
    return torch.tensor(fingerprints, dtype=torch.int64), problems


def _fingerprint(name: str, status: os.stat_result) -> int:
    about = to_bytes(f"{name}\n{status.st_size}\n{status.st_mtime_ns}")
    digest = hashlib.blake2b(about, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


def _decode(files: Files, names: Sequence[str]) -> Iterator[Problem | None]:
    """Per file its problem or None; threads suffice, Pillow decodes outside Python's global lock."""

    def decode(chunk: Sequence[str]) -> list[Problem | None]:
        return [_decode_one(files, name) for name in chunk]

    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    pool = ThreadPoolExecutor(available_cores())
    try:
        with tqdm(total=len(names), desc="checking images", unit="image", disable=None if names else True) as bar:
            for results in pool.map(decode, chunks):
                bar.update(len(results))
                yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for half a million images


def _decode_one(files: Files, name: str) -> Problem | None:
    try:
        files.open(name)
    except DataError as error:
        return Problem("unreadable", name, str(error).split(" cannot be read: ", 1)[-1])
    return None


# what is known -------------------------------------------------------------------------------------------------------
def record_path(root: Path) -> Path | None:
    """Where the fingerprints of the data set at ``root`` are kept: below $XDG_CACHE_HOME or ~/.cache, if that is known.

    A container's user whom the system does not know has no home.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "janus_ext" / f"checked-{hashlib.sha256(to_bytes(str(root.resolve()))).hexdigest()[:16]}.safetensors"


def read_known(root: Path) -> Tensor:
    """int64 [n] fingerprints of files that were decoded without a complaint; none if there is no readable record."""
    path = record_path(root)
    if path is None or not os.path.exists(path):  # Path.exists raises where a folder above is closed to us
        return torch.zeros(0, dtype=torch.int64)
    try:
        return read_tensors(path)[0]["fingerprints"]
    except (CheckpointError, KeyError) as error:
        LOG.warning("the record of checked images is damaged, all are checked again: %s", error)
        return torch.zeros(0, dtype=torch.int64)


def remember(root: Path, fingerprints: Tensor) -> None:
    """Keeps the fingerprints for the next start; a cache that cannot be written costs time only and is a warning."""
    path = record_path(root)
    try:
        if path is None:
            raise CheckpointError("this user has no home folder, and XDG_CACHE_HOME is not set")
        make_folder(path.parent)
        write_tensors(path, {"fingerprints": fingerprints.unique()}, {"root": printable(str(root.resolve()))})
    except CheckpointError as error:
        LOG.warning("the next start will check the images again: %s", error)


# the report ----------------------------------------------------------------------------------------------------------
def find_unlisted(listing: Listing, names: Sequence[str]) -> list[Problem]:
    """Images below the data set's folders that no list names, and files whose name is that of no image."""
    listed = set(names)
    strays = [path for folder in listing.folders for path in files_below(listing.root, folder) if path not in listed]
    return [
        Problem("unlisted", path, "" if is_image(path) else "not the name of an image that is read") for path in strays
    ]


def format_counts(listing: Listing) -> str:
    """A table of the listed and the official numbers of images."""
    width = max(map(len, listing.found), default=0)
    lines = [f"{'':<{width}}  {'images':>9}  {'official':>9}"]
    for part, found in listing.found.items():
        official = listing.expected.get(part)
        lines.append(f"{part:<{width}}  {found:>9,}  {'-' if official is None else format(official, ','):>9}")
    return "\n".join(lines)


def advise(listing: Listing, problems: Sequence[Problem], unlisted: Sequence[Problem]) -> list[str]:
    """What to do about what was found, most urgent first."""
    kinds = {problem.kind for problem in problems}
    lines = []
    if kinds & {"missing", "empty", "unreadable"}:
        lines.append(f"To do: fetch or extract the broken files again. {listing.advice}")
    if "wrong" in kinds:
        lines.append("To do: correct the lines named above, or take the lists from the data set's page.")
    if kinds & {"without images", "too small"}:
        lines.append(f"To do: put images into the class folders named above, or remove the folders. {ENDINGS}.")
    if unlisted:
        lines.append(f"Files that are not used: {len(unlisted):,}; remove them or leave them.")
    if listing.unlike_official():
        lines.append("The counts are not the official ones: results cannot be compared with published ones.")
    return lines or ["Nothing to do: every image is there and can be decoded; the next start needs no check."]
