"""lm-eval tasks on local data, against choices scored by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbvq.errors import ConfigError
from kbvq_eval.tasks import find_tasks, local_tasks, run_tasks

ITEMS = 5


@pytest.fixture(scope="module")
def loaded(trained_model):
    model = AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(trained_model)


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum of log-probabilities of the continuation's tokens, one forward of the whole text."""
    prefix = len(tokenizer(context)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(prefix, len(ids)))


def test_accuracies_match_choices_scored_by_hand(loaded, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data_files are relative to the YAML file, not to the working directory
    items = [json.loads(line) for line in (data / "tasks" / "lastword.jsonl").read_text().splitlines()[:ITEMS]]
    acc, acc_norm = [], []
    for item in items:
        choices = [" " + choice for choice in item["choices"]]
        scores = [log_likelihood(*loaded, item["context"], choice) for choice in choices]
        per_character = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        acc.append(float(scores.index(max(scores)) == item["label"]))
        acc_norm.append(float(per_character.index(max(per_character)) == item["label"]))

    result = run_tasks(*loaded, ["fixture_lastword"], include_path=data / "tasks", limit=ITEMS)["fixture_lastword"]
    assert (result.items, result.total) == (ITEMS, 622)
    assert result.metrics["acc"].per_item == tuple(acc)
    assert result.metrics["acc_norm"].per_item == tuple(acc_norm)
    mean = sum(acc) / ITEMS
    assert result.metrics["acc"].value == pytest.approx(mean)
    variance = sum((value - mean) ** 2 for value in acc) / (ITEMS - 1)
    assert result.metrics["acc"].stderr == pytest.approx(math.sqrt(variance / ITEMS))


def test_metric_without_standard_error(loaded, data):
    metrics = run_tasks(*loaded, ["fixture_ppl"], include_path=data / "tasks", limit=2)["fixture_ppl"].metrics
    assert metrics["word_perplexity"].stderr is None
    assert metrics["word_perplexity"].value > 1


def test_unknown_task_lists_what_the_include_path_has(data):
    with pytest.raises(ConfigError) as error:
        find_tasks(["fixture_clozes"], data / "tasks")
    message = str(error.value)
    assert "unknown task 'fixture_clozes'; did you mean fixture_cloze" in message
    assert message.endswith("has: fixture_cloze, fixture_cloze_far, fixture_lastword, fixture_ppl")


def test_include_path_must_be_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        find_tasks(["any"], tmp_path / "absent")


def test_local_tasks_are_found_below_the_folder_without_running_code(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text("task: a\nprocess_docs: !function utils.explode\n")
    (tmp_path / "group.yaml").write_text("group: b\ntask: [a]\n")
    assert local_tasks(tmp_path) == {"a": Path(tmp_path / "below" / "a.yaml")}


def test_invalid_yaml_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match="broken.yaml is not valid YAML"):
        local_tasks(tmp_path)


def test_data_files_beside_functions_are_refused(tmp_path):
    (tmp_path / "both.yaml").write_text(
        "task: both\ndataset_kwargs: {data_files: {test: both.jsonl}}\ndoc_to_text: !function utils.text\n"
    )
    with pytest.raises(ConfigError, match="both data_files and !function"):
        find_tasks(["both"], tmp_path)
