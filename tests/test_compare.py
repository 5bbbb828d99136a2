"""Checkpoints side by side: their bits, their order, and the one baseline."""

from __future__ import annotations

import json

import pytest
from quantizing import quantize
from tiny_models import save_tiny_model

from kbvq.cli import main
from kbvq.errors import ConfigError
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq_eval import run
from kbvq_eval.compare import compare


def test_one_table_and_one_picture_of_packed_and_dense_checkpoints(tmp_path, text, monkeypatch, capsys):
    save_tiny_model(tmp_path / "original", "qwen2_moe")
    save_tiny_model(tmp_path / "copy", "qwen2_moe")
    save_tiny_model(tmp_path / "other", "qwen2_moe", seed=1)
    quantize(tmp_path / "original", tmp_path / "packed", text)
    streamed = []
    original = run.BaselineCache.streamed
    monkeypatch.setattr(run.BaselineCache, "streamed", lambda *a, **k: streamed.append(a) or original(*a, **k))
    folders = [str(tmp_path / name) for name in ("other", "packed", "copy")]
    rest = ["--baseline", str(tmp_path / "original"), "--perplexity", str(text), "--window", "64", "--device", "cpu"]
    assert main(["compare", *folders, *rest, "--output", str(tmp_path / "out")]) == 0
    assert len(streamed) == 1, "the baseline is computed once for all"
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "comparison.json").read_text())}
    assert rows["packed"]["size"]["bits"] == inspect_checkpoint(tmp_path / "packed")["bits_per_weight"]
    assert rows["copy"]["size"]["bits"] == rows["other"]["size"]["model_bits"] == 32
    assert [rows[name]["method"] for name in ("packed", "copy")] == ["kbvq", None]
    assert rows["copy"]["scores"]["kl"] == 0 < rows["packed"]["scores"]["kl"] < rows["other"]["scores"]["kl"]
    assert rows["packed"]["size"]["num_bytes"] < rows["copy"]["size"]["num_bytes"]
    printed = capsys.readouterr().out
    assert printed.index("| copy |") < printed.index("| packed |") < printed.index("| other |")
    assert (tmp_path / "out" / "comparison.svg").read_text().count("<svg") == 1


def test_models_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="different names, not a, a"):
        compare(["x/a", "y/a"], baseline="z", perplexity="t", output=tmp_path)
