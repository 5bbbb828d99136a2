"""The script of the paper's experiments: every command that it would run is one that kbvq takes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import paper_table
import pytest

from kbvq.cli import _parser
from kbvq.errors import ConfigError
from kbvq.recipes import make_recipe, parse_change

ROOT = Path(__file__).resolve().parent.parent


BUNDLED = ROOT / "tests" / "models" / "tiny-qwen3-moe"


def output(tmp_path, *options, **variables):
    script = [ROOT / "eval" / "reproduce_paper.sh", tmp_path / "work", *options]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | variables)
    return done.stdout.splitlines()


def commands(tmp_path, **variables):
    return [shlex.split(line)[2:] for line in output(tmp_path, "--dry-run", **variables) if line.startswith("+ ")]


def test_dry_run_prints_commands_that_kbvq_takes(tmp_path):
    *planned, table = commands(tmp_path)
    assert len(planned) == 4 * 9 * 2 + 11 * 2
    assert table[0].endswith("eval/paper_table.py") and table[2:] == ["--results", "docs/results/paper.json"]
    parsed = [_parser().parse_args(command) for command in planned]
    quantized = [options for options in parsed if hasattr(options, "calibration")]
    assert {(o.samples, o.sequence_length, o.seed, o.recipe) for o in quantized} == {
        (windows, 4096, 42, "paper") for windows in (16, 64, 128, 256)
    }
    for options in quantized:  # a recipe takes what the ablations change
        changes = dict(map(parse_change, options.set)) | {n: getattr(options, n) for n in ("klt", "bcos")}
        make_recipe("paper", options.bits, **changes)
    published = json.loads((ROOT / "docs" / "results" / "paper.json").read_text())["models"]
    assert {options.model for options in quantized} == published.keys()
    names = {str(options.output.name) for options in quantized}
    for model, rows in published.items():
        for row in rows.keys() - {"fp16", "gptq-2"}:
            assert f"{model.split('/')[1]}-{row}" in names


def test_what_is_finished_is_not_done_again(tmp_path):
    finished = tmp_path / "work" / "tiny-kbvq-2"
    finished.mkdir(parents=True)
    (finished / "kbvq_manifest.json").touch()
    (tmp_path / "work" / "tiny-kbvq-2.json").touch()
    assert len(commands(tmp_path, MODELS="models/tiny", ABLATE="")) == 9 * 2 - 2 + 1


def trial(tmp_path, data, **variables):
    """Variables of the smallest run on the bundled model."""
    (tmp_path / "unseen.txt").write_text((data / "validation.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "eval", "kernels"))
    return {
        "MODELS": str(BUNDLED), "ABLATE": "", "BITS": "2", "ROWS": "kbvq", "CALIBRATION": str(data / "calibration.txt"),
        "SAMPLES": "2", "LENGTH": "64", "QUANTIZE": "--device cpu --set kmeans_iterations=1",
        "EVALUATE": f"--device cpu --window 64 --perplexity {tmp_path / 'unseen.txt'}",
        "RESULTS": str(tmp_path / "paper.json"), "KBVQ": str(Path(sys.executable).with_name("kbvq")),
        "PYTHON": sys.executable, "PYTHONPATH": paths,
    } | variables  # fmt: skip


def test_plan_says_what_a_model_needs_and_does_nothing(tmp_path, data):
    lines = output(tmp_path, "--plan", **trial(tmp_path, data, ROWS=""))
    assert sum(line.startswith("+ ") for line in lines) == 5 * 2 + 1
    (size,) = (line for line in lines if line.startswith("  size "))  # of one row: the others differ little
    assert "true bits per expert weight" in size
    assert any(line.startswith("  time ") for line in lines) and not any((tmp_path / "work").iterdir())


def test_a_trial_on_the_bundled_model_fills_the_table(tmp_path, data):
    variables = trial(tmp_path, data)
    (tmp_path / "paper.json").write_text(json.dumps({"source": "a paper", "models": {}}))
    output(tmp_path, **variables)
    rows = json.loads((tmp_path / "paper.json").read_text())["models"][str(BUNDLED)]
    assert rows.keys() == {"kbvq-2", "fp16"} and all(row["published"] is None for row in rows.values())
    assert 2.2 < rows["kbvq-2"]["own"]["bits_per_weight"] < 2.6
    assert rows["fp16"]["own"]["perplexity"] < rows["kbvq-2"]["own"]["perplexity"]
    again = [line for line in output(tmp_path, **variables) if line.startswith("+ ")]
    assert len(again) == 1 and "paper_table.py" in again[0]


def test_own_numbers_stand_beside_the_published_ones(tmp_path):
    result = {
        "model": {"bits_per_weight": 2.25},
        "baseline": {"path": "org/tiny"},
        "perplexity": {"wikitext2": {"perplexity": 8.5, "baseline_perplexity": 7.25}},
        "means": {paper_table.ACCURACY: {"model": {"value": 0.5}, "baseline": {"value": 0.625}}},
    }
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tiny-kbvq-2.json").write_text(json.dumps(result))
    published = {"kbvq-2": {"published": {"perplexity": 8.75}, "own": None}, "vq-2": {"published": None, "own": None}}
    results = tmp_path / "paper.json"
    results.write_text(json.dumps({"source": "a paper", "models": {"org/tiny": published}}))
    paper_table.main([str(tmp_path / "work"), "--results", str(results)])
    rows = json.loads(results.read_text())["models"]["org/tiny"]
    assert rows["kbvq-2"]["own"] == {"perplexity": 8.5, "accuracy": 50.0, "bits_per_weight": 2.25}
    assert rows["fp16"]["own"] == {"perplexity": 7.25, "accuracy": 62.5}
    table = results.with_suffix(".md").read_text()
    assert "| kbvq-2 | 8.75 | 8.50 |  | 50.00 | 2.250 |" in table and "| vq-2 |  |  |  |  |  |" in table


def test_what_is_recorded_is_what_the_table_shows():
    recorded = ROOT / "docs" / "results" / "paper.json"
    content = json.loads(recorded.read_text())
    assert recorded.with_suffix(".md").read_text() == paper_table.markdown(content["source"], content["models"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rank_divisor=64", ("rank_divisor", 64)),
        ("bcos_part=mean", ("bcos_part", "mean")),
        ("error_feedback=true", ("error_feedback", True)),
        ("damping=1", ("damping", 1)),
        ("max_vectors_per_codeword=null", ("max_vectors_per_codeword", None)),
    ],
)
def test_fields_of_a_recipe_are_set_by_name(text, found):
    assert parse_change(text) == found


@pytest.mark.parametrize(
    "text", ["bits=2", "speed=3", "rank_divisor=1.5", "rank_divisor=true", "bcos=1", "bcos_part=2"]
)
def test_what_is_no_field_or_no_value_of_it_is_refused(text):
    with pytest.raises(ConfigError, match=f"--set {text}: "):
        parse_change(text)
