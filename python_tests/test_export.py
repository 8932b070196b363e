"""Exports: what another program reads computes what the run does, and nothing is left of an export that fails."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close, make_trainer
from PIL import Image
from torch import Tensor, nn

from janus_ext import ArgumentError, CheckpointError, export, inject
from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.classifier import ContinualClassifier
from janus_ext.exports import card, folder, onnx, peft, plain, pt2, timm
from janus_ext.exports.contents import Contents, linear_rows, prototype_rows
from janus_ext.runs.checkpoint import write_json

PACKAGES = {"timm": (), "pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "peft": ("peft",)}
EXPORTS = {"timm": timm.export, "onnx": onnx.export, "pt2": pt2.export, "peft": peft.export}
METHODS = {
    "janus": {"scale": 0.7},
    "janus, ncm": {"head": "ncm"},
    "lora": {},
    "lora-gpm": {},
    "inflora": {},
    "lora-drs": {},
    "bilora": {"frequencies": 100},
}


def needs(name: str) -> None:
    prepare_torchvision()
    for package in PACKAGES[name]:
        pytest.importorskip(package)


def run_of(case: str, patterns, weights, path: Path) -> Path:
    """The folder of a finished run on three tasks."""
    trainer = make_trainer(patterns, weights, path, method=case.split(",")[0], epochs=2, **METHODS[case])
    trainer.run()
    write_json(path / "config.json", trainer.config.to_json())
    return path


@pytest.fixture(scope="module")
def run(patterns, weights, tmp_path_factory) -> Path:
    return run_of("janus", patterns, weights, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def contents(run) -> Contents:
    return export.contents_of(run)


@pytest.fixture
def images(patterns) -> Tensor:
    return patterns.test.images


@torch.no_grad()
def scores_of(contents: Contents, images: Tensor) -> Tensor:
    """The scores of the run itself, adapters and all."""
    return (contents.model.eval().features(images) @ contents.weight.T + contents.bias).softmax(-1)


def assert_untouched(contents: Contents, before: dict[str, Tensor]) -> None:
    after = contents.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in after.items())


def state(contents: Contents) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in contents.model.state_dict().items()}


# the plain model -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", METHODS)
def test_the_plain_model_scores_as_the_run_whatever_the_method(patterns, weights, tmp_path, images, case):
    contents = export.contents_of(run_of(case, patterns, weights, tmp_path / "run"))
    before, random = state(contents), torch.get_rng_state()
    scores = plain.scorer(contents)(images)
    assert_close(scores, scores_of(contents, images), torch.float32)
    assert_untouched(contents, before)
    assert torch.equal(random, torch.get_rng_state())
    right = (scores.argmax(-1) == patterns.positions[patterns.test.labels]).float()
    rows = [patterns.test.of_classes(classes) for classes in patterns.tasks]
    assert contents.results["accuracy_matrix"][-1] == [pytest.approx(100 * float(right[r].mean())) for r in rows]
    assert contents.class_names == ("f", "e", "d", "c", "b", "a")


def test_what_is_still_in_the_factors_is_in_the_plain_model(run, images):
    contents = export.contents_of(run)
    before = scores_of(contents, images)
    for module in contents.model.modules():
        if hasattr(module, "effective_A"):
            nn.init.normal_(module.B)
    wanted = scores_of(contents, images)
    assert (wanted - before).norm() > 1e-2
    assert_close(plain.scorer(contents)(images), wanted, torch.float32)


def test_pixels_may_be_floats(contents, images):
    scorer = plain.scorer(contents)
    assert torch.equal(scorer(images.float()), scorer(images))


def test_heads_stand_one_below_the_other(contents):
    weight, bias = linear_rows(contents.model.heads)
    features = torch.randn(5, 32)
    assert_close(features @ weight.T + bias, contents.model.classify(features), torch.float32)


def test_a_class_without_a_prototype_never_wins(contents):
    from janus_ext import ClassPrototypes

    prototypes = ClassPrototypes(32)
    prototypes.add(torch.randn(4, 32), torch.tensor([3, 0, 3, 5]))
    weight, bias = prototype_rows(prototypes, 7)
    features = torch.randn(100, 32)
    scores = features @ weight.T + bias
    assert sorted(scores.argmax(-1).unique().tolist()) == [0, 3, 5]
    cosines = prototypes.cosines(features) * features.norm(dim=1, keepdim=True)
    assert_close(scores[:, prototypes.classes], cosines, torch.float32)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swinv2_cr_tiny_ns_224", "xcit_nano_12_p16_224"])
def test_classifiers_of_other_networks(name):
    contents = contents_on(load_backbone(name, "none"))
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    assert_close(plain.scorer(contents)(images), scores_of(contents, images), torch.float32)


def test_a_classifier_that_is_no_linear_map_of_the_features_is_refused():
    contents = contents_on(load_backbone("volo_d1_224", "none"))
    with pytest.raises(ArgumentError, match="VOLO .*linear"):
        plain.scorer(contents)


def contents_on(backbone: nn.Module, classes: int = 3, **settings) -> Contents:
    """A model that has learned nothing yet, with random heads."""
    model = ContinualClassifier(backbone)
    inject(backbone, rank=2)
    model.add_task(classes, "default")
    names = tuple(f"class {index}" for index in range(classes))
    return Contents(model.eval(), *linear_rows(model.heads), names, {"method": "janus", "backbone": "x"} | settings)


def test_a_network_that_torch_cannot_follow_is_one_line():
    class Moody(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3)) * (1 if pixels.sum() > 0 else 2)

    scorer = plain.Scorer(Moody(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(ArgumentError, match="^torch.export cannot follow this Moody: [^\n]+$"):
        plain.program_of(scorer, folder.random_images(8))


def test_rows_that_do_not_fit_are_refused(contents):
    with pytest.raises(ArgumentError, match=r"must be \[5, 32\] and \[5\], got \[6, 32\] and \[6\]"):
        replace(contents, class_names=tuple("abcde"))


# what every format owes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXPORTS)
def test_the_lines_of_the_card_run_and_name_the_class(contents, weights, images, tmp_path, monkeypatch, capsys, name):
    needs(name)
    before = state(contents)
    whole = replace(contents, crop=1.0, settings=contents.settings | {"weights": str(weights)})
    EXPORTS[name](whole, tmp_path / "out" / "here")
    assert_untouched(contents, before)
    monkeypatch.chdir(tmp_path / "out" / "here")
    Path(weights.name).write_bytes(weights.read_bytes())
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save("image.png")
    code = Path("README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()[-5:]
    best = scores_of(contents, images[:1])[0].sort(descending=True, stable=True)
    assert [line.split()[1] for line in lines] == [contents.class_names[index] for index in best.indices[:5]]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(best.values[:5].tolist(), abs=1.1e-3)
    assert [path.name for path in Path("..").iterdir()] == ["here"]


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_that_fails_leaves_nothing(contents, tmp_path, monkeypatch, name):
    needs(name)

    def fails(*_):
        raise CheckpointError("the last file cannot be written")

    monkeypatch.setattr(card, "write", fails)
    with pytest.raises(CheckpointError, match="the last file"):
        EXPORTS[name](contents, tmp_path / "out")
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
        == contents.model.backbone.network["options"]
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
@pytest.mark.parametrize("case", [case for case in METHODS if case != "bilora"])
def test_peft_computes_the_same_features(patterns, weights, tmp_path, images, case):
    needs("peft")
    from peft import PeftModel

    contents = export.contents_of(run_of(case, patterns, weights, tmp_path / "run"))
    out = tmp_path / "out"
    peft.export(contents, out)
    names = ["task-0", "task-1", "task-2"]
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


def test_factors_that_do_not_sum_to_the_merged_weights_are_refused(contents, tmp_path):
    needs("peft")
    shorter = replace(contents, updates=contents.updates[:2])
    with pytest.raises(ArgumentError, match=r"all tasks' factors do not give the weight of blocks.0.attn.qkv, \|W0"):
        peft.export(shorter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_update_without_low_rank_factors_is_refused(patterns, weights, tmp_path):
    needs("peft")
    contents = export.contents_of(run_of("bilora", patterns, weights, tmp_path / "run"))
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
    assert message.startswith("janus_ext.export: ") and "is no run with a finished task" in message
    assert message.count("\n") == 1


def test_the_card_says_what_was_learned_and_nothing_of_the_machine(contents, tmp_path):
    odd = replace(contents, class_names=("a|b", "<c>", *"defg"), updates=())
    timm.export(odd, tmp_path / "odd")
    text = (tmp_path / "odd" / "README.md").read_text()
    assert "1. a\\|b, &lt;c>, d, e, f, g\n" in text
    timm.export(contents, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "1. f, e\n2. d, c\n3. b, a\n" in text and "learned in 3 tasks" in text
    last = contents.results["accuracy_matrix"][-1]
    assert "| " + " | ".join(["3", *(f"{value:.2f}" for value in last), f"{sum(last) / 3:.2f}"]) + " |" in text
    assert "| method | janus |" in text and str(Path(contents.settings["weights"]).parent) not in text
