"""Backbones: colours, weight files of every kind, and one line for each way in which a file can be wrong."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from janus_ext import assembly, inject, train
from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import ArgumentError, CheckpointError

NAME = "test_vit"  # timm's smallest: 160 pixels, patches of 16, width 64, 6 blocks, 2 heads


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A random ViT with a classifier for 5 classes; no two of its parameters are alike."""
    return make("test_vit", num_classes=5)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)


def make(name: str, **options) -> nn.Module:
    prepare_torchvision()
    import timm

    torch.manual_seed(1)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(pixels), pre_logits=True)


def assert_same_features(loaded: nn.Module, source: nn.Module, images: Tensor) -> None:
    pixels = images / 255
    with torch.no_grad():
        assert torch.allclose(features(loaded.eval(), pixels), features(source, pixels), atol=1e-5)
    assert loaded.num_classes == 0


def jax_layout(model: nn.Module, big_vision: bool) -> dict[str, np.ndarray]:
    """The arrays of a JAX checkpoint: a block each (augreg), or all blocks stacked (big_vision)."""

    def turned(weight: Tensor) -> Tensor:
        return weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T

    attention, ffn, norm = ("0", "0", "1") if big_vision else ("1", "3", "2")
    attention, ffn = f"MultiHeadDotProductAttention_{attention}", f"MlpBlock_{ffn}"
    heads = model.blocks[0].attn.num_heads

    def block(part: nn.Module) -> dict[str, Tensor]:
        width = part.attn.proj.weight.shape[0]
        arrays = {
            f"{attention}/out/kernel": part.attn.proj.weight.T.reshape(heads, width // heads, width),
            f"{attention}/out/bias": part.attn.proj.bias,
        }
        weights, biases = part.attn.qkv.weight.chunk(3), part.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, width // heads)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, width // heads)
        for name, layer in (("LayerNorm_0", part.norm1), (f"LayerNorm_{norm}", part.norm2)):
            arrays |= {f"{name}/scale": layer.weight, f"{name}/bias": layer.bias}
        for name, layer in (("Dense_0", part.mlp.fc1), ("Dense_1", part.mlp.fc2)):
            arrays |= {f"{ffn}/{name}/kernel": layer.weight.T, f"{ffn}/{name}/bias": layer.bias}
        return arrays

    arrays = {
        "embedding/kernel": turned(model.patch_embed.proj.weight),
        "embedding/bias": model.patch_embed.proj.bias,
        "cls": model.cls_token,
        "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "Transformer/encoder_norm/scale": model.norm.weight,
        "Transformer/encoder_norm/bias": model.norm.bias,
        "head/kernel": turned(model.head.weight),
        "head/bias": model.head.bias,
    }
    blocks = [block(part) for part in model.blocks]
    if big_vision:
        arrays |= {f"Transformer/encoderblock/{key}": torch.stack([b[key] for b in blocks]) for key in blocks[0]}
    else:
        arrays |= {f"Transformer/encoderblock_{i}/{key}": b[key] for i, b in enumerate(blocks) for key in b}
    prefix = "params/" if big_vision else ""
    return {prefix + key: value.detach().numpy() for key, value in arrays.items()}


# colours -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", ["identity", "model"])
def test_colours_reach_the_backbone_as_asked_for(weights, normalize):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    backbone = load_backbone("emoji", str(weights)).eval()
    model = ContinualClassifier(backbone, normalize=normalize).eval()
    mean, std = (0.5, 0.25) if normalize == "model" else (0.0, 1.0)
    assert torch.allclose(model.features(images), features(backbone, (images / 255 - mean) / std), atol=1e-5)


def test_colours_of_another_kind_are_refused(weights):
    with pytest.raises(ArgumentError, match="normalize must be 'model' or 'identity', got 'auto'"):
        ContinualClassifier(load_backbone("emoji", str(weights)), normalize="auto")


# files ---------------------------------------------------------------------------------------------------------------
def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


WRAPPED = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "averaged": lambda state: {"state_dict": zeros(state), "state_dict_ema": state},
    "options": lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
    "parallel": lambda state: {"state_dict": under("module.", state)},
    "compiled": lambda state: {"model": under("module._orig_mod.", state)},
    "torch": lambda state: {
        "model_state_dict": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "lightning": lambda state: {"state_dict": under("model.", state) | {"loss.weight": torch.ones(5)}, "epoch": 3},
    "lightning, compiled": lambda state: {"state_dict": under("net._orig_mod.", state), "loops": {"state": {}}},
    "encoder": lambda state: under("encoder.", state) | {"decoder.weight": torch.ones(2)},
    "backbone and head": lambda state: under("backbone.", state) | {"fc.weight": torch.ones(2, 64)},
    "network": lambda state: {"network": under("module.network.", state), "step": 3},
    "teacher": lambda state: {
        "student": under("module.backbone.", zeros(state)) | {"module.head.weight": torch.ones(2)},
        "teacher": under("backbone.", state) | {"head.weight": torch.ones(2)},
    },
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_pytorch_checkpoints_are_read(source, images, tmp_path, wrap):
    torch.save(WRAPPED[wrap](source.state_dict()), tmp_path / "vit.pth")
    assert_same_features(load_backbone(NAME, str(tmp_path / "vit.pth")), source, images)


def test_of_two_networks_that_fit_neither_is_guessed(source, written):
    state = source.state_dict()
    path = written({"state_dict": under("base_encoder.", state) | under("momentum_encoder.", state)})
    networks = "state_dict.base_encoder., state_dict.momentum_encoder."
    assert refusal(NAME, path).endswith(f"holds several such networks: {networks}; save the one you mean by itself")


def test_what_a_wrapped_network_lacks_is_named(source, written):
    state = {key: value for key, value in source.state_dict().items() if key != "blocks.2.norm1.bias"}
    assert refusal(NAME, written(under("model.", state))).endswith("missing: blocks.2.norm1.bias")


def test_safetensors_are_read_and_not_kept(source, images, tmp_path):
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    loaded = load_backbone(NAME, str(tmp_path / "vit.safetensors"))
    assert_same_features(loaded, source, images)
    assert "state_dict" not in loaded.pretrained_cfg


@pytest.mark.parametrize("big_vision", [False, True])
def test_jax_checkpoints_are_read(source, images, tmp_path, big_vision):
    np.savez(tmp_path / "vit.npz", **jax_layout(source, big_vision))
    assert_same_features(load_backbone(NAME, str(tmp_path / "vit.npz")), source, images)


@pytest.mark.parametrize("ending, options", [("pth", {}), ("npz", {"interpolation": "bilinear", "antialias": False})])
def test_position_embeddings_of_another_resolution_are_resized_as_timm_does(tmp_path, ending, options):
    small = make(NAME, num_classes=5, img_size=64)
    torch.save(small.state_dict(), tmp_path / "vit.pth")
    np.savez(tmp_path / "vit.npz", **jax_layout(small, big_vision=False))
    loaded = load_backbone(NAME, str(tmp_path / f"vit.{ending}"))

    from timm.layers import resample_abs_pos_embed

    with torch.no_grad():
        wanted = resample_abs_pos_embed(small.pos_embed, new_size=[10, 10], num_prefix_tokens=1, **options)
    assert loaded.pos_embed.shape == (1, 1 + 10 * 10, 64) and torch.equal(loaded.pos_embed, wanted)
    as_small = load_backbone(NAME, str(tmp_path / f"vit.{ending}"), image_size=64)
    assert torch.equal(as_small.pos_embed, small.pos_embed) and as_small.input_size == 64


def test_a_backbone_file_describes_itself(weights):
    model = load_backbone("emoji", str(weights))
    assert model.input_size == 32 and model.input_std == (0.25, 0.25, 0.25)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert isinstance(model.patch_drop, torch.nn.Identity)


def test_random_weights_of_a_timm_model_and_resized_images():
    model = ContinualClassifier(load_backbone(NAME, "none"))
    model.add_task(3)
    model.add_task(2)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert model.features(images).shape == (2, 64) and model(images).shape == (2, 5)


def test_the_command_trains_a_timm_model_of_a_file(source, tmp_path, monkeypatch):
    made = []

    def watched(*arguments) -> ContinualClassifier:
        made.append(ContinualClassifier(*arguments))
        return made[-1]

    monkeypatch.setattr(assembly, "ContinualClassifier", watched)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    flags = f"--backbone {NAME} --weights {tmp_path}/vit.safetensors --normalize identity --tasks 2"
    trial = f"--limit-per-class 1 --epochs 1 --batch-size 100 --no-plots --output {tmp_path}/run"
    assert train.main([*flags.split(), *trial.split()]) == 0
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["accuracy_matrix"]) == 2
    saved = load_file(tmp_path / "run" / "checkpoints" / "model.safetensors")
    assert torch.equal(saved["backbone.cls_token"], source.cls_token)
    assert not made[0].mean.any() and (made[0].std == 255).all()  # identity


# errors: each is one line --------------------------------------------------------------------------------------------
class Code:
    """What a pickle can be made to run."""

    def __reduce__(self):
        return os.system, ("echo must not run",)


def refusal(name: str, path: Path | str) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_backbone(name, str(path))
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and len(line) < 300 + len(str(path))
    return line


@pytest.fixture
def written(tmp_path):
    """Saves anything with ``torch.save`` and returns where."""

    def write(state: object, name: str = "vit.pth") -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return write


def test_a_missing_file_is_named(tmp_path):
    assert "no such file" in refusal(NAME, tmp_path / "nowhere.pth")
    assert "no regular file" in refusal("emoji", tmp_path)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "npz"])
