"""torchvision, timm and transformers beside a torch without CUDA, in processes that have not imported them yet."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the package index gives beside a CPU torch, on any machine: no library of torchvision's, and no operator of it.
WITHOUT_LIBRARY = """
import torch
assert not hasattr(torch.ops.torchvision, "nms")
torch.version.cuda, load = None, torch.ops.load_library
def load_library(path):
    if "torchvision" in str(path):
        raise OSError(f"{path}: libcudart.so.13: cannot open shared object file")
    load(path)
torch.ops.load_library = load_library
"""
TORCHVISION = "import torchvision.transforms as T; assert T.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)\n"
TIMM = "import timm; assert timm.create_model('test_vit')(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)\n"
TRANSFORMERS = """
from transformers import ViTConfig, ViTImageProcessor, ViTModel
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
assert ViTModel(config)(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 5, 8)
"""


def run(code: str) -> None:
    """Runs it beside a torch without CUDA and a torchvision whose library does not load."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_LIBRARY + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_shim_before_them_lets_them_import_and_compute():
    transformers = TRANSFORMERS if importlib.util.find_spec("transformers") else ""
    run(f"import janus_ext.torchvision_shim\n{transformers}{TIMM}{TORCHVISION}")


def test_the_operators_are_declared_once_and_what_another_declared_stays():
    run(
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "from janus_ext.backbone import prepare_torchvision\n"
        "prepare_torchvision(); import janus_ext.torchvision_shim; prepare_torchvision()\n" + TORCHVISION
    )


def test_as_a_start_up_file_it_serves_a_program_that_does_not_know_of_it(tmp_path):
    (tmp_path / "janus_ext_torchvision.pth").write_text("import janus_ext.torchvision_shim\n")
    run(f"import site; site.addsitedir({str(tmp_path)!r})\n{TORCHVISION}")


def test_the_command_needs_no_preparation() -> None:
    """A process of its own: here somebody has prepared torchvision already."""
    call = [sys.executable, "-m", "janus_ext.train", "--backbone", "vit_smal_patch16_224", "--tasks", "2"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("janus_ext.train: --backbone vit_smal_patch16_224: timm ")
    assert done.stderr.count("\n") == 1 and "vit_small_patch16_224" in done.stderr
