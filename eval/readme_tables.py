"""The tables of the README that scripts write, each between marks of its own."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


SCORES = ("bits_per_weight", "kl", "delta_nll", "delta_nll_stderr", "agreement")


def score_cells(runs: list[dict], digits: int) -> list[str]:
    """True bits, KL, ΔNLL ± s.e. and top-1 agreement, means over seeds; dashes where there are no runs."""
    if not runs:
        return ["–"] * 4
    bits, kl, nll, error, agreement = (statistics.fmean(run[score] for run in runs) for score in SCORES)
    return [f"{bits:.2f}", f"{kl:.{digits}f}", f"{nll:.{digits}f} ± {error:.{digits}f}", f"{100 * agreement:.1f} %"]


def write_table(name: str, table: str, readme: Path = README) -> None:
    """Put a table of Markdown between `<!-- NAME: … -->` and `<!-- end of NAME -->`.

    Raises ValueError when the README does not have these marks once.
    """
    text = readme.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {name}:[^>]*-->\n\n).*?(\n\n<!-- end of {name} -->)", flags=re.DOTALL)
    text, found = block.subn(lambda marks: marks[1] + table + marks[2], text)
    if found != 1:
        raise ValueError(f"{readme} has {found} tables between marks of {name}, not one")
    readme.write_text(text, encoding="utf-8")
