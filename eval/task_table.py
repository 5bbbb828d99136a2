"""lm-eval accuracies beside the KL table: the recipes on the bundled model and its local tasks.

    python eval/task_table.py --bits 2 --limit 500     # writes docs/results/tasks.{json,md}

Each difference to the original model is paired item by item; its standard error is that of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from fixture_table import DATA, MODEL, ROOT, WINDOW, quantize, rows

from kbvq_eval.run import evaluate

TASKS = ("fixture_cloze", "fixture_cloze_far", "fixture_lastword")
LABELS = ("paper: IDRE + BCOS", "fast", "default", "best")


def measure(label: str, bits: int, seed: int, limit: int | None) -> dict[str, object]:
    """Quantize with a row's recipe and run the tasks on it and on the original."""
    row = next(row for row in rows(bits) if row.label == label)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        quantize(row, bits, seed, packed)
        result = evaluate(
            str(packed),
            baseline=str(MODEL),
            tasks=TASKS,
            include_path=str(DATA / "tasks"),
            limit=limit,
            window=WINDOW,
            device="cpu",
        )
    metrics = {
        task: {name: metric for name, metric in of_task["metrics"].items() if "acc" in name}
        for task, of_task in result["tasks"].items()
    }
    bits_per_weight = result["model"]["bits_per_weight"]
    return {"label": label, "bits": bits, "seed": seed, "limit": limit, "bits_per_weight": bits_per_weight} | {
        "tasks": metrics
    }


def markdown(results: list[dict]) -> str:
    """One line per recipe: accuracy in percent, and its paired difference to the original ± standard error."""
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
        lines.append(f"| {result['label']} | {result['bits_per_weight']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nMade by `python eval/task_table.py`; percent, differences paired by item.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "tasks.json")
    options = parser.parse_args()
    results = []
    for bits in options.bits:
        for label in LABELS:
            results.append(measure(label, bits, options.seed, options.limit))
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
