"""Evaluate one model, beside its baseline if there is one: `kbvq eval`.

Baseline and model are never in memory together. What the baseline predicts on the texts is kept on disk (baseline.py),
streamed by decoder layer where kbvq knows its family; for tasks and generation it is loaded, measured and dropped
before the model is loaded. Each text, task and model is a part that an interrupted run does not measure again
(parts.py).
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kbvq.errors import CheckpointError, ConfigError, UnsupportedModelError
from kbvq.models.layer_stream import LayerStream, resolve_model_folder
from kbvq.reporting.run_report import EVALUATION
from kbvq.storage.checkpoint import inspect_checkpoint, is_packed_checkpoint
from kbvq.storage.provenance import hardware, versions
from kbvq_eval.baseline import BaselineCache
from kbvq_eval.divergence import mean_stderr, score_windows
from kbvq_eval.generation import measure_generation
from kbvq_eval.loading import DTYPES, LoadedModel
from kbvq_eval.parts import FinishedParts
from kbvq_eval.suites import SUITES, Suite, task_means
from kbvq_eval.table import format_table
from kbvq_eval.tasks import Metric, TaskResult, TaskSelection, find_tasks, run_tasks
from kbvq_eval.texts import EvaluationText, load_text
from kbvq_eval.windows import TextWindows, default_window, text_windows

logger = logging.getLogger("kbvq")

TASK_BATCH_SIZE = 16


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    suite: str | None = None,
    perplexity: Sequence[str] = (),
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int | None = None,
    generation: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    json_path: str | None = None,
    report: bool = False,
) -> dict[str, Any]:
    """Evaluate a model, print one table and, with `json_path`, write one JSON file; returns what the file holds.

    model, baseline: a folder, hub name or .gguf file, loaded by its own loader (`LoadedModel`) in the same dtype.
    suite: one of SUITES, which also measures generation. perplexity: texts (`load_text`) besides. tasks: names of
    lm-eval tasks besides, `include_path` the folder of local ones, `limit` the items of each. window: tokens, default
    min(2048, the model's longest sequence). batch_size: windows, or task requests, per forward. generation: rates,
    memory and continuations of the first text. device: "cpu", "cuda", "cuda:1" or "auto" (all there are); default cuda
    where there is one. dtype: "float32" (default on the CPU), "bfloat16" (default elsewhere) or "float16".

    report: also put the result into the model's folder, whose report and card then show it.

    With `json_path`, finished parts lie in `<json_path>.partial` until the file is written, and a run with the same
    arguments goes on from them; without, in a temporary folder.
    Raises ConfigError for options that cannot be used and for a baseline of another vocabulary (before a model is
    loaded where that can be known), and CheckpointError for a model that cannot be loaded.
    """
    chosen = SUITES[suite] if suite in SUITES else Suite()
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"suite {suite} is not one of {', '.join(SUITES)}")
    texts, tasks = (*chosen.texts, *perplexity), (*chosen.tasks, *tasks)
    if not texts and not tasks:
        raise ConfigError("nothing to evaluate: pass a text (--perplexity FILE), tasks (--tasks), or a --suite")
    for name, value in (("limit", limit), ("window", window), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} is not available: torch sees no CUDA device; use --device cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    read = {text.name: text for text in map(load_text, dict.fromkeys(texts))}
    if report and not is_packed_checkpoint(Path(model)):
        raise ConfigError(f"--report needs a packed checkpoint in a local folder; {model} is none")
    if (generation or suite is not None) and not read:
        raise ConfigError("generation continues a text: pass one with --perplexity")
    original = None if baseline is None else LoadedModel(baseline, device, dtype)
    measured = Measurement(
        model=LoadedModel(model, device, dtype, vocabulary=None if original is None else original.tokenizer),
        baseline=original,
        texts=read,
        window=window,
        tasks=find_tasks(tasks, include_path) if tasks else None,
        limit=limit if limit is not None else chosen.limit,
        batch_size=batch_size,
        generation=generation or suite is not None,
    )
    if json_path is None:
        with tempfile.TemporaryDirectory(prefix="kbvq-eval-") as folder:
            result = measured.run(FinishedParts(Path(folder)))
    else:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = FinishedParts(path.with_name(path.name + ".partial"))
        result = measured.run(parts)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        parts.remove()
    print(format_table(result))
    if report:
        (Path(model) / EVALUATION).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        from kbvq.reporting import write_documents

        for path in write_documents(Path(model)):
            print(f"written   {path}")
    return result


class Measurement:
    """What is measured of one model, and of its baseline; see `evaluate`."""

    def __init__(
        self,
        *,
        model: LoadedModel,
        baseline: LoadedModel | None,
        texts: dict[str, EvaluationText],
        window: int | None,
        tasks: TaskSelection | None,
        limit: int | None,
        batch_size: int | None,
        generation: bool,
    ) -> None:
        self.model, self.baseline, self.texts = model, baseline, texts
        self.tasks, self.limit, self.batch_size, self.generation = tasks, limit, batch_size, generation
        self.windows = {name: self._windows(model, text, window) for name, text in texts.items()}
        if baseline is not None:
            self._check_baseline(model, baseline, window)

    def run(self, parts: FinishedParts) -> dict[str, Any]:
        """Measure what the folder of parts lacks, the baseline first; the result as JSON."""
        both = [self.model] if self.baseline is None else [self.baseline, self.model]
        tasks, generations = {}, {}
        for loaded in both:
            if loaded is self.baseline:
                for name in self.texts:
                    self._keep_predictions(name, parts)
            else:
                texts = {name: self._score(name, parts) for name in self.texts}
            tasks[loaded] = {task: self._run_task(loaded, task, parts) for task in self.tasks or ()}
            if self.generation:
                generations[loaded] = parts.get(
                    "generation", self._settings(loaded), lambda loaded=loaded: self._generate(loaded)
                )
            loaded.drop()
        compared = {}
        for task, ours in tasks[self.model].items():
            theirs = None if self.baseline is None else tasks[self.baseline][task]
            compared |= {
                name: compare_results(result, None if theirs is None else theirs[name]) | {"part_of": task}
                for name, result in ours.items()
            }
        asked = {name: entry for name, entry in compared.items() if name in tasks[self.model]}
        return {
            "model": _identity(self.model.path),
            "baseline": None if self.baseline is None else _identity(self.baseline.path),
            "dtype": self.model.dtype,
            "device": self.model.device,
            "limit": self.limit,
            "perplexity": texts,
            "tasks": compared,
            "means": task_means(asked),
            "generation": {
                "model" if loaded is self.model else "baseline": found for loaded, found in generations.items()
            },
            "versions": versions(),
            "hardware": hardware(),
        }

    def _windows(self, model: LoadedModel, text: EvaluationText, window: int | None) -> TextWindows:
        windows = text_windows(text.text, model.tokenizer, window or default_window(model.config), text.max_windows)
        if windows.tokens.max() >= model.vocab_size:
            raise ConfigError(
                f"the tokenizer yields token {windows.tokens.max()} of a vocabulary of {model.vocab_size}; "
                "use the model's own tokenizer"
            )
        return windows

    def _check_baseline(self, model: LoadedModel, baseline: LoadedModel, window: int | None) -> None:
        if model.vocab_size != baseline.vocab_size:
            raise ConfigError(
                f"the baseline's vocabulary has {baseline.vocab_size} entries, the model's {model.vocab_size}; "
                "compare a model with the one it was made from"
            )
        for name, text in self.texts.items():
            theirs = self._windows(baseline, text, window or self.windows[name].tokens.shape[1])
            if not torch.equal(theirs.tokens, self.windows[name].tokens):
                raise ConfigError(
                    f"the tokenizers of {model.path} and {baseline.path} cut {name} into different tokens; compare a "
                    "model with the one it was made from"
                )

    def _settings(self, loaded: LoadedModel) -> dict[str, Any]:
        """What every part of a model depends on."""
        return {
            "model": loaded.fingerprint,
            "dtype": loaded.dtype,
            "device": loaded.device,
            "batch_size": self.batch_size,
            "texts": {name: [text.sha256, self.windows[name].tokens.shape[1]] for name, text in self.texts.items()},
            "versions": versions(),
        }

    def _predictions_folder(self, name: str, parts: FinishedParts) -> Path:
        assert self.baseline is not None
        return parts.path(f"baseline-{name}", self._settings(self.baseline), suffix="")

    def _keep_predictions(self, name: str, parts: FinishedParts) -> None:
        """What the baseline predicts on a text, in a folder of the parts."""
        assert self.baseline is not None
        folder = self._predictions_folder(name, parts)
        scored = self._settings(self.model) | {"baseline": self.baseline.fingerprint}
        if (folder / "baseline.json").is_file() or parts.has(name, scored):
            return
        tokens, options = self.windows[name].tokens, {"batch_size": self.batch_size, "folder": folder}
        dtype = DTYPES[self.baseline.dtype]
        device = "cuda" if self.baseline.device == "auto" else self.baseline.device
        try:
            source = resolve_model_folder(self.baseline.path)
            LayerStream(source, dtype=dtype, device="meta")
        except (UnsupportedModelError, CheckpointError) as error:
            logger.info("the baseline is loaded whole: %s", error)
            BaselineCache.of_model(self.baseline.model(), tokens, **options)
        else:
            BaselineCache.streamed(source, tokens, dtype=dtype, device=device, **options)

    def _score(self, name: str, parts: FinishedParts) -> dict[str, Any]:
        settings = self._settings(self.model)
        if self.baseline is not None:
            settings["baseline"] = self.baseline.fingerprint
        return parts.get(name, settings, lambda: self._score_text(name, parts))

    def _score_text(self, name: str, parts: FinishedParts) -> dict[str, Any]:
        windows, text = self.windows[name], self.texts[name]
        cache = None
        if self.baseline is not None:
            cache = BaselineCache.open(self._predictions_folder(name, parts), windows.tokens)
        scores = score_windows(self.model.model(), windows.tokens, baseline=cache, batch_size=self.batch_size)
        series = {name: getattr(scores, name) for name in ("nll", "baseline_nll", "kl", "agreement")}
        return {
            "source": text.source,
            "sha256": text.sha256,
            **windows.protocol(),
            **scores.summary(),
            "router_agreement": scores.router_agreement,
            "per_window": {name: values.tolist() for name, values in series.items() if values is not None},
        }

    def _run_task(self, loaded: LoadedModel, task: str, parts: FinishedParts) -> dict[str, TaskResult]:
        assert self.tasks is not None
        selection = self.tasks.only(task)

        def measure() -> dict[str, Any]:
            results = run_tasks(
                loaded.model(),
                loaded.tokenizer,
                selection,
                limit=self.limit,
                batch_size=self.batch_size or TASK_BATCH_SIZE,
            )
            return {name: asdict(result) for name, result in results.items()}

        settings = self._settings(loaded) | {"limit": self.limit}
        return {name: TaskResult.from_dict(found) for name, found in parts.get(task, settings, measure).items()}

    def _generate(self, loaded: LoadedModel) -> dict[str, Any]:
        tokens: Tensor = next(iter(self.windows.values())).tokens
        return measure_generation(loaded.model(), loaded.tokenizer, tokens)


def compare_results(model: TaskResult, baseline: TaskResult | None) -> dict[str, Any]:
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
    """Where a model came from, the bytes of its weights and, for a packed checkpoint, its bits by the bytes on disk."""
    path = Path(model)
    bits: dict[str, Any] = inspect_checkpoint(path) if is_packed_checkpoint(path) else {}
    files = [path] if path.is_file() else list(path.glob("*.safetensors")) if path.is_dir() else []
    return {
        "path": model,
        "bits_per_weight": bits.get("bits_per_weight"),
        "code_bits": bits.get("code_bits"),
        "file_bytes": sum(file.stat().st_size for file in files) or None,
    }
