"""The pictures of the README: KL against true bits and whole size, ours and the peers', from the recorded results.

    python eval/plot_results.py [--results docs/results]

Reads {fixture,peers,real}.json there and writes comparison.svg, of the bundled model, and real.svg, of the testbeds of
the real model, where real.json is. Every point is a mean over the seeds that were measured; a line joins the rates of a
tool. The axis above is the size of the whole model: all that is no expert keeps 16 bits in every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kbvq_eval.stored import stored

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BUNDLED = ROOT / "tests" / "models" / "tiny-qwen3-moe"
OURS = ("paper: IDRE + BCOS", "fast", "default", "best")
Series = dict[str, list[tuple[float, float]]]


def bundled_points(results: Path) -> Series:
    """Name -> (true bits, mean KL) by rate; ours begin with kbvq."""
    measured = []
    for row in _read(results / "fixture.json")["results"]:
        if row["label"] in OURS:
            name = f"kbvq {row['label'].partition(':')[0]}"
            measured.append((name, row["bits"], row["bits_per_weight"], row["kl"]))
    for row in _read(results / "peers.json")["rows"]:
        measured.append((row["peer"], row["bits"], row["bits_per_weight"], row["scores"]["kl"]))
    return _means(measured)


def real_points(results: Path) -> dict[str, Series]:
    """The same of each testbed of real.json, on the test text where that was measured."""
    rows = _read(results / "real.json")["results"]
    texts = {model: {row["text"] for row in rows if row["model"] == model} for model in {r["model"] for r in rows}}
    chosen = {model: "test" if "test" in found else "validation" for model, found in texts.items()}
    return {
        f"{model}, {text} text": _means(
            (row["tool"], row["group"], row["bits_per_weight"], row["kl"])
            for row in rows
            if (row["model"], row["text"]) == (model, text)
        )
        for model, text in sorted(chosen.items())
    }


def draw_bundled(results: Path) -> Path:
    figure = Figure(figsize=(7.5, 4.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _draw(axes, bundled_points(results), "Bundled model, unseen text")
    original = stored(BUNDLED)
    assert original is not None
    rest, weights = original.num_bytes - original.expert_bytes, original.expert_elements
    above = axes.secondary_xaxis(
        "top",
        functions=(lambda bits: (rest + bits * weights / 8) / 1e6, lambda size: (size * 1e6 - rest) * 8 / weights),
    )
    above.set_xlabel("size of the whole model, MB")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, results / "comparison.svg")


def draw_real(results: Path) -> Path:
    panels = real_points(results)
    figure = Figure(figsize=(1.5 + 5 * len(panels), 4.5), layout="constrained", facecolor="white")
    for axes, (name, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw(axes, series, name)
        axes.legend(frameon=False, fontsize=7)
    return _save(figure, results / "real.svg")


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _means(measured: Iterable[tuple[str, int, float, float]]) -> Series:
    """Of (name, group, true bits, KL): the mean of each name's runs in a group."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for name, group, bits, kl in measured:
        found[name, group].append((bits, kl))
    series: Series = defaultdict(list)
    for (name, _), values in sorted(found.items()):
        series[name].append((statistics.mean(bits for bits, _ in values), statistics.mean(kl for _, kl in values)))
    return dict(series)


def _draw(axes: Axes, series: Series, title: str) -> None:
    for name, values in series.items():
        ours = name.startswith("kbvq")
        style = {"linestyle": "-", "marker": "o", "linewidth": 2} if ours else {"linestyle": "--", "marker": "s"}
        axes.plot(*zip(*sorted(values), strict=True), label=name, markersize=5, **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per expert weight, everything stored")
    axes.set_ylabel("KL(original ‖ quantized), nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args(arguments).results
    print(draw_bundled(results))
    if (results / "real.json").is_file():
        print(draw_real(results))


if __name__ == "__main__":
    main()
