"""Files of published npm packages, pinned by version: the drawings and fonts that benchmarks are built from."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path


class Package:
    """Read access to the files of one npm tarball, fetched into ``cache`` with ``npm pack`` when missing.

    ``spec`` is ``name@version``. Files whose path has one of ``skip`` in it are left out: they only cost memory.
    """

    def __init__(self, spec: str, cache: Path, skip: tuple[str, ...] = ()) -> None:
        name, _, version = spec.rpartition("@")
        path = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", spec], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(path) as tar:
            wanted = (m for m in tar if m.isfile() and not any(part in m.name for part in skip))
            self._files = {m.name: tar.extractfile(m).read() for m in wanted}

    def read(self, path: str) -> bytes:
        """The file at ``path`` below the package root."""
        return self._files[f"package/{path}"]

    def json(self, path: str) -> dict | list:
        """Parsed JSON file at ``path`` below the package root."""
        return json.loads(self.read(path))

    def folder(self, path: str) -> Iterator[tuple[str, bytes]]:
        """(file stem, bytes) of every file directly in the folder ``path``, sorted by name."""
        for name in sorted(self._files):
            parent, _, leaf = name.rpartition("/")
            if parent == f"package/{path}":
                yield leaf.rpartition(".")[0], self._files[name]
