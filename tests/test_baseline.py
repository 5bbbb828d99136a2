"""Predictions of a baseline that are kept, against the baseline itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import ARCHITECTURES, VOCAB_SIZE, save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

from kbvq.cli import main
from kbvq.errors import CheckpointError, ConfigError
from kbvq_eval import baseline
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.lm_eval_plugin import register
from kbvq_eval.tasks import run_tasks

WINDOW = 16


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, VOCAB_SIZE, (5, WINDOW), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_streamed_predictions_are_those_of_the_whole_model(tmp_path, windows, arch):
    """To the last bit, so that a model does not diverge from itself; the last batch is shorter than the others."""
    save_tiny_model(tmp_path, arch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    streamed = BaselineCache.streamed(tmp_path, windows, dtype=torch.float32, device="cpu", batch_size=2)
    whole = BaselineCache.of_model(model, windows, batch_size=2)
    assert torch.equal(streamed.states, whole.states)
    assert streamed.routing.keys() == whole.routing.keys() and len(whole.routing) >= 1
    assert all(torch.equal(streamed.routing[path], chosen) for path, chosen in whole.routing.items())
    with torch.no_grad():
        assert torch.equal(streamed.logits(2, 4, "cpu"), model(input_ids=windows[2:4]).logits[:, :-1])
    scores = score_windows(model, windows, baseline=streamed, batch_size=2)
    assert torch.equal(scores.kl, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(scores.agreement, torch.ones(5, dtype=torch.float64))
    assert set(scores.router_agreement.values()) == {1.0}


def test_predictions_on_disk_are_those_in_memory(tmp_path, windows):
    model = tiny_model("qwen3_moe")
    kept = BaselineCache.of_model(model, windows, folder=tmp_path / "kept")
    opened = BaselineCache.open(tmp_path / "kept", windows)
    assert torch.equal(opened.states, kept.states) and torch.equal(opened.logits(0, 5, "cpu"), kept.logits(0, 5, "cpu"))
    assert all(torch.equal(opened.routing[path], chosen) for path, chosen in kept.routing.items())
    with pytest.raises(CheckpointError, match="other windows"):
        BaselineCache.open(tmp_path / "kept", windows + 1)
    (tmp_path / "kept" / "baseline.json").unlink()
    with pytest.raises(CheckpointError, match="no complete predictions"):
        BaselineCache.open(tmp_path / "kept", windows)


def test_router_agreement_counts_shared_experts_of_the_first_windows(windows, monkeypatch):
    monkeypatch.setattr(baseline, "ROUTED_TOKENS", 3 * WINDOW + 1)
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    with torch.no_grad():
        other.model.layers[1].mlp.gate.weight[:4] *= -1
    chosen = {}
    for name, of in (("model", model), ("other", other)):
        for layer in (0, 1):
            hook = of.model.layers[layer].mlp.experts.register_forward_pre_hook(
                lambda module, arguments, key=(name, layer): chosen.update({key: arguments[1]})
            )
            with torch.no_grad():
                of(input_ids=windows[:3])
            hook.remove()
    expected = [
        sum(len(set(a) & set(b)) for a, b in zip(chosen["model", n].tolist(), chosen["other", n].tolist(), strict=True))
        / chosen["model", n].numel()
        for n in (0, 1)
    ]
    cache = BaselineCache.of_model(model, windows, batch_size=2)
    agreement = score_windows(other, windows, baseline=cache, batch_size=2).router_agreement
    assert list(agreement.values()) == pytest.approx(expected)
    assert expected[0] == 1 and 0 < expected[1] < 1


def test_heads_whose_logits_are_scaled_are_refused(windows):
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="scales or caps"):
        BaselineCache.of_model(GraniteForCausalLM(config).eval(), windows)


def test_registered_model_of_lm_eval_agrees_with_a_direct_run(trained_model, data, monkeypatch):
    """lm-eval's model kbvq by name, lm-eval called with transformers' model, and `run_tasks`."""
    monkeypatch.chdir(data / "tasks")  # where lm-eval looks for data_files
    model = AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained_model)
    ours = run_tasks(model, tokenizer, ["fixture_lastword"], include_path=".", limit=4)["fixture_lastword"]
    common = {
        "tasks": ["fixture_lastword"],
        "task_manager": TaskManager(include_path=".", include_defaults=False),
        "limit": 4,
        "bootstrap_iters": 0,
    }
    arguments = {"pretrained": str(trained_model), "dtype": "float32"}
    by_name = lm_eval.simple_evaluate(model="kbvq", model_args=arguments, device="cpu", **common)
    direct = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), **common)
    for name in ("acc", "acc_norm"):
        expected = direct["results"]["fixture_lastword"][f"{name},none"]
        assert by_name["results"]["fixture_lastword"][f"{name},none"] == expected
        assert ours.metrics[name].value == expected


def test_lm_eval_by_itself_knows_the_model(trained_model, data, tmp_path):
    """`lm_eval --model kbvq`, the command of lm-eval, in a process that nothing of ours has started."""
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "kbvq", "--limit", "4", "--device", "cpu"]
    command += ["--model_args", f"pretrained={trained_model},dtype=float32", "--output_path", tmp_path / "results"]
    command += ["--tasks", "fixture_lastword", "--include_path", data / "tasks"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(list(map(str, command)), cwd=data / "tasks", env=environment, check=True, capture_output=True)
    (results,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(results.read_text())
    assert found["config"]["model"] == "kbvq"
    ours = run_tasks(
        AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(trained_model),
        ["fixture_lastword"],
        include_path=data / "tasks",
        limit=4,
    )["fixture_lastword"]
    assert found["results"]["fixture_lastword"]["acc,none"] == ours.metrics["acc"].value


def test_torch_without_lm_eval_loads_nothing_of_ours():
    code = "import sys, torch; print([name for name in sys.modules if name in ('kbvq', 'lm_eval', 'transformers')])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_an_lm_eval_without_that_registry_does_not_stop_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    register()


def test_the_command_hands_its_arguments_to_lm_eval(monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[:]))
    assert main(["lm-eval", "--model", "kbvq", "--tasks", "arc_easy", "--limit", "2"]) == 0
    assert seen == [["lm_eval", "--model", "kbvq", "--tasks", "arc_easy", "--limit", "2"]]
