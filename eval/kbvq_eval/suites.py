"""Named sets of texts and tasks, and the means over tasks that papers quote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAPER_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "lambada_openai", "lambada_standard", "piqa", "winogrande")
"""The seven zero-shot tasks of KBVQ-MoE (arXiv 2602.11184)."""

FURTHER_TASKS = ("boolq", "openbookqa", "mathqa")


@dataclass(frozen=True)
class Suite:
    """texts, tasks: as `load_text` and lm-eval name them. limit: items of each task, None for all."""

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None


SUITES = {
    "quick": Suite(("wikitext2",), ("arc_easy", "piqa", "winogrande"), limit=200),
    "paper": Suite(("wikitext2", "c4"), (*PAPER_TASKS, *FURTHER_TASKS)),
    "mmlu": Suite((), ("mmlu",)),
    "all": Suite(("wikitext2", "c4"), (*PAPER_TASKS, *FURTHER_TASKS, "mmlu")),
}


def task_means(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means of accuracies over tasks: name of the mean -> what `evaluate` writes for a metric.

    "acc": over all tasks that have it; "acc_norm": with acc_norm where a task has one and acc elsewhere. Each also
    "without LAMBADA" where LAMBADA is among them, because quantized models beat the original there by chance more than
    elsewhere, and "of the paper's seven" where these are all there and are not all that there is. A standard error
    is that of a mean of independent tasks.
    """
    accuracies = {task: entry["metrics"] for task, entry in tasks.items() if "acc" in entry["metrics"]}
    groups = {f"mean of {len(accuracies)} tasks": list(accuracies)}
    without = [task for task in accuracies if not task.startswith("lambada")]
    if len(without) < len(accuracies):
        groups[f"mean of {len(without)} tasks without LAMBADA"] = without
    if set(PAPER_TASKS) < accuracies.keys():
        groups["mean of the paper's 7 tasks"] = list(PAPER_TASKS)
    means = {}
    for label, names in groups.items():
        if len(names) < 2:
            continue
        for metric in ("acc", "acc_norm"):
            chosen = [accuracies[name].get(metric, accuracies[name]["acc"]) for name in names]
            if metric == "acc" or any(metric in accuracies[name] for name in names):
                means[f"{label}, {metric}"] = {
                    column: _mean([entry[column] for entry in chosen])
                    for column in ("model", "baseline", "difference")
                    if all(column in entry for entry in chosen)
                }
    return means


def _mean(cells: list[dict[str, float | None]]) -> dict[str, float | None]:
    errors = [cell["stderr"] for cell in cells]
    known = [error for error in errors if error is not None]
    stderr = sum(error**2 for error in known) ** 0.5 / len(cells) if len(known) == len(cells) else None
    return {"value": sum(cell["value"] or 0.0 for cell in cells) / len(cells), "stderr": stderr}
