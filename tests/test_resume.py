"""Runs that are interrupted give what undisturbed runs give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizing import Stop, interrupt, quantize
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from kbvq.cli import main
from kbvq.errors import CheckpointError
from kbvq.quantization.pipeline import Run
from kbvq.recipes import make_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_killed_twenty_times_a_run_gives_the_same_files(tmp_path):
    """By SIGKILL, at file operations (inside writes too) and at random times; the script compares the files."""
    command = [sys.executable, ROOT / "eval" / "resume_benchmark.py", "--kills", "20", "--recipes", "fast"]
    result = subprocess.run(
        [*command, "--layers", "3", "--output", tmp_path / "table.md"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])[0]
    assert row["kills"] >= 20 and row["places"]["inside a write"] > 0 and row["places"]["at a random time"] > 0


def start(tmp_path, text, recipe=None, **changes):
    return quantize(tmp_path / "model", tmp_path / "out", text, recipe, samples=8, **changes)


def interrupted(tmp_path, text, monkeypatch, **changes):
    save_tiny_model(tmp_path / "model", "mixtral", max_shard_size="100KB")
    with monkeypatch.context() as patch:
        interrupt(patch, "quantize", 1)
        with pytest.raises(Stop):
            start(tmp_path, text, **changes)


def test_end_to_end_tuning_goes_on_from_the_layers_that_are_done(tmp_path, text, monkeypatch):
    save_tiny_model(tmp_path / "model", "olmoe")
    recipe = make_recipe("fast", 3.5, kmeans_iterations=2, distillation_steps=2)
    expected = quantize(tmp_path / "model", tmp_path / "undisturbed", text, recipe, samples=8)
    with monkeypatch.context() as patch:
        interrupt(patch, "distill")
        with pytest.raises(Stop):
            start(tmp_path, text, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "quantize", None)  # not needed again
        assert start(tmp_path, text, recipe) == expected
    for path in (tmp_path / "undisturbed").glob("model*"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def replace_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def change_weight(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors[sorted(tensors)[0]] += torch.tensor(1.0)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "options", "names"),
    [
        (replace_config, {}, ["model.config.json.sha256"]),
        (change_weight, {}, [r"model\.model-00001-of-\d+\.safetensors\.sha256"]),
        (None, {"seed": 1}, ["seed was 0 and is 1", r"calibration\.tokens"]),
        (None, {"samples": 9}, [r"calibration\.windows was \[8, 32\] and is \[9, 32\]"]),
        (None, {"recipe": make_recipe("paper", 2, kmeans_iterations=6)}, ["recipe.kmeans_iterations was 5 and is 6"]),
    ],
)
def test_a_run_of_something_else_is_refused_by_what_differs(tmp_path, text, monkeypatch, change, options, names):
    interrupted(tmp_path, text, monkeypatch)
    if change is not None:
        change(tmp_path / "model")
    for name in names:
        with pytest.raises(CheckpointError, match=name):
            quantize(tmp_path / "model", tmp_path / "out", text, **({"samples": 8} | options))
    assert (tmp_path / "out.partial" / "state.json").exists()


def test_fresh_forgets_the_interrupted_run_and_metrics_count_every_step(tmp_path, text, monkeypatch):
    interrupted(tmp_path, text, monkeypatch)
    start(tmp_path, text, fresh=True, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "kbvq_metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("preparing", 0),
        ("quantizing layer", 0),
        ("quantizing layer", 1),
    ]
    assert all(line["seconds"] > 0 and line["peak_memory"] > 0 for line in lines)
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_says_what_is_kept_and_the_log_has_a_line_for_each_layer(tmp_path, text, monkeypatch, capsys, caplog):
    save_tiny_model(tmp_path / "model", "olmoe")
    arguments = ["quantize", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--recipe", "paper"]
    arguments += ["--calibration", str(text), "--samples", "8", "--sequence-length", "32", "--no-idre"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "quantize", lambda self, index, carry: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    assert f"what is finished is in {tmp_path / 'out'}.partial, and the same command goes on" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out.partial")]) == 0
    caplog.clear()
    assert main(arguments) == 0
    for layer in (1, 2):
        assert f"quantizing layer {layer} of 2: output error" in caplog.text
    assert "left" in caplog.text and "preparing 1 of 1" not in caplog.text
