"""Every format and path executed from its PTX, against float64, with a table. Run: python kernels/bench/emulate.py

Each format of `aot.FORMATS` by every path, in small odd shapes: rows and columns that fill no tile, an expert without
tokens and one with most, the highest codes, a pair whose expert lies elsewhere; one token and several, and the tiles of
a small launch and of one that fills a card. Needs no GPU: see tests/kernels/ptx_emulator. Rows go to --results as they
come, and rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "kernels")]
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)

import emulated_cases as cases  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from kbvq_kernels import aot  # noqa: E402

ODD, TRELLIS = {}, {"experts": 3, "top_k": 2, "hidden": 128, "intermediate": 192}
TRELLIS_ODD = {"hidden": 40, "intermediate": 24}
"""Shapes; trellis codes decode where rows are multiples of 128, and any multiple of 8 elsewhere."""

VARIANTS = {
    "pairs, 1 token": ("pairs", {"tokens": 1}),
    "pairs, full card": ("pairs", {"full": True}),
    "blocks of 8": ("blocks", {"tokens": 5}),
    "blocks of 16, full card": ("blocks", {"tokens": 13, "full": True}),
    "blocks of 32": ("blocks", {"tokens": 21}),
    "grouped, tiles of 16": ("grouped", {"tokens": 9}),
    "grouped, tiles of 64": ("grouped", {"tokens": 36}),
    "grouped, tiles of 128": ("grouped", {"tokens": 130, "experts": 2, "top_k": 1}),
    "scratch": ("scratch", {"tokens": 8}),
}
FEW = ("pairs, full card", "blocks of 8", "grouped, tiles of 16", "scratch")
"""Variants of the formats that differ from another only in their options."""

HEAD = "| format | variant | target | error | faults |\n|---|---|---|---|---|"


def mixture(name: str, variant: str, capability: int) -> cases.Mixture:
    options = dict(aot.FORMATS[name])
    if options.get("rank"):
        options["rank"] = 5  # fills no step of the coefficients
    path, changes = VARIANTS[variant]
    shape = ODD
    if options["codebook"] == "trellis":
        shape = TRELLIS if path in ("pairs", "blocks") else TRELLIS_ODD
    return replace(cases.Mixture(path, options, capability), **{**shape, **changes})


def every_case(capabilities: list[int], names: list[str]) -> list[tuple[str, str, int]]:
    """(format, variant, capability); what matters most comes first."""
    first = [name for name in names if name in aot.DEFAULTS]
    plain = [n for n in names if n not in first and "low-rank" not in n]
    rest = [n for n in names if n not in first + plain]
    order = [(n, FEW) for n in first + plain] + [(n, [v for v in VARIANTS if v not in FEW]) for n in first + plain]
    order += [(n, FEW) for n in rest]
    return [(name, variant, c) for name, variants in order for c in capabilities for variant in variants]


def run(name: str, variant: str, capability: int) -> tuple[str, bool]:
    """(row, whether it is as it should be). Trellis codes run with two kinds of poison, to the same bits."""
    case = mixture(name, variant, capability)
    y, outcome = cases.run(case)
    if case.options["codebook"] == "trellis" and case.path in ("pairs", "blocks"):
        again, _ = cases.run(case, np.full(64, 0xA7, np.uint8))
        if not torch.equal(y, again):
            outcome.faults.append("the result depends on what was never set")
    for fault in outcome.faults:
        print(f"{name}, {variant}, sm_{capability}: {fault}", file=sys.stderr, flush=True)
    row = f"| {name} | {variant} | sm_{capability} | {outcome.error:.1e} | {len(outcome.faults)} |"
    return row, not outcome.faults and outcome.error <= cases.TOLERANCE[case.dtype]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=(80, 90), default=[90, 80])
    parser.add_argument("--format", nargs="+", choices=aot.FORMATS, default=list(aot.FORMATS), metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "kernels/bench/results/emulated.md")
    chosen = parser.parse_args(arguments)
    if not chosen.results.exists():
        chosen.results.write_text(
            "# PTX executed without a GPU\n\nMade by `python kernels/bench/emulate.py`; nothing was timed. Relative"
            " error against float64 in the Frobenius norm,\nbfloat16 hidden states; faults: out of bounds, misaligned,"
            f" uninitialised, races, divergence.\n\nTriton {triton.__version__}, commit {commit()}\n\n{HEAD}\n"
        )
    done = set(re.findall(r"^\| (.*? \| .*? \| sm_\d+) \|", chosen.results.read_text(), re.M))
    wrong, start = 0, time.monotonic()
    for name, variant, capability in every_case(chosen.capability, chosen.format):
        if f"{name} | {variant} | sm_{capability}" in done:
            continue
        row, good = run(name, variant, capability)
        wrong += not good
        print(f"{row} {time.monotonic() - start:.0f} s", flush=True)
        with chosen.results.open("a") as file:
            file.write(row + "\n")
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
