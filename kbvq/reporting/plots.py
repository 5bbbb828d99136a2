"""The pictures of the report: SVG that takes its colours from the page, so that it follows light and dark.

matplotlib draws with the colours of _INK, _GRID and SERIES, which stand for variables of the page's style sheet.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_INK, _GRID = "#123456", "#123457"
SERIES = ("#123461", "#123462", "#123463", "#123464")
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {c: f"var(--series-{n})" for n, c in enumerate(SERIES, 1)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "kbvq",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def stacked_bars(name: str, labels: Sequence[str], parts: dict[str, Sequence[float]], axis: str) -> str:
    """A horizontal bar for each label, made of the parts. Returns SVG, like all functions here."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.7 + 0.55 * len(labels) + 0.5)
        left = [0.0] * len(labels)
        for order, (part, values) in enumerate(parts.items()):
            # More parts than colours: the second round is hatched.
            hatch = "" if order < len(SERIES) else "//"
            colour = SERIES[order % len(SERIES)]
            axes.barh(labels, values, left=left, label=part, color=colour, hatch=hatch, edgecolor=_GRID, linewidth=0.5)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(axis)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=3)
        return _svg(figure, name)


def grouped_bars(
    name: str, labels: Sequence[str], series: dict[str, Sequence[float | None]], axis: str, *, log: bool = False
) -> str:
    """A group of vertical bars for each label; None leaves a gap."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0)
        width = 0.8 / len(series)
        for order, (label, values) in enumerate(series.items()):
            places = [index + (order - (len(series) - 1) / 2) * width for index in range(len(labels))]
            heights = [math.nan if value is None else value for value in values]
            axes.bar(places, heights, width, label=label, color=SERIES[order])
        if log:
            axes.set_yscale("log")
        _label_x(axes, labels)
        axes.set_ylabel(axis)
        axes.grid(axis="x", visible=False)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=4)
        return _svg(figure, name)


def heat_map(
    name: str,
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    axis: str,
    columns: Sequence[str] | None = None,
    unit: str,
    log: bool = False,
    marks: dict[str, list[tuple[int, int]]] | None = None,
) -> str:
    """A cell for each value; rows may differ in length. marks: by a letter, the (row, column) of the cells that bear
    it."""
    width = max(map(len, values))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.9 + max(0.28 * len(rows), 1.0))
        grid = [[*row, *[math.nan] * (width - len(row))] for row in values]
        positive = [value for row in grid for value in row if value > 0]
        norm = matplotlib.colors.LogNorm(min(positive), max(positive)) if log and positive else None
        image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axes.grid(visible=False)
        axes.set_yticks(range(len(rows)), rows)
        if columns is not None:
            axes.set_xticks(range(len(columns)), columns)
        axes.set_xlabel(axis)
        middle = image.norm.vmin + (image.norm.vmax - image.norm.vmin) / 2 if positive else 0
        for letter, cells in (marks or {}).items():
            for row, column in cells:
                light = grid[row][column] > middle
                axes.text(column, row, letter, ha="center", va="center", color="#000000" if light else "#ffffff")
        figure.colorbar(image, ax=axes, label=unit)
        return _svg(figure, name)


def curves(
    name: str, series: dict[str, Sequence[tuple[float, float]]], *, x_axis: str, y_axis: str, log: bool = False
) -> str:
    """A line through the points of each series; of many, the first and last alone are named."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.2)
        many = len(series) > len(SERIES)
        for order, (label, points) in enumerate(series.items()):
            shade = matplotlib.colormaps["viridis"](0.1 + 0.8 * order / max(1, len(series) - 1))
            named = not many or order in (0, len(series) - 1)
            axes.plot(
                *zip(*points, strict=True), color=shade if many else SERIES[order], label=label if named else None
            )
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(x_axis)
        axes.set_ylabel(y_axis)
        figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, name)


def timeline(name: str, steps: Sequence[tuple[str, float, float]]) -> str:
    """(name, start, seconds) of each step: a row for each name, a block for each step."""
    names = list(dict.fromkeys(step for step, _, _ in steps))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.8 + 0.4 * len(names))
        for row, label in enumerate(names):
            blocks = [(start, seconds) for step, start, seconds in steps if step == label]
            axes.broken_barh(blocks, (row - 0.35, 0.7), color=SERIES[0], edgecolor=_GRID, linewidth=0.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("seconds from the start, pauses left out")
        axes.grid(axis="y", visible=False)
        return _svg(figure, name)


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.6, height), layout="constrained")
    return figure, figure.subplots()


def _label_x(axes: Any, labels: Sequence[str]) -> None:
    """Every label, or at most some thirty of them."""
    step = max(1, math.ceil(len(labels) / 32))
    places = range(0, len(labels), step)
    axes.set_xticks(places, [labels[place] for place in places], rotation=90 if max(map(len, labels)) > 3 else 0)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element for a page: no fixed size, colours by variables, identifiers that are its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
