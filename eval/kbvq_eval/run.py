"""Evaluate one model, beside its baseline if there is one: `kbvq eval`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import kbvq
from kbvq.errors import CheckpointError, ConfigError
from kbvq.storage.checkpoint import inspect_checkpoint
from kbvq_eval.divergence import mean_stderr, score_windows
from kbvq_eval.report import format_table
from kbvq_eval.tasks import Metric, TaskResult, find_tasks, run_tasks
from kbvq_eval.windows import default_window, text_windows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASK_BATCH_SIZE = 16
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "lm_eval")


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    perplexity: str | None = None,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    json_path: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model, print one table and, with `json_path`, write one JSON file; returns what the file holds.

    model, baseline: a folder or hub name, loaded by AutoModelForCausalLM in the same dtype. perplexity: a UTF-8 text
    file. tasks: names of lm-eval tasks, `include_path` the folder of local ones, `limit` the items of each.
    window: tokens, default min(2048, the model's longest sequence). batch_size: windows, or task requests, per
    forward. device: "cpu", "cuda", "cuda:1" or "auto" (all there are); default cuda where there is one. dtype:
    "float32" (default on the CPU), "bfloat16" (default elsewhere) or "float16".
    Raises ConfigError for options that cannot be used (before a model is loaded where that can be known) and
    CheckpointError for a model that cannot be loaded.
    """
    if perplexity is None and not tasks:
        raise ConfigError("nothing to evaluate: pass a text (--perplexity FILE), tasks (--tasks), or both")
    for name, value in (("limit", limit), ("window", window), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    text = None if perplexity is None else _read_text(perplexity)
    selection = find_tasks(tasks, include_path) if tasks else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} is not available: torch sees no CUDA device; use --device cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)

    evaluated, tokenizer = _load(model, device, dtype)
    reference = None if baseline is None else _load(baseline, device, dtype)[0]
    scores = None
    if text is not None:
        scores = _score_text(evaluated, reference, tokenizer, text, window, batch_size) | {"file": str(perplexity)}
    task_results = {}
    if selection is not None:
        options = {"limit": limit, "batch_size": batch_size or TASK_BATCH_SIZE}
        ours = run_tasks(evaluated, tokenizer, selection, **options)
        theirs = None if reference is None else run_tasks(reference, tokenizer, selection, **options)
        task_results = {
            task: _compare(result, None if theirs is None else theirs[task]) for task, result in ours.items()
        }

    result = {
        "model": _identity(model),
        "baseline": None if baseline is None else _identity(baseline),
        "dtype": dtype,
        "device": device,
        "limit": limit,
        "perplexity": scores,
        "tasks": task_results,
        "versions": _versions(),
    }
    print(format_table(result))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {path}: {error}; pass a UTF-8 text file") from error


def _load(model: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype], device_map=device)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {model}: {error}") from error
    return loaded.eval(), tokenizer


def _score_text(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None,
    batch_size: int | None,
) -> dict[str, Any]:
    windows = text_windows(text, tokenizer, window or default_window(model.config))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if windows.tokens.max() >= vocab_size:
        raise ConfigError(
            f"the tokenizer yields token {windows.tokens.max()} of a vocabulary of {vocab_size}; "
            "use the model's own tokenizer"
        )
    scores = score_windows(model, windows.tokens, baseline=baseline, batch_size=batch_size)
    series = {"nll": scores.nll, "baseline_nll": scores.baseline_nll, "kl": scores.kl, "agreement": scores.agreement}
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        **windows.protocol(),
        **scores.summary(),
        "per_window": {name: values.tolist() for name, values in series.items() if values is not None},
    }


def _compare(model: TaskResult, baseline: TaskResult | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, metric in model.metrics.items():
        metrics[name] = {"model": {"value": metric.value, "stderr": metric.stderr}}
        if baseline is not None:
            other = baseline.metrics[name]
            metrics[name]["baseline"] = {"value": other.value, "stderr": other.stderr}
            metrics[name]["difference"] = _difference(metric, other)
    return {"items": model.items, "total": model.total, "metrics": metrics}


def _difference(metric: Metric, baseline: Metric) -> dict[str, float | None]:
    """Metric minus baseline; the standard error is that of the difference item by item, as both saw the same items."""
    stderr = None
    if metric.per_item is not None and baseline.per_item is not None:
        stderr = mean_stderr(torch.tensor(metric.per_item).double() - torch.tensor(baseline.per_item).double())[1]
    return {"value": metric.value - baseline.value, "stderr": stderr}


def _identity(model: str) -> dict[str, Any]:
    """Where a model came from and, for a kbvq checkpoint in a folder, its size by the bytes on disk."""
    bits: dict[str, Any] = {}
    config = Path(model) / "config.json"
    if config.is_file():
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        if quantization.get("quant_method") == "kbvq":
            bits = inspect_checkpoint(Path(model))
    return {"path": model, "bits_per_weight": bits.get("bits_per_weight"), "code_bits": bits.get("code_bits")}


def _versions() -> dict[str, str]:
    versions = {"kbvq": kbvq.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
