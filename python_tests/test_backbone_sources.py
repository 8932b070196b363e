"""What --backbone may name: timm's old names, slips, repositories of the hub, folders; and --image-size."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from janus_ext import inject
from janus_ext.backbone import EMBEDDED, load_backbone, prepare_torchvision
from janus_ext.backbone.loading import weight_file
from janus_ext.backbone.sources import find_source, similar_names
from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.train import main

NAME = "test_vit"  # timm's smallest: 160 pixels, patches of 16, width 64, 6 blocks, 2 heads


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A random network with a classifier for 5 classes."""
    prepare_torchvision()
    import timm

    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=5).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """What timm saves of a model for its hub: config.json and model.safetensors."""
    cfg = {"num_classes": 5, "classifier": "head", "first_conv": "patch_embed.proj", "not_timms": 1}
    cfg |= {"input_size": [3, 160, 160], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    config = {"architecture": NAME, "num_classes": 5, "num_features": 64, "pretrained_cfg": cfg}
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(source.state_dict(), path / "model.safetensors")
    return path


def change(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_holds(loaded: nn.Module, source: nn.Module) -> None:
    wanted = {key: value for key, value in source.state_dict().items() if not key.startswith("head.")}
    found = loaded.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def refused(error: type[Exception], name: str, *arguments) -> str:
    """The one line with which a backbone is refused, behind the name of the function."""
    with pytest.raises(error) as caught:
        load_backbone(name, *arguments)
    line = str(caught.value)
    assert "\n" not in line and f"--backbone {name}" in line
    return line.removeprefix("load_backbone: ")


# names ---------------------------------------------------------------------------------------------------------------
def test_an_old_name_of_timm_takes_the_file_that_the_new_name_takes(tmp_path):
    new = load_backbone("vit_tiny_patch16_224.augreg_in21k", "none")
    state = new.state_dict() | {"head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)}
    save_file(state, tmp_path / "vit.safetensors")
    old = load_backbone("vit_tiny_patch16_224_in21k", str(tmp_path / "vit.safetensors"))
    assert_holds(old, new)
    assert (old.input_mean, old.input_std) == (new.input_mean, new.input_std) == ((0.5,) * 3, (0.5,) * 3)


def test_every_old_name_is_resolved_or_said_to_be_gone():
    prepare_torchvision()
    import timm

    for old, new in timm.models.get_deprecated_models().items():
        if new is None:
            assert "has removed that model" in refused(ArgumentError, old)
        elif "." in new and new not in timm.list_models(new.partition(".")[0], include_tags=True):  # timm's own slip
            assert "has no such weights; it has " in refused(ArgumentError, old)
        else:
            assert find_source(old).architecture == new


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("vit_smal_patch16_224.augreg_in21k", "vit_small_patch16_224"),
        ("ViT-B/16", "vit_base_patch16_224"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("ViT-L/14@336px", "vit_large_patch14_clip_336"),
        ("DeiT-S", "deit_small_patch16_224"),
        ("dino_vits16", "vit_small_patch16_224.dino"),
        ("dinov2_vits14", "vit_small_patch14_dinov2"),
        ("facebook/dinov2-base", "vit_base_patch14_dinov2"),
        ("google/vit-base-patch16-224-in21k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224_in22k", "vit_base_patch16_224.augreg_in21k"),
        ("emoij", "emoji"),
    ],
)
def test_a_name_with_a_slip_or_in_the_fields_spelling_is_answered_with_timms(name, meant):
    assert meant in similar_names(name)
    assert "has no such model; similar: " in refused(ArgumentError, name)


def test_an_unknown_model_is_answered_with_similar_names():
    with pytest.raises(ArgumentError, match="similar: .*dinov2"):
        load_backbone("patch14_dinov2")
    with pytest.raises(ArgumentError, match="test_vit.other: timm .* has no such weights; it has test_vit.r160_in1k"):
        load_backbone("test_vit.other")
    assert refused(ArgumentError, "zzz").endswith(" has no such model")
    wanted = "a repository of the hub is hf-hub:owner/zzz, a folder local-dir:owner/zzz"
    assert refused(ArgumentError, "owner/zzz").endswith(wanted)


# folders and the hub -------------------------------------------------------------------------------------------------
def test_a_folder_of_timms_layout_is_a_backbone(folder, source, tmp_path, monkeypatch):
    for name in (f"local-dir:{folder}", str(folder)):
        loaded = load_backbone(name)
        assert_holds(loaded, source)
        assert (loaded.input_mean, loaded.input_size) == ((0.1, 0.2, 0.3), 160)
    monkeypatch.chdir(folder)
    assert_holds(load_backbone("local-dir:."), source)
    assert_holds(load_backbone("./"), source)
    monkeypatch.chdir(folder.parent)
    assert_holds(load_backbone("model"), source)


def test_a_folder_whose_name_begins_like_the_hubs_is_known_by_its_weights(folder, source, tmp_path, monkeypatch):
    (tmp_path / "hf-hub-models").mkdir()
    folder.rename(tmp_path / "hf-hub-models" / "vit")
    monkeypatch.chdir(tmp_path)
    assert_holds(load_backbone("hf-hub-models/vit"), source)
    assert weight_file("hf-hub-models/vit", "pretrained") == Path("hf-hub-models/vit/model.safetensors")


def test_a_weight_file_may_be_a_path(folder, source):
    assert_holds(load_backbone(NAME, folder / "model.safetensors"), source)


def test_weights_beside_a_folder_win_and_random_ones_are_made(folder, source, tmp_path):
    other = {key: value + 1 for key, value in source.state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    loaded = load_backbone(str(folder), str(tmp_path / "other.pth"))
    assert torch.equal(loaded.cls_token, source.cls_token + 1) and loaded.input_mean == (0.1, 0.2, 0.3)
    assert not torch.equal(load_backbone(str(folder), "none").cls_token, source.cls_token)


def test_a_folder_with_a_pickle_and_the_old_flat_description(folder, source):
    (folder / "model.safetensors").unlink()
    torch.save({"model_state_dict": source.state_dict()}, folder / "pytorch_model.bin")
    described = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    (folder / "config.json").write_text(json.dumps({"architecture": NAME} | described))
    loaded = load_backbone(str(folder))
    assert_holds(loaded, source)
    assert loaded.input_mean == (0.1, 0.2, 0.3)


def test_a_folder_may_describe_another_size(folder, source):
    small = load_backbone(NAME, "none", image_size=64)
    save_file(small.state_dict(), folder / "model.safetensors")
    change(folder, model_args={"img_size": 64})
    loaded = load_backbone(str(folder))
    assert loaded.input_size == 64 and torch.equal(loaded.pos_embed, small.pos_embed)
    assert load_backbone(str(folder), image_size=96).pos_embed.shape == (1, 1 + 6 * 6, 64)


def test_folders_that_are_no_backbone(folder, source, tmp_path):
    name = f"local-dir:{folder}"
    for nothing in ("local-dir:", "hf-hub:"):
        assert "names nothing: wanted hf-hub:owner/name or local-dir:FOLDER" in refused(ArgumentError, nothing)
    assert f"{tmp_path} is no folder with a config.json" in refused(CheckpointError, f"local-dir:{tmp_path}")
    state = {key: value for key, value in source.state_dict().items() if key != "norm.bias"}
    save_file(state, folder / "model.safetensors")
    assert refused(CheckpointError, name).endswith("missing: norm.bias")
    (folder / "model.safetensors").unlink()
    wanted = f"{folder} is no folder with a model.safetensors or pytorch_model.bin"
    assert wanted in refused(CheckpointError, name)
    change(folder, architecture="ViTForImageClassification")
    assert "\"architecture\" is 'ViTForImageClassification', and timm" in refused(CheckpointError, name)
    (folder / "config.json").write_text('{"architectures": ["ViTModel"]}')
    assert 'config.json is no description of timm\'s: its "architecture" is None' in refused(CheckpointError, name)
    change(folder, architecture=["x"])
    assert "\"architecture\" is ['x'], and timm" in refused(CheckpointError, name)
    change(folder, architecture=NAME, pretrained_cfg={"classifier": 5})
    assert refused(CheckpointError, name).endswith("must be a name or a list of names")
    change(folder, pretrained_cfg={}, model_args={"features_only": True})
    assert "it is no classifier of timm's: it lacks" in refused(CheckpointError, name, "none")
    change(folder, model_args={}, pretrained_cfg=3)
    assert '"pretrained_cfg" and "model_args" in' in refused(CheckpointError, name)
    change(folder, pretrained_cfg={}, model_args={"depth": "many"})
    assert "timm cannot make the network that its config.json describes (" in refused(CheckpointError, name, "none")
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(CheckpointError, name)


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> str:
    """A repository in the hub's local cache, where no hub is in reach."""
    cache = tmp_path / "cache"
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return "hf-hub:owner/name"


def test_a_repository_of_the_hub_is_a_backbone(cached, source, tmp_path):
    loaded = load_backbone(cached)
    assert_holds(loaded, source)
    assert loaded.input_mean == (0.1, 0.2, 0.3)
    [weights] = (tmp_path / "cache").rglob("model.safetensors")
    torch.save(source.state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert_holds(load_backbone(cached), source)


def test_numbers_that_are_none_are_named_in_what_the_hub_gives(cached, source, tmp_path):
    [repository] = (tmp_path / "cache").iterdir()
    repository.rename(repository.with_name("models--timm--test_vit.r160_in1k"))
    assert_holds(load_backbone(NAME), source)
    [weights] = (tmp_path / "cache").rglob("model.safetensors")
    save_file(source.state_dict() | {"norm.bias": torch.full((64,), torch.nan)}, weights)
    assert "timm/test_vit.r160_in1k holds NaN or infinity in norm.bias" in refused(CheckpointError, NAME)


def test_without_a_network_one_line_says_what_was_tried(cached):
    assert refused(CheckpointError, NAME) == (
        "--backbone test_vit --weights pretrained: timm/test_vit.r160_in1k is neither in the local cache "
        "nor to be had from http://127.0.0.1:9; --weights FILE takes a local file (.safetensors, .pth, .npz), "
        "--backbone emoji is embedded"
    )
    for weights in ("pretrained", "none"):
        assert refused(CheckpointError, "hf-hub:timm/zzz", weights) == (
            "--backbone hf-hub:timm/zzz: timm/zzz is neither in the local cache nor to be had from "
            "http://127.0.0.1:9; --backbone local-dir:FOLDER takes a copy on this machine"
        )
    assert not constants.HF_HUB_OFFLINE


def test_what_the_hub_says_becomes_one_line(cached, monkeypatch):
    import huggingface_hub

    def answer(error: Exception) -> str:
        def raises(*arguments, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", raises)
        return refused(CheckpointError, "hf-hub:owner/zzz")

    missing = errors.EntryNotFoundError("404 Client Error.\n\nEntry Not Found for url")
    assert "owner/zzz has no config.json" in answer(missing)
    assert "owner/zzz gave nothing (Repo id must be" in answer(errors.HFValidationError("Repo id must be\nshort"))


# image size ----------------------------------------------------------------------------------------------------------
def resized(position: Tensor, side: int) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    with torch.no_grad():
        return resample_abs_pos_embed(position, new_size=[side, side], num_prefix_tokens=1)


def test_an_image_size_of_ones_own_resizes_the_position_embeddings(folder, source):
    loaded = load_backbone(str(folder), image_size=96)
    assert loaded.input_size == 96 and torch.equal(loaded.pos_embed, resized(source.pos_embed, 6))
    model = ContinualClassifier(loaded).eval()
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        found = model.features(images)
        assert torch.equal(found, model.embed((images - model.mean) / model.std)) and found.shape == (2, 64)


def test_dinov2_runs_at_other_sizes_than_its_own():
    model = load_backbone("vit_small_patch14_dinov2", "none", image_size=56)
    assert model.input_size == 56 and model.pos_embed.shape == (1, 1 + 4 * 4, 384)
    assert inject(model, rank=2)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 56, 56)).isfinite().all()


def test_the_embedded_backbone_at_another_size():
    model, usual = load_backbone(image_size=32), load_backbone()
    assert (model.input_size, usual.input_size) == (32, 64)
    assert torch.equal(model.pos_embed, resized(load_file(EMBEDDED)["pos_embed"].float(), 4))
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert ContinualClassifier(model).features(images).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("emoji", 60, "it must be a multiple of its patches' 8 pixels, such as 64"),
        ("vit_tiny_patch16_224", 225, "it must be a multiple of its patches' 16 pixels, such as 224"),
        ("vit_tiny_patch16_224", 8, "it must be a multiple of its patches' 16 pixels, such as 16"),
        ("test_resnet", 64, "this network takes no other size than its own"),
        (
            "levit_128s",
            100,
            "The size of tensor a (49) must match the size of tensor b (36)",
        ),
    ],
)
def test_an_image_size_that_does_not_suit_the_network_is_refused(name, size, reason):
    line = refused(ArgumentError, name, "none", size)
    assert line.startswith(f"--image-size {size} does not suit --backbone {name}: {reason}")


def test_trying_an_image_size_draws_no_random_numbers():
    torch.manual_seed(3)
    first = load_backbone(NAME, "none", image_size=160).pos_embed
    torch.manual_seed(3)
    assert torch.equal(load_backbone(NAME, "none").pos_embed, first)


def test_the_command_trains_at_another_image_size_and_resumes_at_that_alone(tmp_path, capsys):
    flags = f"--tasks 2 --limit-per-class 1 --epochs 1 --batch-size 100 --no-plots --output {tmp_path}/run".split()
    assert main([*flags, "--image-size", "16"]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["image_size"] == 16
    saved = load_file(tmp_path / "run" / "checkpoints" / "model.safetensors")
    assert saved["backbone.pos_embed"].shape[1] == 1 + 2 * 2
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 2
    assert "--image-size 16 (asked: left out)" in capsys.readouterr().err
    assert main([*flags, "--image-size", "0"]) == 2
    assert "--image-size must lie in [1, 13376], got 0" in capsys.readouterr().err
