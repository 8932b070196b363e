"""janus_ext.train: the run folder it fills, several seeds, mistakes in one line, and its help."""

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from results import set_settings

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.reports import plots


@pytest.fixture(scope="module")
def finished_run(weights, tmp_path_factory) -> Path:
    """A run of the command on the embedded images: 4 tasks, one training image per class."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = f"--weights {weights} --tasks 4 --limit-per-class 1 --epochs 1 --batch-size 64 --output {folder}"
    flags += " --energy-start 0.9 --energy-end 0.97"  # the tiny backbone has room for these
    assert train.main(flags.split()) == 0
    return folder


def test_the_run_folder_is_complete(finished_run):
    expected = {"config.json", "metrics.jsonl", "results.json", "checkpoints", "plots", "log.txt"}
    assert {path.name for path in finished_run.iterdir()} == expected
    factors = {f"factors-{t}.safetensors" for t in range(4)}
    saved = {p.name for p in (finished_run / "checkpoints").iterdir()}
    assert saved == {"model.safetensors", "method-3.safetensors"} | factors
    assert {p.stem for p in (finished_run / "plots").iterdir()} == set(plots.PLOTS)
    assert len((finished_run / "metrics.jsonl").read_text().splitlines()) == 4
    assert "task 4/4" in (finished_run / "log.txt").read_text()


def test_the_results_file_has_every_promised_name_and_no_nan(finished_run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in results.json")

    results = json.loads((finished_run / "results.json").read_text(), parse_constant=refuse)
    promised = """benchmark method seed class_order class_names split_sha256 accuracy_matrix acc maa bwt forgetting
        plasticity acc_sample_weighted maa_sample_weighted accuracy_matrix_task_known acc_task_known
        task_recognition_matrix task_recognition violation danger basis_rank seconds versions"""
    assert set(promised.split()) <= results.keys()
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3, 4]
    assert results["violation"][0] is None and all(v <= 1e-5 for v in results["violation"][1:])
    assert results["danger"][0] is None and all(0 < d <= 1 for d in results["danger"][1:])
    assert all(rank.keys() == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"} for rank in results["basis_rank"])
    assert sorted(results["class_order"]) == list(range(200)) and len(results["split_sha256"]) == 64
    assert results["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_configuration_is_stored_resolved(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    results = json.loads((finished_run / "results.json").read_text())
    assert [config[key] for key in ("class_names", "split_sha256")] == [
        results[key] for key in ("class_names", "split_sha256")
    ]
    assert (config["rectify"], config["tasks"], config["epochs"], config["limit_per_class"]) == ("exact", 4, 1, 1)


def test_a_finished_run_is_not_overwritten(finished_run, capsys):
    before = (finished_run / "results.json").read_bytes()
    assert train.main(["--output", str(finished_run)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--output" in message and "finished" in message
    assert (finished_run / "results.json").read_bytes() == before


@pytest.mark.parametrize("flag", ["--output", "--weights"])
def test_names_too_long_for_the_file_system_are_one_line(flag, capsys):
    assert train.main([flag, "x" * 300]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and flag in message


def test_several_seeds_make_a_summary(weights, tmp_path, capsys):
    flags = f"--weights {weights} --method lora --tasks 2 --limit-per-class 1 --epochs 1 --batch-size 200 --no-plots"
    assert train.main([*flags.split(), "--seed", "3", "4", "--output", str(tmp_path / "many")]) == 0
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())
    runs = [json.loads((tmp_path / "many" / f"seed-{s}" / "results.json").read_text()) for s in (3, 4)]
    assert summary["seeds"] == [3, 4] and summary["acc"]["values"] == [run["acc"] for run in runs]
    assert summary["acc"]["mean"] == pytest.approx(sum(run["acc"] for run in runs) / 2)
    assert not (tmp_path / "many" / "seed-3" / "plots").exists()
    assert "2 seeds" in capsys.readouterr().out


def test_several_seeds_go_on_where_they_were_cut_off(weights, tmp_path, capsys):
    flags = f"--weights {weights} --method lora --tasks 2 --limit-per-class 1 --epochs 1 --batch-size 200 --no-plots"
    call = [*flags.split(), "--seed", "3", "4", "--output", str(tmp_path / "many")]
    assert train.main(call) == 0
    whole = (tmp_path / "many" / "summary.json").read_bytes()
    first = (tmp_path / "many" / "seed-3" / "results.json").read_bytes()
    for lost in ("summary.json", "seed-4/results.json"):
        (tmp_path / "many" / lost).unlink()
    assert train.main([*call, "--lr", "0.5"]) == 2
    assert "seed-3 holds a run with other settings: --lr 0.00025 (asked: 0.5); choose" in capsys.readouterr().err
    assert train.main([*call, "--clip-norm", "1"]) == 2
    assert (
        "seed-3 holds a run with other settings: --clip-norm left out (asked: 1.0); choose" in capsys.readouterr().err
    )
    set_settings(tmp_path / "many" / "seed-3", {"clip_norm": 1.0})
    assert train.main(call) == 2 and "--clip-norm 1.0 (asked: left out); choose" in capsys.readouterr().err
    set_settings(tmp_path / "many" / "seed-3", {"clip_norm": None})
    assert train.main(call) == 0
    assert (tmp_path / "many" / "summary.json").read_bytes() == whole
    assert (tmp_path / "many" / "seed-3" / "results.json").read_bytes() == first
    assert train.main(call) == 2 and "holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--rank", "0"], "--rank"),
        (["--weights", "nowhere.safetensors"], "--weights nowhere.safetensors"),
        (["--backbone", "vit_of_dreams"], "--backbone vit_of_dreams"),
        (["--backbone", "resnet18", "--weights", "none"], "--backbone resnet18"),
        (["--rank", "5000"], "rank must be from 1 to min(m, n) = 192, got 5000"),
        (["--tasks", "201"], "--tasks"),
        (["--device", "cuda:64"], "--device"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, part, tmp_path, capsys):
    assert train.main([*flags, "--output", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("janus_ext.train: ") and message.count("\n") == 1 and part in message
    assert not (tmp_path / "x").exists()


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    words = set(re.findall(r"--[a-z-]+", text))
    assert {"--" + field.name.replace("_", "-") for field in fields(TrainConfig)} - {"--own"} <= words


def test_importing_the_package_pulls_in_no_heavy_library():
    code = (
        "import sys, janus_ext; print(sorted({'timm', 'torchvision', 'PIL', 'matplotlib', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
