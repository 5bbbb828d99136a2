"""lm-eval accuracies beside the KL tables, on local tasks.

    python eval/task_table.py --bits 2 --limit 500                # kbvq's recipes on the bundled model
    python eval/task_table.py --original DIR --checkpoint default=DIR autoround=DIR --limit 200

Checkpoints are kbvq's or those of other tools made dense again (eval/real_table.py --keep, eval/peers/run.py). Writes
docs/results/tasks.{json,md}, or --output. Each difference to the original model is paired item by item; its standard
error is that of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from fixture_table import DATA, MODEL, ROOT, quantize, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbvq.storage.checkpoint import inspect_checkpoint, is_packed_checkpoint
from kbvq_eval.run import compare_results
from kbvq_eval.tasks import TaskResult, TaskSelection, find_tasks, run_tasks

TASKS = ("fixture_cloze", "fixture_cloze_far", "fixture_lastword")
LABELS = ("paper: IDRE + BCOS", "fast", "default", "best")


class Tasks:
    """The tasks on one original model, and on what was made of it."""

    def __init__(self, original: Path, limit: int | None) -> None:
        self.limit, self.tokenizer = limit, AutoTokenizer.from_pretrained(original)
        self.selection: TaskSelection = find_tasks(TASKS, DATA / "tasks")
        self.original = self.run(original)

    def run(self, folder: Path) -> dict[str, TaskResult]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return run_tasks(model, self.tokenizer, self.selection, limit=self.limit)

    def compare(self, folder: Path) -> dict[str, dict[str, object]]:
        """Accuracies of a checkpoint beside the original's, by task and metric."""
        return {
            task: {
                name: metric
                for name, metric in compare_results(result, self.original[task])["metrics"].items()
                if "acc" in name
            }
            for task, result in self.run(folder).items()
        }


def markdown(results: list[dict]) -> str:
    """One line per checkpoint: accuracy in percent, and its paired difference to the original ± standard error."""
    names = [(task, metric) for task, metrics in results[0]["tasks"].items() for metric in metrics]
    lines = ["| | true bits | " + " | ".join(f"{task} {metric}" for task, metric in names) + " |"]
    lines.append("|---|---|" + "---|" * len(names))
    originals = [results[0]["tasks"][task][metric]["baseline"]["value"] for task, metric in names]
    lines.append("| original | 16 | " + " | ".join(f"{100 * value:.1f}" for value in originals) + " |")
    for result in results:
        cells = []
        for task, metric in names:
            found = result["tasks"][task][metric]
            difference = found["difference"]
            value, change, stderr = (
                100 * number for number in (found["model"]["value"], difference["value"], difference["stderr"])
            )
            cells.append(f"{value:.1f} ({change:+.1f} ± {stderr:.1f})")
        bits = result["bits_per_weight"]
        lines.append(f"| {result['label']} | {'' if bits is None else f'{bits:.3f}'} | " + " | ".join(cells) + " |")
    items = "all items" if results[0]["limit"] is None else f"the first {results[0]['limit']} items of each task"
    lines += ["", f"Made by `python eval/task_table.py`; percent of {items}, differences paired by item."]
    return "\n".join(lines) + "\n"


def true_bits(folder: Path) -> float | None:
    """Of a packed checkpoint, or of what eval/peers/run.py made dense; None where neither says."""
    if is_packed_checkpoint(folder):
        return inspect_checkpoint(folder)["bits_per_weight"]
    row = folder.parent / "row.json"
    return json.loads(row.read_text(encoding="utf-8"))["minimal_bits"] if row.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--original", type=Path, default=MODEL)
    parser.add_argument("--checkpoint", nargs="+", metavar="LABEL=DIR", help="instead of the recipes")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "tasks.json")
    options = parser.parse_args()
    tasks = Tasks(options.original, options.limit)
    results: list[dict[str, object]] = []

    def add(label: str, folder: Path, facts: dict[str, object]) -> None:
        facts |= {"label": label, "limit": options.limit, "bits_per_weight": true_bits(folder)}
        facts |= {"tasks": tasks.compare(folder)}
        results.append(facts)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")

    for entry in options.checkpoint or ():
        label, _, folder = entry.rpartition("=")
        add(label, Path(folder), {})
    for bits in options.bits if not options.checkpoint else ():
        for label in LABELS:
            row = next(row for row in rows(bits) if row.label == label)
            with tempfile.TemporaryDirectory() as name:
                quantize(row, bits, options.seed, Path(name) / "packed")
                add(label, Path(name) / "packed", {"bits": bits, "seed": options.seed})


if __name__ == "__main__":
    main()
