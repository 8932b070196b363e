"""Where a run computes: autocast by the hardware, and repeatable kernels on a GPU, as far as a CPU can show."""

import os
import platform
from types import SimpleNamespace

import pytest
import torch
from conftest import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from janus_ext import devices, processes
from janus_ext.config import MethodName
from janus_ext.errors import ArgumentError, ProcessError, TrainingError
from janus_ext.train import own_device

CPU = torch.device("cpu")
# What PyTorch has no repeatable CUDA kernel for and refuses under use_deterministic_algorithms(True), but for cumsum,
# which the package has on the CPU.
WITHOUT_REPEATABLE_KERNEL = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "median",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}


@pytest.fixture
def _global_flags(monkeypatch):
    """Puts PyTorch's back."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


def test_the_callers_autocast_rests_within_it_and_is_his_again_behind_it():
    product = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with devices.deterministic(torch.device("cpu")):
            assert (product @ product).dtype == torch.float32
        assert (product @ product).dtype == torch.bfloat16


@pytest.mark.usefixtures("_global_flags")
def test_a_gpu_takes_repeatable_kernels_or_none_and_fills_no_memory():
    with devices.deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory and not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled(), "what the caller had is the caller's again"
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("_global_flags")
def test_a_processor_keeps_the_kernels_that_it_has():
    with devices.deterministic(CPU):
        assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


class Operators(TorchDispatchMode):
    """The names of all that runs, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", MethodName.__args__)
def test_no_method_needs_what_has_no_repeatable_kernel(patterns, weights, tmp_path, method):
    changes = {"frequencies": 20} if method == "bilora" else {}
    trainer = make_trainer(patterns, weights, tmp_path / "run", method=method, tasks=None, epochs=1, **changes)
    with Operators() as seen:
        trainer.run()
    assert {"nll_loss_backward", "native_layer_norm_backward"} <= seen.names
    assert not seen.names & WITHOUT_REPEATABLE_KERNEL


@pytest.mark.usefixtures("_global_flags")
def test_an_operator_without_a_repeatable_kernel_is_named(patterns, weights, tmp_path, monkeypatch):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora")
    embed = trainer.learner.model.embed

    def putting(pixels):
        return embed(pixels).put_(torch.tensor([0]), torch.zeros(1))

    monkeypatch.setattr(trainer.learner.model, "embed", putting)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(TrainingError, match="PyTorch's put_ has no repeatable kernel on this device"):
        trainer.run()


@pytest.mark.parametrize("unit", [None, "avx512_fp16", "amx_fp16"])
def test_float16_without_float16_arithmetic_is_said(monkeypatch, caplog, unit):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx512_fp16": False, unit: True})
    assert devices.pick_amp("fp16", CPU) == "fp16"
    warned = "--amp fp16: this processor has no float16 arithmetic" in caplog.text
    assert warned == (unit is None) and ("--amp bf16" in caplog.text) == warned
    caplog.clear()
    assert devices.pick_amp("auto", CPU) == "bf16" and devices.pick_amp("off", CPU) == "off"
    assert not caplog.text


class Machine:
    """A process of a machine as `own_device` sees it: the GPUs that it sees, and those that other processes took."""

    def __init__(self, monkeypatch, gpus, local, processes_here, taken=()):
        self.now = None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=gpus[d.index or 0]))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(self, "now", device))
        monkeypatch.setattr(processes, "count", lambda: 1 + len(taken))
        others = [gpu and (platform.node(), gpu) for gpu in taken]
        monkeypatch.setattr(processes, "gathered", lambda own: [*others, own])
        monkeypatch.setattr(processes, "together", lambda do: do())
        monkeypatch.setattr(processes, "on_this_machine", lambda: (local, processes_here))


def test_each_of_several_processes_takes_a_gpu_of_its_own(monkeypatch):
    machine = Machine(monkeypatch, ["a", "b"], 1, 2, taken=["a"])
    assert own_device("auto") == machine.now == torch.device("cuda:1")
    machine = Machine(monkeypatch, ["b"], 1, 2, taken=["a"])  # as a scheduler hands them out
    assert own_device("cuda") == machine.now == torch.device("cuda:0")
    machine = Machine(monkeypatch, ["a", "b"], 0, 1, taken=["of another machine"])
    assert own_device("cuda:1") == torch.device("cuda:1") and machine.now is None
    Machine(monkeypatch, [], 1, 2, taken=[None])
    assert own_device("auto") == CPU
    Machine(monkeypatch, ["a"], 0, 1)
    assert own_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("gpus", "local", "taken", "found"),
    [
        (["a"], 1, ["a"], "2 have 1"),
        (["a", "b"], 3, ["a", "b", "a"], "4 have 2"),
    ],
)
def test_two_processes_with_one_gpu_are_refused(monkeypatch, gpus, local, taken, found):
    """nccl would say it behind the first step."""
    Machine(monkeypatch, gpus, local, len(taken) + 1, taken)
    with pytest.raises(
        ArgumentError, match=f"^--device: each process needs a GPU of its own, and {found} between them: "
    ):
        own_device("auto")
    with pytest.raises(ArgumentError, match=r"^--device cuda:0 is one GPU for \d processes: leave it out"):
        own_device("cuda:0")


@pytest.mark.parametrize(("gpus", "taken"), [(["a"], [None]), ([], ["a"])])
def test_processes_with_and_without_a_gpu_are_refused(monkeypatch, gpus, taken):
    """They would wait for each other, in groups of different backends."""
    Machine(monkeypatch, gpus, 0, 1, taken)
    with pytest.raises(
        ArgumentError, match="^--device: 1 of 2 processes have a GPU; all need one, or take --device cpu$"
    ):
        own_device("auto")


def test_a_gpu_of_the_same_name_on_another_machine_is_another_one(monkeypatch):
    Machine(monkeypatch, ["a"], 0, 1)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lambda own: [("elsewhere", "a"), own])
    assert own_device("auto").type == "cuda"


def test_what_nccl_says_of_one_gpu_for_two_is_said_in_words():
    said = "NCCL error in: x.cpp:93, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on 50"
    with pytest.raises(ProcessError, match="^each process needs a GPU of its own: Duplicate GPU detected : rank 1"):
        with processes._reaching_others():
            raise torch.distributed.DistBackendError(said)
    with pytest.raises(ProcessError, match="^NCCL error in: x, invalid usage: more$"):
        with processes._reaching_others():
            raise torch.distributed.DistBackendError("NCCL error in: x, invalid usage\nLast error:\nmore")
