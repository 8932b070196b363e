"""Exports: what another program reads computes what the run does, and nothing is left of an export that fails."""

import importlib
import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, make_trainer
from exported import (
    EXPORTS,
    METHODS,
    PACKAGES,
    assert_untouched,
    contents_of,
    contents_on,
    needs,
    run_of,
    scores_of,
    state,
)
from learners import FIRST, SECOND, THIRD, learner_of
from PIL import Image, ImageOps
from torch import Tensor, nn

from janus_ext import ArgumentError, CheckpointError, export
from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.classifier import ContinualClassifier
from janus_ext.data.images import View, transform
from janus_ext.exports import card, folder, onnx, peft, pt2, timm, usage
from janus_ext.exports.contents import Contents
from janus_ext.runs.checkpoint import write_json


@pytest.fixture(scope="module")
def run(patterns, weights, tmp_path_factory) -> Path:
    return run_of("janus", patterns, weights, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def contents(run) -> Contents:
    return contents_of(run)


@pytest.fixture
def images(patterns) -> Tensor:
    return patterns.test.images


# the folder ----------------------------------------------------------------------------------------------------------
def test_what_a_killed_export_of_the_same_number_has_left_is_not_in_it(tmp_path):
    left = tmp_path / f".out.{os.getpid()}.tmp"
    (left / "task-9").mkdir(parents=True)
    (left / "model.onnx").touch()
    with folder.new_folder(tmp_path / "out") as made:
        (made / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


# what every format owes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXPORTS)
def test_the_lines_of_the_card_run_and_name_the_class(contents, weights, images, tmp_path, monkeypatch, capsys, name):
    needs(name)
    before = state(contents)
    whole = replace(
        contents, view=View(contents.model.input_size, 1.0), settings=contents.settings | {"weights": str(weights)}
    )
    EXPORTS[name](whole, tmp_path / "out" / "here")
    assert_untouched(contents, before)
    monkeypatch.chdir(tmp_path / "out" / "here")
    Path(weights.name).write_bytes(weights.read_bytes())
    held = Image.fromarray(images[0].permute(1, 2, 0).numpy()).transpose(Image.Transpose.ROTATE_90)
    exif = held.getexif()
    exif[0x0112] = 6  # the camera was held upright; whoever ignores that sees it lie on its side
    held.save("image.png", exif=exif)
    code = Path("README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()[-5:]
    best = scores_of(contents, images[:1])[0].sort(descending=True, stable=True)
    assert [line.split()[1] for line in lines] == [contents.class_names[index] for index in best.indices[:5]]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(best.values[:5].tolist(), abs=1.1e-3)
    assert [path.name for path in Path("..").iterdir()] == ["here"]


@pytest.mark.parametrize(
    "view", [(256 / 224,), (1.0, "bicubic", "squash"), (1.25, "bilinear", "squash")], ids=lambda view: str(view[-1])
)
def test_the_lines_of_a_card_show_images_as_the_model_saw_them(contents, tmp_path, monkeypatch, view):
    size = contents.model.input_size
    shown = replace(contents, view=View(size, *view))
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 90 * 50 * 3).reshape(50, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save("image.png")
    names = {"Image": Image, "ImageOps": ImageOps}
    exec(usage._image(shown), names)
    wanted = transform(shown.view, False)(Image.fromarray(ramp)).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(names["image"]).astype(int) - wanted).max() <= (2 if "squash" in view else 8)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_fails_leaves_nothing(contents, tmp_path, monkeypatch, name):
    needs(name)

    def fails(*_):
        raise CheckpointError("the last file cannot be written")

    monkeypatch.setattr(card, "write", fails)
    with pytest.raises(CheckpointError, match="the last file"):
        EXPORTS[name](contents, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EXPORTS)
def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path, capsys, name):
    """A file that may not grow stands for it: PyTorch's own writer ended the process."""
    needs(name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert export.main([str(run), "--format", name, "--output", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert "cannot be written: [Errno 27]" in message and len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_left_alone(contents, tmp_path):
    (tmp_path / "mine").write_text("x")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ArgumentError, match="--output must be a new or an empty folder, "):
            timm.export(contents, path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine").read_text() == "x"


def test_an_empty_folder_is_taken(contents, tmp_path):
    timm.export(contents, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxscript"), ("peft", "peft")])
def test_a_missing_package_is_one_line(run, tmp_path, monkeypatch, capsys, name, package):
    for other in PACKAGES[name]:
        if importlib.util.find_spec(other) is None:
            pytest.skip(f"{other} is not installed")
    monkeypatch.setitem(sys.modules, package, None)
    assert export.main([str(run), "--format", name, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"--format {name} needs {package}: pip install {package}, or" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("got", "passes"), [(1.00009, True), (1.0002, False), (float("nan"), False)])
def test_the_check_of_scores_can_fail(got, passes):
    wanted = torch.tensor([1.0, 1e-6])
    if passes:
        return folder.check_same("x", torch.tensor([got, 1e-6]), wanted, 1e-4)
    with pytest.raises(CheckpointError, match="x: it was wanted to 0.0001 of the largest"):
        folder.check_same("x", torch.tensor([got, 1e-6]), wanted, 1e-4)


# timm ----------------------------------------------------------------------------------------------------------------
def test_timm_takes_the_weights_and_the_folder_and_so_do_we(contents, images, tmp_path):
    prepare_torchvision()
    import timm as library

    timm.export(contents, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = str(tmp_path / "model.safetensors")
    called = library.create_model(
        config["architecture"], num_classes=6, checkpoint_path=weights, **config["model_args"]
    )
    in_folder = library.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert list(in_folder.pretrained_cfg["label_names"]) == list(contents.class_names)
    pixels = (images.float() - contents.model.mean) / contents.model.std
    wanted = scores_of(contents, images)
    for model in (called, in_folder):
        with torch.no_grad():
            assert_close(model.eval()(pixels).softmax(-1), wanted, torch.float32)
    again = ContinualClassifier(load_backbone(f"local-dir:{tmp_path}")).eval()
    assert again.input_size == 32
    assert_close(again.mean, contents.model.mean, torch.float32)
    with torch.no_grad():
        assert_close(again.features(images), contents.model.features(images), torch.float32)


@pytest.mark.parametrize(
    ("name", "size"), [("emoji", None), ("emoji", 96), ("test_vit", None), ("test_vit", 96), ("test_vit2", None)]
)
def test_timm_makes_the_same_network_at_any_size(tmp_path, name, size):
    contents = contents_on(load_backbone(name, "none", size))
    timm.export(contents, tmp_path / "first")
    loaded = load_backbone(f"local-dir:{tmp_path}/first").eval()
    assert loaded.input_size == contents.model.input_size
    again = contents_on(loaded)
    images = torch.randint(256, (2, 3, loaded.input_size, loaded.input_size), dtype=torch.uint8)
    with torch.no_grad():
        assert_close(again.model.features(images), contents.model.features(images), torch.float32)
    timm.export(again, tmp_path / "second")
    assert (
        json.loads((tmp_path / "second" / "config.json").read_text())["model_args"]
        == contents.model.backbone.description["options"]
    )


def of_timm(name: str, size: int, **options) -> nn.Module:
    """A network without classifier that timm made, and not `load_backbone`."""
    prepare_torchvision()
    import timm as library

    backbone = library.create_model(name, num_classes=0, **options)
    backbone.input_size, backbone.input_mean, backbone.input_std = size, (0.5,) * 3, (0.5,) * 3
    return backbone


@pytest.mark.parametrize("options", [{}, {"img_size": 64}])
def test_a_network_that_timm_made_elsewhere(tmp_path, options):
    timm.export(contents_on(of_timm("test_vit", options.get("img_size", 160), **options)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"] == options


def test_a_network_that_timm_s_name_does_not_tell_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"timm's test_vit with \{\} is another network than this: "):
        timm.export(contents_on(of_timm("test_vit", 160, depth=2)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# onnx and pt2 --------------------------------------------------------------------------------------------------------
def test_onnx_runtime_computes_the_same_scores(contents, images, tmp_path):
    needs("onnx")
    import onnx as library
    import onnxruntime

    onnx.export(contents, tmp_path)
    model = library.load(tmp_path / "model.onnx")
    library.checker.check_model(model)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 18
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list("fedcba")
    for batch in (images, images[:1]):
        [scores] = session.run(["scores"], {"images": batch.numpy()})
        assert (torch.from_numpy(scores) - scores_of(contents, batch)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 64, "num_heads": 4}),
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}),
    ],
)
def test_onnx_of_networks_whose_fused_attention_torch_does_not_translate(tmp_path, name, options):
    needs("onnx")
    onnx.export(contents_on(of_timm(name, 224, **options)), tmp_path)
    assert (tmp_path / "model.onnx").exists()


def test_what_onnx_has_no_words_for_is_one_line():
    needs("onnx")

    class Spectral(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(images.float() @ images.float().mT)[:, 0]

    program = torch.export.export(Spectral(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),))
    with pytest.raises(ArgumentError, match="^torch cannot translate this network to ONNX: [^\n]+$"):
        onnx._graph(program)


def test_weights_beyond_the_limit_of_one_file_lie_beside_it(contents, tmp_path, monkeypatch):
    needs("onnx")
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    onnx.export(contents, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model.onnx", "model.onnx.data"]


def test_the_exported_program_computes_the_same_scores(contents, images, tmp_path):
    pt2.export(contents, tmp_path)
    extra = {"class_names.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["class_names.json"]) == list("fedcba")
    for batch in (images, images[:1]):
        assert_close(program(batch), scores_of(contents, batch), torch.float32)


# peft ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [case for case in METHODS if case != "bilora" and "random" not in case])
def test_peft_computes_the_same_features(patterns, weights, tmp_path, images, case):
    needs("peft")
    from peft import PeftModel

    contents = contents_of(run_of(case, patterns, weights, tmp_path / "run"))
    out = tmp_path / "out"
    peft.export(contents, out)
    names = ["task-0"] if "first" in case else ["task-0", "task-1", "task-2"]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "classifier.safetensors", *names]
    model = PeftModel.from_pretrained(load_backbone("emoji", str(weights)), str(out / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(out / name), adapter_name=name)
    backbone = model.merge_and_unload(adapter_names=names).eval()
    pixels = (images.float() - contents.model.mean) / contents.model.std
    with torch.no_grad():
        assert_close(backbone(pixels), contents.model.features(images), torch.float32)
        start = load_backbone("emoji", str(weights)).eval()(pixels)
        assert (backbone(pixels) - start).norm() > 1e-3 * start.norm()


@pytest.mark.filterwarnings("ignore:a task of one class")
def test_a_task_of_one_class_has_no_adapter(photos, weights, tmp_path):
    needs("peft")
    learner = learner_of(weights)
    for names in (FIRST, SECOND[:1], THIRD):
        learner.learn(photos, names)
    peft.export(learner.contents(), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("task-*")) == ["task-0", "task-2"]
    assert 'tasks = ["task-0", "task-2"]' in (tmp_path / "out/README.md").read_text()


def test_a_backbone_that_never_learned_has_none(patterns, weights, tmp_path):
    needs("peft")
    trainer = make_trainer(patterns, weights, tmp_path / "run", learn="none", head="lda")
    trainer.run()
    write_json(tmp_path / "run/config.json", trainer.config.to_json() | {"tasks": 3})
    with pytest.raises(ArgumentError, match="--format peft needs factors, .* no task has changed the backbone"):
        peft.export(contents_of(tmp_path / "run"), tmp_path / "out")


def test_factors_that_do_not_sum_to_the_merged_weights_are_refused(contents, tmp_path):
    needs("peft")
    shorter = replace(contents, updates=contents.updates[:2])
    with pytest.raises(ArgumentError, match=r"all tasks' factors do not give the weight of blocks.0.attn.qkv, \|W0"):
        peft.export(shorter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_update_without_low_rank_factors_is_refused(patterns, weights, tmp_path):
    needs("peft")
    contents = contents_of(run_of("bilora", patterns, weights, tmp_path / "run"))
    with pytest.raises(ArgumentError, match="takes low-rank factors, and the updates of --method bilora are none"):
        peft.export(contents, tmp_path / "out")


@torch.no_grad()
def test_a_layer_whose_weight_alone_is_read_is_refused():
    needs("peft")
    from peft import LoraConfig, get_peft_model

    model = load_backbone("beit_base_patch16_224", "none").eval()
    name, pixels = "blocks.11.attn.qkv", torch.randn(1, 3, 224, 224)
    with pytest.raises(ArgumentError, match=rf"cannot adapt {name}: Attention reads the weight of its qkv"):
        peft._check_layers(model, [name])
    before = model(pixels)
    config = LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    assert torch.equal(get_peft_model(model, config)(pixels), before), "what the refusal is for"


def test_random_weights_are_no_base(contents, tmp_path):
    needs("peft")
    with pytest.raises(ArgumentError, match="--weights none drew them at random"):
        peft.export(replace(contents, settings=contents.settings | {"weights": "none"}), tmp_path / "out")


# the command and the card --------------------------------------------------------------------------------------------
def test_the_command_writes_a_folder(run, tmp_path, capsys):
    assert export.main([str(run), "--format", "timm", "--output", str(tmp_path / "out")]) == 0
    assert "README.md there says how to load it" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").exists()


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert export.main([str(tmp_path), "--format", "timm", "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("janus_ext.export: ") and "holds no run of this program" in message
    assert message.count("\n") == 1


def test_the_card_says_what_was_learned_and_nothing_of_the_machine(contents, tmp_path):
    odd = replace(contents, class_names=("a|b", "<c>", "caf\udce9", *"efg"), updates=())
    timm.export(odd, tmp_path / "odd")
    text = (tmp_path / "odd" / "README.md").read_text()
    assert "1. a\\|b, &lt;c>, caf\\udce9, e, f, g\n" in text
    assert json.loads((tmp_path / "odd" / "config.json").read_text())["label_names"] == list(odd.class_names)
    timm.export(contents, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "1. f, e\n2. d, c\n3. b, a\n" in text and "learned in 3 tasks" in text
    last = contents.results["accuracy_matrix"][-1]
    assert "| " + " | ".join(["3", *(f"{value:.2f}" for value in last), f"{sum(last) / 3:.2f}"]) + " |" in text
    assert "| method | janus |" in text and str(Path(contents.settings["weights"]).parent) not in text
