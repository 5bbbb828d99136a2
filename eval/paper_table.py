"""Published and own numbers of the paper side by side: `python eval/paper_table.py WORK [--results FILE]`.

WORK is what eval/reproduce_paper.sh filled: WORK/<model>-<row>.json of `kbvq eval`. Each is entered as "own" beside
what is published in the results file, the baseline as the row fp16, and FILE with .md in place of .json gets the table.
Rows that were not run stay empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ACCURACY = "mean of the paper's 7 tasks, acc"
Numbers = dict[str, float]


def own_numbers(result: dict[str, Any]) -> tuple[Numbers, Numbers]:
    """(model's, baseline's): perplexity on the first text, accuracy in percent if the paper's tasks were run, and the
    model's true bits per expert weight. result: of `kbvq eval`."""
    scores = next(iter(result["perplexity"].values()))
    ours, theirs = {"perplexity": scores["perplexity"]}, {"perplexity": scores["baseline_perplexity"]}
    if ACCURACY in result["means"]:
        mean = result["means"][ACCURACY]
        ours["accuracy"], theirs["accuracy"] = (100 * mean[side]["value"] for side in ("model", "baseline"))
    ours["bits_per_weight"] = result["model"]["bits_per_weight"]
    return ours, theirs


def collect(work: Path, models: dict[str, dict[str, Any]]) -> None:
    """Enter what lies in `work` into `models`: name -> row -> {"published": …, "own": …}; others' rows are added."""
    for file in sorted(work.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        path = result["baseline"]["path"]
        rows = models.setdefault(path, {})
        ours, theirs = own_numbers(result)
        for row, numbers in ((file.stem.removeprefix(f"{Path(path).name}-"), ours), ("fp16", theirs)):
            rows.setdefault(row, {"published": None})["own"] = numbers


def markdown(source: str, models: dict[str, dict[str, Any]]) -> str:
    lines = ["# The paper's numbers and ours", "", f"Published: {source}. Own: `eval/reproduce_paper.sh`; empty where"]
    lines[-1] += " it was not run. A row is named by what is quantized how, and by its code bits."
    for model, rows in models.items():
        lines += [
            "",
            f"## {model}",
            "",
            "| row | perplexity, published | own | accuracy, published | own | own true bits |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, row in rows.items():
            sides = [row[side] or {} for side in ("published", "own")]
            cells = [side.get(number) for number in ("perplexity", "accuracy") for side in sides]
            cells.append(sides[1].get("bits_per_weight"))
            forms = [".2f"] * 4 + [".3f"]
            shown = ["" if cell is None else format(cell, form) for cell, form in zip(cells, forms, strict=True)]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "paper.json")
    options = parser.parse_args(arguments)
    content = {"source": "nothing", "models": {}}
    if options.results.is_file():
        content = json.loads(options.results.read_text(encoding="utf-8"))
    collect(options.work, content["models"])
    options.results.write_text(dumped(content), encoding="utf-8")
    table = markdown(content["source"], content["models"])
    options.results.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def dumped(content: dict[str, Any]) -> str:
    """JSON with one line for each row of a model."""
    models = []
    for model, rows in content["models"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        models.append(f"  {json.dumps(model)}: {{\n" + ",\n".join(lines) + "\n  }")
    return f'{{\n "source": {json.dumps(content["source"])},\n "models": {{\n' + ",\n".join(models) + "\n }\n}\n"


if __name__ == "__main__":
    main()
