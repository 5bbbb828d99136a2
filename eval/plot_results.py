"""The picture of the README: KL against true bits, ours and the other tools', from the recorded results.

    python eval/plot_results.py [--results docs/results]

Reads {fixture,peers}.json there, and real.json where there is one, and writes comparison.svg: a panel for the bundled
model and one for each testbed of the real model. Every point is a mean over the seeds that were measured; a line joins
the rates of a tool. The axis above is the size of the whole bundled model: all that is no expert keeps 16 bits in every
row. The same results and matplotlib give the same bytes; colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from kbvq_eval.stored import stored

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BUNDLED = ROOT / "tests" / "models" / "tiny-qwen3-moe"
Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Tool:
    """A line of the picture. rows: the names that it has in the results."""

    label: str
    colour: str
    marker: str
    rows: tuple[str, ...]


# Colours have a contrast of at least 3.5 to both papers, white and nearly black.
TOOLS = (
    Tool("round to nearest", "#808890", "s", ("rtn",)),
    Tool("llm-compressor GPTQ", "#1a9a5a", "s", ("llmcompressor",)),
    Tool("GPTQModel", "#c9720a", "s", ("gptqmodel",)),
    Tool(
        "llama.cpp, importance matrix",
        "#e5484d",
        "s",
        tuple(f"llamacpp-{name}" for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
    ),
    Tool("AutoRound", "#a05fe0", "s", ("autoround",)),
    Tool("kbvq paper", "#1f77e0", "o", ("kbvq paper: IDRE + BCOS",)),
    Tool("kbvq fast", "#1f77e0", "v", ("kbvq fast",)),
    Tool("kbvq default", "#1f77e0", "D", ("kbvq default", "kbvq default, fewer bits")),
    Tool("kbvq best", "#1f77e0", "*", ("kbvq best",)),
)
TESTBEDS = {
    "one": "SmolLM2-135M, one expert a layer",
    "dealt": "SmolLM2-135M, dealt to 8 experts",
    "carved": "SmolLM2-135M, carved",
    "upcycled": "SmolLM2-135M, upcycled",
}

# matplotlib draws with these two, and the style sheet says what they are in either scheme.
_PAPER, _INK = "#123456", "#123457"
_SCHEMES = (
    "svg { --paper: #ffffff; --ink: #1f2328 }"
    " @media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #e6edf3 } }"
)
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "kbvq",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "savefig.facecolor": _PAPER,
}


def bundled_points(results: Path) -> Series:
    """Tool -> (true bits, mean KL) by rate."""
    ours = [(f"kbvq {row['label']}", row["bits_per_weight"], row["kl"]) for row in _rows(results / "fixture.json")]
    theirs = [(row["peer"], row["bits_per_weight"], row["scores"]["kl"]) for row in _rows(results / "peers.json")]
    return _means([*ours, *theirs])


def real_points(results: Path) -> dict[str, Series]:
    """The same of each testbed of real.json, on the test text where that was measured."""
    rows = _rows(results / "real.json")
    texts = {model: {row["text"] for row in rows if row["model"] == model} for model in {r["model"] for r in rows}}
    chosen = {model: "test" if "test" in found else "validation" for model, found in texts.items()}
    return {
        f"{TESTBEDS[model]}, {text} text": _means(
            (row["tool"], row["bits_per_weight"], row["kl"])
            for row in rows
            if (row["model"], row["text"]) == (model, text)
        )
        for model, text in sorted(chosen.items())
    }


def draw(results: Path) -> Path:
    panels = {"bundled model, test text": bundled_points(results)}
    if (results / "real.json").is_file():
        panels |= real_points(results)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * columns, 1 + 4.2 * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
        for axes, (name, series) in zip(places, panels.items(), strict=False):
            _draw(axes, series, name)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        _add_size(places[0])
        shown = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        labels = [tool.label for tool in TOOLS if tool.label in shown]
        figure.legend([shown[label] for label in labels], labels, loc="outside lower center", ncols=3)
        return _save(figure, results / "comparison.svg")


def _rows(path: Path) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["results"] if "results" in content else content["rows"]


def _means(measured: Iterable[tuple[str, float, float]]) -> Series:
    """Of (name of a row, true bits, KL): for each tool the means over the runs of a name that round to equal bits."""
    labels = {row: tool.label for tool in TOOLS for row in tool.rows}
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = defaultdict(list)
    for name, bits, kl in measured:
        if name in labels:
            found[labels[name], name, round(bits, 1)].append((bits, kl))
    series: Series = defaultdict(list)
    for (label, *_), runs in found.items():
        series[label].append((statistics.mean(bits for bits, _ in runs), statistics.mean(kl for _, kl in runs)))
    return {label: sorted(points) for label, points in series.items()}


def _draw(axes: Axes, series: Series, title: str) -> None:
    for tool in TOOLS:
        if tool.label in series:
            ours = tool.label.startswith("kbvq")
            axes.plot(
                *zip(*series[tool.label], strict=True),
                label=tool.label,
                color=tool.colour,
                marker=tool.marker,
                markersize=9 if tool.marker == "*" else 6,
                linestyle="-" if ours else "--",
                linewidth=2 if ours else 1.2,
                zorder=3 if ours else 2,
            )
    axes.margins(y=0.12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.set_xlabel("bits per expert weight, everything stored")
    axes.set_ylabel("KL(original ‖ quantized), nats per token")
    axes.set_title(title)


def _add_size(axes: Axes) -> None:
    """The size of the whole bundled model above its panel."""
    original = stored(BUNDLED)
    assert original is not None
    rest, weights = original.num_bytes - original.expert_bytes, original.expert_elements
    above = axes.secondary_xaxis(
        "top",
        functions=(lambda bits: (rest + bits * weights / 8) / 1e6, lambda size: (size * 1e6 - rest) * 8 / weights),
    )
    above.set_xlabel("size of the whole model, MB")


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": "KL against true bits"})
    svg = buffer.getvalue().replace("<defs>", f'<defs>\n  <style type="text/css">{_SCHEMES}</style>', 1)
    path.write_text(svg.replace(_PAPER, "var(--paper)").replace(_INK, "var(--ink)"), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(draw(parser.parse_args(arguments).results))


if __name__ == "__main__":
    main()
