"""The script of the paper's experiments: every command that it would run is one that kbvq takes."""

import json
import os
import shlex
import subprocess
from pathlib import Path

from kbvq.cli import _parser

ROOT = Path(__file__).resolve().parent.parent


def commands(tmp_path, **variables):
    script = [ROOT / "eval" / "reproduce_paper.sh", tmp_path / "work", "--dry-run"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ | variables)
    return [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_dry_run_prints_commands_that_kbvq_takes(tmp_path):
    planned = commands(tmp_path)
    assert len(planned) == 4 * 9 * 2
    parsed = [_parser().parse_args(command) for command in planned]
    quantized = [options for options in parsed if hasattr(options, "calibration")]
    assert {(o.samples, o.sequence_length, o.seed, o.recipe) for o in quantized} == {(256, 4096, 42, "paper")}
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
    assert len(commands(tmp_path, MODELS="models/tiny")) == 9 * 2 - 2
