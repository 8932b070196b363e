"""--resume knows images and weights by their content: another spelling of their path is the same run."""

import os
import shutil
from pathlib import Path

import pytest
import trees
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from janus_ext import train
from janus_ext.backbone import EMBEDDED, prepare_torchvision
from janus_ext.backbone.loading import weight_file
from janus_ext.runs import checkpoint
from janus_ext.training import trainer as trainer_module

SETTINGS = "--benchmark folder --backbone emoji --method lora --epochs 1 --tasks 2 --workers 0 --no-plots --amp off"


class CutOff(BaseException):
    """Ends a run on the spot, as a kill does."""


@pytest.fixture
def place(weights, tmp_path, monkeypatch) -> Path:
    """A folder with images, weights, and a run that was cut off in its second task, begun with relative paths."""
    trees.folders(tmp_path / "images", 4, 5)
    shutil.copy(weights, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    evaluate = trainer_module.Trainer._evaluate

    def cut(self, index):
        if index == 1:
            raise CutOff
        return evaluate(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.Trainer, "_evaluate", cut)
        with pytest.raises(CutOff):
            ask("images", "w.safetensors")
    return tmp_path


def ask(data: str | Path, weights: str | Path, *more: str) -> int:
    return train.main(
        [*SETTINGS.split(), "--data-dir", str(data), "--weights", str(weights), "--output", "run", "--resume", *more]
    )


def test_the_same_images_and_weights_elsewhere_are_the_same_run(place, capsys):
    assert ask(place / "images", place / "w.safetensors") == 0
    assert "goes on after task 1/2" in (place / "run" / "log.txt").read_text()
    os.rename("images", "moved")
    os.rename("w.safetensors", "renamed.safetensors")
    capsys.readouterr()
    assert ask("./moved/../moved", "renamed.safetensors") == 0
    assert "has finished before" in capsys.readouterr().out


def test_the_start_of_a_run_says_what_it_is_on(place):
    stored = checkpoint.read_json(place / "run" / "config.json")
    assert stored["class_names"] == [trees.wnid(label) for label in range(4)]
    assert stored["weights_sha256"] == checkpoint.file_sha256("w.safetensors") and len(stored["split_sha256"]) == 64


def test_other_images_are_refused_under_the_same_path_too(place, capsys):
    images = sorted((place / "images" / trees.wnid(0)).iterdir())
    images[0].unlink()
    assert ask("images", "w.safetensors") == 2
    message = capsys.readouterr().err
    assert "holds a run on other image files, or another order of classes: split_sha256 " in message
    assert f"{checkpoint.read_json(place / 'run' / 'config.json')['split_sha256'][:12]} (asked: " in message


def test_other_images_elsewhere_are_refused_by_both_paths(place, capsys):
    shutil.copytree("images", "more")
    trees.save_jpeg(Path("more") / trees.wnid(0) / "another.jpg", trees.drawing(0, 6))
    assert ask("more", "w.safetensors") == 2
    message = capsys.readouterr().err
    assert "other settings: --data-dir images (asked: more); choose" in message and message.count("\n") == 1


def test_other_weights_are_refused_under_the_same_path_too(place, capsys):
    tensors = load_file("w.safetensors")
    with safe_open("w.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, "w.safetensors", metadata)
    assert ask("images", "w.safetensors") == 2
    assert "holds a run on backbone weights of other contents: weights_sha256 " in capsys.readouterr().err
    assert ask("images", "nowhere.safetensors") == 2
    assert "--weights w.safetensors (asked: nowhere.safetensors)" in capsys.readouterr().err


def test_random_weights_are_other_weights(tmp_path, capsys):
    call = "--tasks 2 --limit-per-class 1 --epochs 1 --batch-size 100 --no-plots --output".split() + [f"{tmp_path}/run"]
    assert train.main([*call, "--seed", "0", "1"]) == 0
    assert train.main([*call, "--seed", "0", "1", "2", "--weights", "none", "--resume"]) == 2
    assert "--weights pretrained (asked: none)" in capsys.readouterr().err


def test_weights_in_a_folder_are_known_by_their_content(tmp_path):
    prepare_torchvision()
    import timm

    model = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "net", model_config={"num_classes": 0})
    path = weight_file(f"local-dir:{tmp_path}/net", "pretrained")
    assert path == weight_file(f"{tmp_path}/net", "pretrained") and path.parent == tmp_path / "net"
    assert weight_file("test_vit", "pretrained") is None and weight_file("emoji", "none") is None
    assert weight_file("emoji", "pretrained") == EMBEDDED and weight_file("emoji", str(path)) == path


def test_other_settings_are_all_named_with_both_values(place, capsys):
    assert ask("images", "w.safetensors", "--epochs", "2", "--clip-norm", "1", "--shuffle-classes") == 2
    assert capsys.readouterr().err == (
        "janus_ext.train: run holds a run with other settings: --clip-norm left out (asked: 1.0), "
        "--epochs 1 (asked: 2), --shuffle-classes False (asked: True); "
        "choose another folder with --output, or repeat its flags\n"
    )
