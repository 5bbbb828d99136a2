"""The picture of the README: KL against true bits, ours and the peers', from the recorded results.

    python eval/plot_results.py      # reads docs/results/{fixture,peers}.json, writes docs/results/comparison.svg

Every point is a mean over the seeds that were measured; a line joins the rates of a tool.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
OURS = ("paper: IDRE + BCOS", "fast", "default", "best")


def points() -> dict[str, list[tuple[float, float]]]:
    """Name -> (true bits, mean KL) by rate; ours begin with kbvq."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in json.loads((RESULTS / "fixture.json").read_text(encoding="utf-8"))["results"]:
        if row["label"] in OURS:
            name = f"kbvq {row['label'].partition(':')[0]}"
            found[name, row["bits"]].append((row["bits_per_weight"], row["kl"]))
    for row in json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))["rows"]:
        found[row["peer"], row["bits"]].append((row["bits_per_weight"], row["scores"]["kl"]))
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (name, _), values in sorted(found.items()):
        series[name].append((statistics.mean(bits for bits, _ in values), statistics.mean(kl for _, kl in values)))
    return dict(series)


def draw(path: Path) -> None:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, values in points().items():
        ours = name.startswith("kbvq")
        style = {"linestyle": "-", "marker": "o", "linewidth": 2} if ours else {"linestyle": "--", "marker": "s"}
        axes.plot(*zip(*values, strict=True), label=name, markersize=5, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per expert weight, everything stored")
    axes.set_ylabel("KL(original ‖ quantized), nats per token")
    axes.set_title("Bundled model, unseen text")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(RESULTS / "comparison.svg")
    print(RESULTS / "comparison.svg")
