"""Perplexity and divergence against naive float64 loops, and `evaluate` from files to table and JSON."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kbvq.errors import CheckpointError, ConfigError, NumericalError
from kbvq_eval import divergence, run
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import score_windows
from kbvq_eval.generation import measure_generation
from kbvq_eval.run import evaluate
from kbvq_eval.suites import SUITES, task_means
from kbvq_eval.tasks import run_tasks
from kbvq_eval.windows import default_window, text_windows

VOCAB_SIZE = 61
WINDOW = 12


def random_model(seed: int, vocab_size: int = VOCAB_SIZE, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_model(1)


@pytest.fixture(scope="module")
def baseline() -> LlamaForCausalLM:
    """The model with noise added: near enough to agree with it on some tokens and not on others."""
    noisy = random_model(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return noisy


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (7, WINDOW), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(trained_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(trained_model)


def naive_log_probs(model: LlamaForCausalLM, window: torch.Tensor, position: int) -> torch.Tensor:
    """Log-probabilities of the token at `position`, in float64, from a forward of the tokens before it alone."""
    with torch.no_grad():
        logits = model(input_ids=window[None, :position]).logits[0, -1].double()
    return logits - math.log(logits.exp().sum())


def naive_scores(model: LlamaForCausalLM, baseline: LlamaForCausalLM, windows: torch.Tensor) -> dict[str, list[float]]:
    """Per-window means by definition, one position at a time."""
    result: dict[str, list[float]] = {"nll": [], "baseline_nll": [], "kl": [], "agreement": []}
    for window in windows:
        sums = dict.fromkeys(result, 0.0)
        for position in range(1, len(window)):
            log_q = naive_log_probs(model, window, position)
            log_p = naive_log_probs(baseline, window, position)
            sums["nll"] -= log_q[window[position]].item()
            sums["baseline_nll"] -= log_p[window[position]].item()
            sums["kl"] += sum(math.exp(p) * (p - q) for p, q in zip(log_p.tolist(), log_q.tolist(), strict=True))
            sums["agreement"] += float(log_p.argmax() == log_q.argmax())
        for name in result:
            result[name].append(sums[name] / (len(window) - 1))
    return result


@pytest.mark.parametrize("row_elements", [1 << 25, 5 * VOCAB_SIZE])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_scores_match_a_naive_loop(model, baseline, windows, batch_size, row_elements, monkeypatch):
    monkeypatch.setattr(divergence, "ROW_ELEMENTS", row_elements)
    expected = naive_scores(model, baseline, windows)
    cache = BaselineCache.of_model(baseline, windows, batch_size=batch_size)
    scores = score_windows(model, windows, baseline=cache, batch_size=batch_size)
    for name, values in expected.items():
        # float32 forwards and softmax: about 1e-6 of values of order 1 to 10.
        torch.testing.assert_close(getattr(scores, name), torch.tensor(values).double(), rtol=1e-5, atol=1e-5)
    assert 0 < scores.agreement.mean() < 1


def test_perplexity_without_a_baseline(model, windows):
    scores = score_windows(model, windows)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert scores.summary()["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores.kl is None and scores.delta_nll is None
    assert "kl" not in scores.summary() and "delta_nll" not in scores.summary()


def test_a_model_does_not_diverge_from_itself(model, windows):
    scores = score_windows(model, windows, baseline=BaselineCache.of_model(model, windows))
    assert torch.equal(scores.kl, torch.zeros(7, dtype=torch.float64))
    assert torch.equal(scores.delta_nll, torch.zeros(7, dtype=torch.float64))
    assert torch.equal(scores.agreement, torch.ones(7, dtype=torch.float64))


def test_kl_is_of_the_model_from_the_baseline_and_not_reversed(model, baseline, windows):
    with torch.no_grad():
        log_q, log_p = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (model, baseline))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean(-1)
    kl = score_windows(model, windows, baseline=BaselineCache.of_model(baseline, windows)).kl
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(kl, reverse, rtol=1e-2)


def test_cache_of_other_windows_is_refused(model, baseline, windows):
    with pytest.raises(ConfigError, match="other windows"):
        score_windows(model, windows + 1, baseline=BaselineCache.of_model(baseline, windows))


def test_vocabularies_must_agree(model, windows):
    with pytest.raises(ConfigError, match="vocabulary has 77 entries, the model's 61"):
        score_windows(model, windows, baseline=BaselineCache.of_model(random_model(3, vocab_size=77), windows))


def test_logits_that_are_not_finite_are_named(windows):
    broken = random_model(4)
    token = windows[3, 5].item()
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = math.nan
    first = (windows[:, :-1] == token).any(1).nonzero()[0].item()
    with pytest.raises(NumericalError, match=f"window {first}:"):
        score_windows(broken, windows, batch_size=1)


def test_standard_errors_are_over_windows_and_paired(model, baseline, windows):
    scores = score_windows(model, windows, baseline=BaselineCache.of_model(baseline, windows))
    summary = scores.summary()
    values = (scores.nll - scores.baseline_nll).tolist()
    mean = sum(values) / 7
    stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / 6 / 7)
    assert summary["delta_nll"] == pytest.approx(mean)
    assert summary["delta_nll_stderr"] == pytest.approx(stderr)
    assert summary["delta_nll"] == pytest.approx(summary["nll"] - summary["baseline_nll"])
    assert score_windows(model, windows[:1]).summary()["nll_stderr"] is None


def test_windows_partition_the_text(tokenizer):
    text = "And the earth was without form, and void; and darkness was upon the face of the deep. " * 20
    windows = text_windows(text, tokenizer, 32)
    ids = tokenizer(text)["input_ids"]
    assert windows.tokens.shape == (len(ids) // 32, 32)
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]
    protocol = windows.protocol()
    assert (protocol["window"], protocol["stride"], protocol["text_tokens"]) == (32, 32, len(ids))
    assert protocol["predicted_tokens"] == len(ids) // 32 * 31
    assert protocol["bos"] is False


def test_windows_report_a_bos_of_the_tokenizer(trained_model):
    tokenizer = AutoTokenizer.from_pretrained(trained_model)
    text = tokenizer.bos_token + "In the beginning God created the heaven"
    assert text_windows(text, tokenizer, 2).protocol()["bos"] is True


def test_text_shorter_than_a_window(tokenizer):
    with pytest.raises(ConfigError, match="less than one window of 256"):
        text_windows("In the beginning", tokenizer, 256)
    with pytest.raises(ConfigError, match="at least 2"):
        text_windows("In the beginning", tokenizer, 1)


def test_default_window_is_bounded_by_the_model(model):
    assert default_window(model.config) == 64
    assert default_window(LlamaConfig(max_position_embeddings=32768)) == 2048


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """Folders of two random models with the tokenizer of the trained one."""
    folders = []
    for seed in (5, 6):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        random_model(seed, vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, data) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text((data / "test.txt").read_text(encoding="utf-8")[:1000], encoding="utf-8")
    return path


def test_evaluate_prints_a_table_and_writes_json(saved_models, short_text, data, tmp_path, capsys):
    model, baseline = saved_models
    out = tmp_path / "results" / "eval.json"
    result = evaluate(
        model,
        baseline=baseline,
        perplexity=[str(short_text)],
        tasks=["fixture_cloze"],
        include_path=str(data / "tasks"),
        limit=6,
        window=32,
        device="cpu",
        json_path=str(out),
    )
    assert json.loads(out.read_text()) == result

    assert not out.with_name("eval.json.partial").exists()
    text = result["perplexity"]["short.txt"]
    loaded = [LlamaForCausalLM.from_pretrained(folder) for folder in saved_models]
    tokens = text_windows(short_text.read_text(), AutoTokenizer.from_pretrained(model), 32).tokens
    with torch.no_grad():
        losses = [m(input_ids=tokens, labels=tokens).loss.item() for m in loaded]
    assert text["nll"] == pytest.approx(losses[0], rel=1e-5)
    assert text["baseline_nll"] == pytest.approx(losses[1], rel=1e-5)
    assert text["kl"] > 0
    assert len(text["per_window"]["kl"]) == text["windows"] == len(tokens)

    accuracy = result["tasks"]["fixture_cloze"]["metrics"]["acc"]
    assert result["tasks"]["fixture_cloze"]["items"] == 6
    assert accuracy["difference"]["value"] == pytest.approx(accuracy["model"]["value"] - accuracy["baseline"]["value"])
    assert result["versions"]["torch"] == torch.__version__
    assert result["dtype"] == "float32"

    printed = capsys.readouterr().out
    assert f"{text['perplexity']:.3f}" in printed and f"{text['kl']:.4f}" in printed
    assert "LIMITED to the first 6 items" in printed
    assert "fixture_cloze acc_norm (6 of 678)" in printed


def test_evaluate_a_single_model(saved_models, short_text, capsys):
    result = evaluate(saved_models[0], perplexity=[str(short_text)], window=32, device="cpu", dtype="bfloat16")
    assert result["baseline"] is None and result["tasks"] == {}
    assert "kl" not in result["perplexity"]["short.txt"]
    assert "difference" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"perplexity": ["missing.txt"]}, "cannot read the text missing.txt"),
        ({"perplexity": [__file__], "dtype": "int3"}, "dtype int3"),
        ({"perplexity": [__file__], "limit": 0}, "limit is 0; it must be at least 1"),
        ({"perplexity": [__file__], "batch_size": -1}, "batch size is -1"),
        ({"perplexity": [__file__], "window": 100000}, "less than one window of 100000"),
        ({"suite": "papers"}, "suite papers is not one of quick, paper, mmlu, all"),
        ({"tasks": ["any"], "generation": True}, "generation continues a text"),
    ],
)
def test_evaluate_refuses_bad_options(saved_models, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(saved_models[0], device="cpu", **options)


def test_evaluate_names_a_model_that_is_not_there(tmp_path, short_text):
    with pytest.raises(CheckpointError, match="cannot load .*absent"):
        evaluate(str(tmp_path / "absent"), perplexity=[str(short_text)], device="cpu")


def test_evaluate_refuses_a_tokenizer_of_another_model(tmp_path, tokenizer, short_text):
    random_model(7, vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the model's own tokenizer"):
        evaluate(str(tmp_path), perplexity=[str(short_text)], window=32, device="cpu")


def test_baselines_that_cannot_be_compared_are_refused_before_one_is_loaded(
    saved_models, short_text, tmp_path, tokenizer
):
    random_model(8, vocab_size=len(tokenizer) + 3).save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    (tmp_path / "larger" / "model.safetensors").unlink()  # nothing loads it
    tiny_tokenizer(len(tokenizer)).save_pretrained(tmp_path / "other")
    shutil.copy(Path(saved_models[1]) / "config.json", tmp_path / "other")
    common = {"perplexity": [str(short_text)], "window": 32, "device": "cpu"}
    with pytest.raises(ConfigError, match=f"baseline's vocabulary has {len(tokenizer) + 3} entries"):
        evaluate(saved_models[0], baseline=str(tmp_path / "larger"), **common)
    with pytest.raises(ConfigError, match="cut short.txt into different tokens"):
        evaluate(saved_models[0], baseline=str(tmp_path / "other"), **common)


def test_an_interrupted_evaluation_goes_on_with_what_is_missing(saved_models, short_text, data, tmp_path, monkeypatch):
    out = tmp_path / "eval.json"
    options = dict(
        baseline=saved_models[1],
        perplexity=[str(short_text)],
        tasks=["fixture_cloze", "fixture_lastword"],
        include_path=str(data / "tasks"),
        limit=1,
        window=32,
        device="cpu",
    )
    expected = evaluate(saved_models[0], **options)
    ran = []

    def counted(model, tokenizer, selection, **settings):
        ran.append(*selection)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run_tasks(model, tokenizer, selection, **settings)

    monkeypatch.setattr(run, "run_tasks", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(saved_models[0], json_path=str(out), **options)
    assert not out.exists() and ran == ["fixture_cloze", "fixture_lastword"] * 2
    monkeypatch.setattr(run, "score_windows", None)  # the text is finished: nothing may measure it again
    assert evaluate(saved_models[0], json_path=str(out), **options) == expected
    assert ran[4:] == ["fixture_lastword"]


def test_data_that_is_not_there_names_the_cache_to_fill(saved_models, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="Salesforce/wikitext could not be loaded.*must be in the cache .*cache"):
        evaluate(saved_models[0], perplexity=["wikitext2"], device="cpu")


def test_generation_continues_greedily_and_counts_bytes(model, tokenizer, windows):
    found = measure_generation(random_model(5, vocab_size=len(tokenizer)), tokenizer, windows)
    reference = random_model(5, vocab_size=len(tokenizer))
    for prompt, written in zip(windows, found["continuations"], strict=False):
        ids = prompt[:6].tolist()
        for _ in range(6):
            with torch.no_grad():
                ids.append(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        assert written == {"prompt": tokenizer.decode(ids[:6]), "continuation": tokenizer.decode(ids[6:])}
    assert found["weight_bytes"] >= 4 * sum(parameter.numel() for parameter in reference.parameters())
    assert found["prefill_tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0


def metric(model: float, baseline: float, stderr: float) -> dict:
    values = {"model": model, "baseline": baseline, "difference": model - baseline}
    return {name: {"value": value, "stderr": stderr} for name, value in values.items()}


def test_means_with_and_without_lambada():
    tasks = {
        "arc_easy": {"metrics": {"acc": metric(0.5, 0.6, 0.03), "acc_norm": metric(0.4, 0.5, 0.03)}},
        "lambada_openai": {"metrics": {"acc": metric(0.7, 0.6, 0.04), "perplexity": metric(9, 8, 1)}},
        "winogrande": {"metrics": {"acc": metric(0.6, 0.9, 0.0)}},
        "wikitext": {"metrics": {"word_perplexity": metric(9, 8, 1)}},
    }
    means = task_means(tasks)
    assert means["mean of 3 tasks, acc"]["model"] == {"value": pytest.approx(0.6), "stderr": pytest.approx(0.05 / 3)}
    assert means["mean of 3 tasks, acc_norm"]["baseline"]["value"] == pytest.approx(2 / 3)
    assert means["mean of 2 tasks without LAMBADA, acc"]["difference"]["value"] == pytest.approx(-0.2)
    assert len(means) == 4


def test_paper_suite_has_the_seven_tasks_whose_mean_is_quoted():
    tasks = {task: {"metrics": {"acc": metric(0.5, 0.6, 0.03)}} for task in SUITES["paper"].tasks}
    assert len(tasks) == 10 and "mean of the paper's 7 tasks, acc" in task_means(tasks)