def test_damaged_files_are_named(source, tmp_path, ending):
    path = tmp_path / f"vit.{ending}"
    writers = {"safetensors": save_file, "pth": torch.save}
    if ending == "npz":
        np.savez(path, **jax_layout(source, big_vision=False))
    else:
        writers[ending](source.state_dict(), path)
    whole = path.read_bytes()
    wanted = {"npz": "cannot be read as .npz", "safetensors": "cannot be read as safetensors"}
    for content in (whole[:-500], whole[:100], b"", b"no weights\n" * 20):
        path.write_bytes(content)
        assert wanted.get(ending, "is truncated or not a PyTorch checkpoint") in refusal(NAME, path)


def test_a_damaged_array_of_a_jax_checkpoint_is_noticed(source, tmp_path):
    path = tmp_path / "vit.npz"
    np.savez(path, **jax_layout(source, big_vision=False))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "cannot be read as .npz: Bad CRC-32" in refusal(NAME, path)


def test_a_pickle_with_code_is_refused(source, written, capfd):
    for state in ({"x": Code()}, source):
        assert "needs code to be loaded and is refused: it must hold tensors only" in refusal(NAME, written(state))
    assert "must not run" not in capfd.readouterr().out


def test_what_holds_no_named_tensors_is_refused(written):
    assert "named tensors only, but others are epoch, teacher" in refusal(NAME, written({"epoch": 1, "teacher": {}}))
    assert "no tensor beside a classifier's" in refusal(NAME, written({"head.weight": torch.zeros(5, 64)}))
    assert "is truncated or not" in refusal(NAME, written([torch.zeros(2)]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_when_the_file_is_loaded(source, written, tmp_path, value):
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    state["head.weight"][0] = value  # a classifier is left out anyway
    assert load_backbone(NAME, str(written(state))) is not None
    state["blocks.1.attn.qkv.weight"][3, 2] = value
    wanted = "holds NaN or infinity in blocks.1.attn.qkv.weight: the weights are damaged"
    for path in (written(state), written({"state_dict": under("model.", state)}, "lightning.ckpt")):
        assert wanted in refusal(NAME, path)
    save_file({key: tensor.half() for key, tensor in state.items()}, tmp_path / "vit.safetensors")
    assert wanted in refusal(NAME, tmp_path / "vit.safetensors")
    arrays = jax_layout(source, big_vision=False)
    arrays["cls"] = np.full_like(arrays["cls"], value)
    np.savez(tmp_path / "vit.npz", **arrays)
    assert refusal(NAME, tmp_path / "vit.npz").endswith("in cls: the weights are damaged")


def test_wrong_shapes_are_named(source, written):
    state = source.state_dict() | {f"blocks.{i}.norm1.bias": torch.zeros(65) for i in range(5)}
    line = refusal(NAME, written(state))
    assert f"--backbone {NAME}: wrong shapes: blocks.0.norm1.bias wanted [64] found [65], blocks.1" in line
    assert line.endswith("and 2 more")


def test_missing_and_unexpected_tensors_are_named(source, written):
    state = {key: value for key, value in source.state_dict().items() if "mlp" not in key}
    state |= {"fc_norm.weight": torch.ones(64)}
    line = refusal(NAME, written(state))
    assert "missing: blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias, blocks.0.mlp.fc2.weight and 21 more" in line
    assert line.endswith("; unexpected: fc_norm.weight")


def test_what_timm_cannot_convert_is_refused(source, written):
    path = written(source.state_dict() | {"pos_embed": torch.zeros(1, 100, 64)})  # no position of a class token
    assert "timm cannot convert it (" in refusal(NAME, path)


def test_of_another_architecture_the_names_are_shown(written):
    path = written(make("test_resnet", num_classes=5).state_dict())
    line = refusal(NAME, path)
    assert "tensors has a name that belongs there: found conv1.0.weight, " in line
    assert line.endswith("; cls_token, pos_embed, patch_embed.proj.weight and 75 more were wanted")


def test_jax_checkpoints_that_do_not_fit(source, tmp_path):
    arrays = jax_layout(source, big_vision=False)
    path = tmp_path / "vit.npz"
    np.savez(path, **arrays)
    wide = (
        "does not fit --backbone vit_tiny_patch16_224: blocks, width and heads must be (12, 192, 3), found (6, 64, 2)"
    )
    assert wide in refusal("vit_tiny_patch16_224", path)
    np.savez(path, **{key: value for key, value in arrays.items() if not key.endswith("block_3/LayerNorm_2/bias")})
    assert (
        "timm cannot convert it (Transformer/encoderblock_3/LayerNorm_2/bias is not a file in the archive"
        in refusal(NAME, path)
    )
    np.savez(path, x=np.zeros(3))
    assert "found no encoder" in refusal(NAME, path)


def test_embedded_backbones_that_do_not_fit(weights, tmp_path):
    truncated = tmp_path / "short.safetensors"
    truncated.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read as safetensors" in refusal("emoji", truncated)
    broken = tmp_path / "nan.safetensors"
    save_file(load_file(weights) | {"norm.bias": torch.full((32,), torch.nan)}, broken)
    assert "nan.safetensors holds NaN or infinity in norm.bias" in refusal("emoji", broken)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    assert "no vision transformer of this program: no 'architecture' in its metadata" in refusal("emoji", bare)
    metadata = {"architecture": json.dumps(ARCHITECTURE), "normalize": '{"mean": [0, 0, 0], "std": [1, 1, 1]}'}
    save_file(load_file(weights) | {"cls_token": torch.zeros(1, 1, 31)}, bare, metadata)
    assert refusal("emoji", bare).endswith("program: wrong shapes: cls_token wanted [1, 1, 32] found [1, 1, 31]")


def test_a_model_without_a_class_token_gives_what_it_pools():
    backbone = load_backbone("test_vit2", "none").eval()
    assert backbone.cls_token is None
    images = torch.randint(256, (2, 3, backbone.input_size, backbone.input_size), dtype=torch.uint8)
    model = ContinualClassifier(backbone)
    with torch.no_grad():
        assert_close(model.features(images), backbone((images.float() - model.mean) / model.std), torch.float32)


def test_models_of_another_kind_are_refused():
    with pytest.raises(ArgumentError, match="projections to q, k and v, got ResNet: it has no attention"):
        inject(make("test_resnet", num_classes=0), rank=2)


@pytest.mark.parametrize("name", ["nest_tiny", "swinv2_cr_tiny_ns_224", "swin_tiny_patch4_window7_224"])
def test_a_backbone_has_no_dropout_of_any_kind(name: str) -> None:
    """By default these have stochastic depth, or dropout in the network of their positions."""
    model = load_backbone(name, "none").train()
    rates = [getattr(m, rate, 0.0) for m in model.modules() for rate in ("p", "drop_prob", "prob")]
    assert len(rates) > 0 and not any(rates)


def test_training_mode_draws_nothing() -> None:
    model = load_backbone("swin_tiny_patch4_window7_224", "none").train()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.forward_features(image), model.forward_features(image))
