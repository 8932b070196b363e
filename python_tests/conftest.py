"""Devices, dtypes, the one table of tolerances that every numerical test uses, and small training runs."""

import atexit
import errno
import json
import os
import shlex
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several (-n): threads that wait for each other's cores are slow
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import studies
import torch
import trees
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from janus_ext import _native
from janus_ext.assembly import make_learner
from janus_ext.backbone import prepare_torchvision
from janus_ext.config import TrainConfig
from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.methods.base import Task
from janus_ext.runs import checkpoint
from janus_ext.runs.shared import run_at
from janus_ext.training.loop import Learner
from janus_ext.training.trainer import Trainer

# Graphs that an earlier state of the sources left in the usual cache would be tested in place of this one's: PyTorch
# knows them by their operations, and not by what an op of ours was when they were made.
GRAPHS = tempfile.mkdtemp(prefix="janus-graphs-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = GRAPHS
atexit.register(shutil.rmtree, GRAPHS, ignore_errors=True)

# Relative error |got - want| / |want| (Frobenius) against a float64 reference, inputs rounded to the dtype first.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
ARCHITECTURE = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_drop_rate": 0.5,
}  # of the tiny backbone
needs_native = pytest.mark.skipif(not _native.available(), reason="the compiled library is not loaded")
needs_inductor = pytest.mark.skipif(
    shutil.which("g++") is None or shlex.quote(torch.__file__) != torch.__file__,
    reason="inductor needs a C++ compiler, and a torch in a folder whose name needs no quotes",
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of checked images stays out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny vision transformer in the layout of the embedded one."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(num_classes=0, **ARCHITECTURE)
    metadata = {
        "architecture": json.dumps(ARCHITECTURE),
        "normalize": json.dumps({"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}),
    }
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_file({key: value.half() for key, value in model.state_dict().items()}, path, metadata)
    return path


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want|_F / |want|_F in float64; |got|_F where want is zero."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}"
    norm = want.norm()
    return float((got - want).norm() / norm) if norm > 0 else float(got.norm())


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within `factor` times the table's tolerance for `dtype`."""
    error = relative_error(got, want)
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.2e} over {factor * TOLERANCE[dtype]:.0e}"


def orthonormal(n: int, k: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    """A random orthonormal [n, k]."""
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q.to(device, dtype)


def subspace(V: torch.Tensor) -> torch.Tensor:
    """The projector V V^T: what two bases of one subspace agree on."""
    return V.double() @ V.double().mT


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six class folders of five photographs each."""
    trees.folders(tmp_path / "photos", 6, 5)
    return tmp_path / "photos"


@pytest.fixture
def tree(tmp_path):
    """Three classes of four images, one of which a camera held upright, and one lies deeper."""
    root = tmp_path / "tree"
    trees.folders(root, 3, 4, ("cat", "dog, small", "eel").__getitem__)
    turned = Image.fromarray(np.concatenate([trees.drawing(5, 0), trees.drawing(6, 0)]))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "cat" / "turned.jpg", exif=exif)
    trees.save_jpeg(root / "eel" / "deep" / "er.JPG", trees.drawing(2, 5))
    (root / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def web_server(tmp_path):
    """Address of a web server on this machine that gives the files of ``tmp_path``/www."""
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


# small training runs --------------------------------------------------------------------------------------------------
@pytest.fixture
def mounted(monkeypatch) -> None:
    """Folders keep their places, as those do that another file system is mounted at."""

    def refuse(made: Path, place: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(place))

    monkeypatch.setattr(checkpoint, "_exchange", refuse)


@pytest.fixture(scope="session")
def patterns() -> Benchmark:
    """Six classes in three tasks, a class being a pattern of coloured patches under noise; class order 5 .. 0."""
    return patterns_under(25)


@pytest.fixture(scope="session")
def hard() -> Benchmark:
    """The same under so much noise that every head is wrong now and then, on more test images."""
    return patterns_under(150, test=12)


def patterns_under(noise: float, train: int = 8, test: int = 4) -> Benchmark:
    """With so many images of a class to learn from and to test with."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (6, 3, 4, 4), generator=generator).float()
    pictures = pictures.repeat_interleave(8, 2).repeat_interleave(8, 3)

    def split(name: str, per_class: int) -> MemorySplit:
        labels = torch.arange(6).repeat_interleave(per_class)
        added = noise * torch.randn(len(labels), 3, 32, 32, generator=generator)
        images = (pictures[labels] + added).clamp(0, 255).to(torch.uint8)
        return MemorySplit(images, labels, [f"{name}/{i}" for i in range(len(labels))])

    names = tuple("abcdef")
    return Benchmark("patterns", names, split("train", train), split("test", test), ((5, 4), (3, 2), (1, 0)))


def make_trainer(
    benchmark: Benchmark, weights: Path, folder: Path, cls: type[Trainer | Learner] = Trainer, /, **changes
) -> Trainer:
    """A trainer of class ``cls``, or one that keeps weights around a learner of that class, on the tiny backbone."""
    settings = {
        "rank": 4,
        "epochs": 3,
        "batch_size": 8,
        "lr": 1e-2,
        "amp": "off",
        "energy_start": 0.9,
        "energy_end": 0.9,
    }
    idle = TrainConfig(**changes).resolved().without_effect()  # of the settings here, what the method does not have
    settings = {name: value for name, value in settings.items() if name not in idle}
    config = TrainConfig(weights=str(weights), device="cpu", **(settings | changes)).resolved()
    learner = make_learner(config, config.seed[0], len(benchmark.tasks))
    if issubclass(cls, Learner):
        learner = cls(config, learner.model, learner.method, learner.seed, learner.planned)
        return KeepingTrainer(config, benchmark, learner, run_at(folder))
    return cls(config, benchmark, learner, run_at(folder))


def task_of(trainer: Trainer, index: int) -> Task:
    """A task of the trainer's benchmark as its method sees it."""
    tasks = trainer.benchmark.tasks
    task = trainer.learner._task(trainer.train_images[index], len(tasks[index]))
    return replace(task, index=index, first=sum(map(len, tasks[:index])))


def without_time(results: dict) -> dict:
    """Without the seconds, and the SHA-256 of a file that has them."""
    return {key: value for key, value in results.items() if key not in ("seconds", checkpoint.SHA256)}


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in trainer.learner.model.state_dict().items()}


class KeepingTrainer(Trainer):
    """Keeps the weights after each task."""

    def _save(self, index: int) -> None:
        super()._save(index)
        self.history = [*getattr(self, "history", []), weights_of(self)]


def assert_protected_inputs_are_left_alone(trainer: KeepingTrainer, tasks: int) -> None:
    """docs/method.md, property 2, from the weights and the factors' files of a whole run."""
    for task in range(1, tasks):
        factors, _ = checkpoint.read_tensors(trainer.run_on_disk.factors_path(task))
        for name in trainer.learner.method.layers:
            before, after = (trainer.history[t][f"backbone.{name}.linear.weight"].double() for t in (task - 1, task))
            basis = factors[f"{name}.basis"].double()
            change = after - before
            assert basis.shape[1] > 0 and change.norm() > 0
            rounding = torch.finfo(torch.float32).eps * before.norm()
            assert (change @ basis).norm() <= 1e-5 * change.norm() + rounding
            update = factors[f"{name}.B"].double() @ factors[f"{name}.A"].double()
            assert (update @ basis).norm() <= 1e-5 * update.norm()


@pytest.fixture
def study(monkeypatch):
    """`studies.finished`, with the benchmarks where Python finds them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return studies.finished
