"""Weight files of every odd kind: refused in a line that names them, never a traceback, never other weights."""

import json
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_backbone import jax_layout, make
from torch import Tensor

from janus_ext.backbone import load_backbone
from janus_ext.backbone.loading import EMBEDDED
from janus_ext.backbone.network import make_vision_transformer
from janus_ext.errors import CheckpointError

NAME = "test_vit"  # timm's smallest
LAYER = "blocks.0.attn.qkv.weight"
FLIPS = int(os.environ.get("JANUS_EXT_FLIPS", "25"))
QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return load_backbone(NAME, "none").state_dict()


def refusal(name: str, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_backbone(name, str(path))
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


ODD_TENSORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "complex": (lambda w: w.to(torch.complex64), "which is complex64"),
    "conjugated": (lambda w: w.to(torch.complex64).conj(), "which is complex64"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "which is float8_e4m3fn"),
    "float4": (lambda w: torch.zeros(w.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
    "int8": (lambda w: w.to(torch.int8), "floating-point weights, got integers"),
    "bool": (lambda w: w > 0, "floating-point weights, got integers"),
    "sparse": (lambda w: w.to_sparse(), "which is not dense"),
    "csr": (lambda w: w.to_sparse_csr(), "which is not dense"),
    "nested": (lambda w: torch.nested.nested_tensor([w[0], w[1, :3]]), "which is not dense"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "which is not dense"),
    "meta": (lambda w: w.to("meta"), "which has no numbers"),
    "without memory": (
        lambda w: torch.zeros(1).as_strided((10**7, 10**7), (0, 0)),
        r"\[10000000, 10000000\] in 4 bytes",
    ),
    "beyond float32": (lambda w: w.double() * 1e200, "NaN or infinity"),
    "number": (lambda w: torch.tensor(1.0), r"wrong shapes: .* found \[\]"),
    "none": (lambda w: None, "missing"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, whose odd tensors are not finished
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_of_an_odd_kind(state, tmp_path, kind):
    make, said = ODD_TENSORS[kind]
    torch.save(state | {LAYER: make(state[LAYER])}, tmp_path / "x.pth")
    message = refusal(NAME, tmp_path / "x.pth")
    assert LAYER in message and re.search(said, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_of_another_width_is_taken(state, tmp_path, dtype):
    torch.save(state | {LAYER: state[LAYER].to(dtype)}, tmp_path / "x.pth")
    assert torch.equal(load_backbone(NAME, str(tmp_path / "x.pth")).state_dict()[LAYER], state[LAYER].to(dtype).float())


def test_a_dictionary_that_holds_itself(state, tmp_path):
    for key in ("state_dict", "network"):
        checkpoint: dict[str, Any] = {}
        checkpoint[key] = checkpoint
        torch.save(checkpoint, tmp_path / "x.pth")
        refusal(NAME, tmp_path / "x.pth")
    checkpoint |= {f"{key}.{name}": tensor for name, tensor in state.items()}
    torch.save(checkpoint, tmp_path / "x.pth")
    assert torch.equal(load_backbone(NAME, str(tmp_path / "x.pth")).state_dict()[LAYER], state[LAYER])


def test_a_file_that_was_cut_off(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for size in (0, 1, 5_000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pth").write_bytes(whole[:size])
        assert "truncated or not a PyTorch checkpoint" in refusal(NAME, tmp_path / "x.pth")


ARRAYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "of the other byte order": ({QUERY: np.zeros((64, 2, 32), ">f4")}, "cannot be read as .npz: .*byte order"),
    "longer than double": ({QUERY: np.zeros((64, 2, 32), np.longdouble)}, "cannot be read as .npz: .*longdouble"),
    "of objects": ({QUERY: np.array([None])}, "cannot be read as .npz: Object arrays"),
    "a number": ({QUERY: np.zeros((), "f4")}, r"must have queries \[width, heads, d\], stacked or not, got \[\]"),
    "a row": ({QUERY: np.zeros(3, "f4")}, r"must have queries .* got \[3\]"),
    "of another network": ({QUERY: np.zeros((64, 2, 32), "f4")}, r"must be \(6, 64, 2\), found \(1, 64, 2\)"),
    "none": ({}, "found no encoder"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_of_an_odd_kind(tmp_path, kind):
    arrays, said = ARRAYS[kind]
    np.savez(tmp_path / "x.npz", **arrays)
    assert re.search(said, refusal(NAME, tmp_path / "x.npz"))


def test_a_checkpoint_under_the_name_of_another_kind(state, tmp_path):
    torch.save(state, tmp_path / "x.npz")
    assert "is no array" in refusal(NAME, tmp_path / "x.npz")
    torch.save(state, tmp_path / "x.safetensors")
    assert "cannot be read as safetensors" in refusal(NAME, tmp_path / "x.safetensors")
    assert "--backbone emoji takes its weights as .safetensors" in refusal("emoji", tmp_path / "x.npz")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, tuple[str, bytes]]:
    """By the ending of the file: whose weights it holds, and its bytes."""
    folder, source = tmp_path_factory.mktemp("sound"), make(NAME, num_classes=5)
    save_file(source.state_dict(), folder / "x.safetensors")
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, folder / "x.pth")
    np.savez(folder / "x.npz", **jax_layout(source, big_vision=False))
    found = {path.suffix: (NAME, path.read_bytes()) for path in folder.iterdir()}
    return found | {".emoji.safetensors": ("emoji", EMBEDDED.read_bytes())}


@pytest.mark.filterwarnings("ignore")  # of torch and timm, of what cannot be
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".npz", ".emoji.safetensors"])
def test_flipped_bytes_are_refused_or_give_other_numbers(sound, tmp_path, ending):
    """JANUS_EXT_FLIPS=1000 makes so many of them; half lie at the ends of the file, where it says what is in it."""
    name, whole = sound[ending]
    chance, refused = random.Random(ending), 0
    for _ in range(FLIPS):
        content, margin = bytearray(whole), min(len(whole), 6000)
        for _ in range(chance.choice((1, 1, 3))):
            places = chance.randrange(margin), -1 - chance.randrange(margin), chance.randrange(len(whole))
            content[chance.choice(places)] ^= chance.choice((1 << chance.randrange(8), chance.randrange(1, 256)))
        (tmp_path / f"x{ending}").write_bytes(content)
        try:
            load_backbone(name, str(tmp_path / f"x{ending}"))
        except CheckpointError as error:
            refused += 1
            assert str(tmp_path / "x") in str(error) and "\n" not in str(error)
    assert 0 < refused


# what describes the network -------------------------------------------------------------------------------------------
NETWORK = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
INPUT = {"mean": [0.5] * 3, "std": [0.2] * 3}
DESCRIPTIONS: list[tuple[Any, Any, str]] = [
    *((NETWORK | change, INPUT, "holds no vision transformer") for change in (
        {"num_heads": 0}, {"num_heads": 5}, {"patch_size": 0}, {"embed_dim": -1}, {"depth": -1}, {"img_size": -1},
        {"embed_dim": 1e30}, {"img_size": "16"}, {"weight_init": "x"}, {"act_layer": "os.system"}, {"nope": 1},
    )),
    *((network, INPUT, "holds no vision transformer") for network in ([], None, 5, "x")),
    *((NETWORK, INPUT | change, "mean and std must be three numbers each") for change in (
        {"mean": [1]}, {"mean": "abc"}, {"mean": [float("nan"), 1, 1]}, {"std": [1, 2, None]},
    )),
    *((NETWORK, INPUT | change, "mean must be from -1e6 to 1e6, and std from 1e-6 to 1e6") for change in (
        {"std": [0, 1, 1]}, {"std": [-1, 1, 1]}, {"std": [1e-300, 1, 1]}, {"mean": [1e300, 0, 0]},
    )),
    *((NETWORK, value, "holds no vision transformer") for value in ({}, [], 5, {"mean": [1] * 3})),
]  # fmt: skip


def described(path: Path, tensors: Mapping[str, Tensor], network: Any, normalize: Any) -> Path:
    metadata = {"architecture": json.dumps(network), "normalize": json.dumps(normalize)}
    save_file(dict(tensors), path, metadata)
    return path


@pytest.fixture(scope="module")
def own() -> dict[str, Tensor]:
    return make_vision_transformer(NETWORK).state_dict()


def test_the_description_that_fits_is_taken(own, tmp_path):
    model = load_backbone("emoji", str(described(tmp_path / "x.safetensors", own, NETWORK, INPUT)))
    assert model.input_size == 16 and model.input_std == (0.2, 0.2, 0.2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("network", "normalize", "said"), DESCRIPTIONS, ids=range(len(DESCRIPTIONS)))
def test_a_description_of_no_network(own, tmp_path, network, normalize, said):
    assert said in refusal("emoji", described(tmp_path / "x.safetensors", own, network, normalize))


@pytest.mark.parametrize(("dtype", "said"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "got integers")])
def test_weights_of_an_odd_kind_for_the_embedded_network(own, tmp_path, dtype, said):
    path = described(tmp_path / "x.safetensors", own | {LAYER: own[LAYER].to(dtype)}, NETWORK, INPUT)
    assert said in refusal("emoji", path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_read(tmp_path, make):
    make(tmp_path / "x.pth")
    for name in (NAME, "emoji"):
        assert "it is no regular file" in refusal(name, tmp_path / "x.pth")
