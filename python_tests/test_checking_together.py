"""Of several processes that train together one decodes the images to check them; the others find that it is done."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import trees

from janus_ext import processes, train
from janus_ext.config import TrainConfig
from janus_ext.data import check
from janus_ext.errors import DataError

pytestmark = pytest.mark.xdist_group("checking together")

RANKS = 2


def work(rank: int, folder: Path, weights: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}  # as torchrun says
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.save({name: decoded(folder / name, weights) for name in ("sound", "damaged")}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def decoded(tree: Path, weights: Path) -> dict[str, object]:
    """The images that this process decodes until a run has its data, or refuses them; each takes a while."""
    config = TrainConfig(benchmark="folder", backbone="emoji", data_dir=str(tree), weights=str(weights), workers=0)
    names, error, decode = [], "", check._decode_one

    def slowly(files: object, name: str) -> object:
        names.append(name)
        time.sleep(0.05)
        return decode(files, name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(check, "_decode_one", slowly)
        processes.gathered(None)  # both begin at once
        try:
            train.loaded(config.resolved())
        except DataError as refused:
            error = str(refused)
    return {"names": sorted(names), "error": error}


def test_one_process_decodes_the_images_for_all(weights, tmp_path) -> None:
    """Each image once, and none in the other one; what is wrong with one of them ends both."""
    for name in ("sound", "damaged"):
        trees.sides(tmp_path / name, 2, 3, 2)
    (tmp_path / "damaged" / "train" / trees.wnid(1) / "broken.jpg").write_bytes(b"no image")
    torch.multiprocessing.spawn(work, args=(tmp_path, weights), nprocs=RANKS)
    first, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name in ("sound", "damaged"):
        images = [path for path in (tmp_path / name).rglob("*.*") if path.is_file()]
        assert first[name]["names"] == sorted(str(path.relative_to(tmp_path / name)) for path in images)
        assert other[name]["names"] == []
        assert first[name]["error"] == other[name]["error"]
    assert first["sound"]["error"] == "" and "broken.jpg is unreadable" in first["damaged"]["error"]
