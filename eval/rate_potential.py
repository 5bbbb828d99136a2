"""What rates of their own would be worth to the experts of a bank, and to segments of its channels.

    python eval/rate_potential.py --model DIR … --output docs/results/rate_potential.md

For each projection the error that error feedback leaves of a trellis code is predicted by expert and channel (the sums
of kbvq.method.error_feedback, under the second moments of `--windows` windows); an expert's error of gate and up counts
by its share of the expert's outputs. Whole rates of 1 to 4 bits are then dealt to experts, to segments of channels
that all experts share, and to segments of single experts, for the least sum of errors at a mean of 2 and of 3 bits. The
worth is the rate that all would need more for the same sum. Nothing is coded.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from observed_model import observed_model
from torch import Tensor

from kbvq.method.error_feedback import channel_order, error_passing, target_variances
from kbvq.method.quadratic_form import quadratic_forms
from kbvq.method.vector_quantization import expert_factor, row_scales
from kbvq.models.calibration import ObservedBank
from kbvq.recipes import CODES, make_recipe
from kbvq.structures import PROJECTIONS, InputMoments

BITS = (2, 3)
SEGMENT = 32
LENGTH = 256
DISTORTION = {bits: code.distortion for bits, code in CODES["trellis"].items()}
SHARED_BY = ("experts", "segments", "both")


@dataclass(frozen=True)
class Row:
    """Of one projection: bits that rates of their own are worth, by mean rate and by who has them; largest: the largest
    over the least error of an expert."""

    name: str
    largest: float
    worth: dict[int, dict[str, float]]


def least_error(units: Tensor, bits: int) -> float:
    """Least Σ units · DISTORTION[rate], rates of a mean of `bits`. units: [n] errors at distortion 1.

    Rates are raised one by one where it saves most, which is the optimum because each step saves less than the last.
    """
    values = units.flatten().tolist()
    rates = [min(DISTORTION)] * len(values)

    def saved(unit: int) -> float:
        return values[unit] * (DISTORTION[rates[unit] + 1] - DISTORTION[rates[unit]])  # below 0: the heap's first

    heap = [(saved(unit), unit) for unit in range(len(values))]
    heapq.heapify(heap)
    for _ in range((bits - min(DISTORTION)) * len(values)):
        _, unit = heapq.heappop(heap)
        rates[unit] += 1
        if rates[unit] < max(DISTORTION):
            heapq.heappush(heap, (saved(unit), unit))
    return sum(value * DISTORTION[rate] for value, rate in zip(values, rates, strict=True))


def worth(units: Tensor, bits: int) -> float:
    """What rates of their own save, in bits a weight: ½ log₂ of the errors' ratio."""
    alike = units.sum().item() * DISTORTION[bits]
    return 0.5 * math.log2(alike / least_error(units, bits)) if alike > 0 else 0.0


def channel_errors(weights: Tensor, moments: InputMoments, bits: int) -> tuple[Tensor, Tensor]:
    """Error of each expert and channel in coding order at distortion 1, [E, n], and each expert's output energy, [E];
    both sums over the tokens, weighted as in the moments.

    weights: [E, out_features, n]. bits: the rate whose errors the targets carry.
    """
    recipe = make_recipe("default", 2)
    order = channel_order(moments.pooled_second_moment(), 1)
    errors, energies = [], []
    for expert, weight in enumerate(weights.float()):
        second_moment, _ = moments.expert_moments(expert, recipe.prior_tokens)
        factor = expert_factor(second_moment[order][:, order], int(moments.tokens[expert]), recipe)
        scales = row_scales(weight)
        variances = (weight[:, order] / scales[:, None]).square().mean(0)
        targets = target_variances(error_passing(factor), variances, DISTORTION[bits])
        errors.append(moments.mass[expert] * scales.square().sum() * factor.diagonal().square() * targets)
        energies.append(moments.mass[expert] * quadratic_forms(weight, second_moment).sum())
    return torch.stack(errors).double(), torch.stack(energies).double()


def measure(path: str, module: ObservedBank) -> list[Row]:
    """Rows of both projections of a bank whose moments are gathered."""
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {
        name: {bits: channel_errors(module.weights[name], module.moments[name], bits) for bits in BITS}
        for name in PROJECTIONS
    }
    rows = []
    for name, of_rate in found.items():
        worths = {}
        for bits, (errors, energies) in of_rate.items():
            # As shares of what the projection gives, counted by what the expert gives.
            outputs = found["down_proj"][bits][1]
            errors = errors * (outputs / energies.clamp_min(1e-30))[:, None]
            by_segment = torch.stack([part.mean(1) for part in errors.split(SEGMENT, 1)], 1)
            units = {"experts": errors.sum(1), "segments": by_segment.sum(0), "both": by_segment}
            worths[bits] = {who: worth(units[who], bits) for who in SHARED_BY}
        of_expert = errors.sum(1)
        largest = (of_expert.max() / of_expert.min().clamp_min(1e-30)).item()
        rows.append(Row(f"{path}.{name}", largest, worths))
    return rows


def measure_model(folder: Path, windows: int) -> list[Row]:
    observed = observed_model(folder, windows, length=LENGTH)
    return [row for path, module in observed.items() for row in measure(path, module)]


def markdown(rows: Sequence[Row], setting: str) -> str:
    """One line a projection, and the mean."""
    lines = [f"## {setting}", ""]
    heads = [f"{who}, {bits} bits" for bits in BITS for who in SHARED_BY]
    lines += ["| projection | largest by least error of an expert | " + " | ".join(heads) + " |"]
    lines += ["|---|---:|" + "---:|" * len(heads)]
    for row in rows:
        cells = [f"{row.worth[bits][who]:.3f}" for bits in BITS for who in SHARED_BY]
        lines.append(f"| {row.name} | {row.largest:.1f} | " + " | ".join(cells) + " |")
    means = [sum(row.worth[bits][who] for row in rows) / len(rows) for bits in BITS for who in SHARED_BY]
    lines.append("| mean | | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders of original models")
    parser.add_argument("--windows", type=int, default=24, help=f"of {LENGTH} tokens, for the second moments")
    parser.add_argument("--output", type=Path, help="a Markdown file; printed if left out")
    options = parser.parse_args()
    parts = ["# What rates of their own would be worth\n\nMade by `python eval/rate_potential.py`.\n"]
    parts.append(f"Bits a weight, whole rates from 1 to 4; segments of {SEGMENT} channels.\n")
    for folder in options.model:
        rows = measure_model(folder, options.windows)
        parts.append(markdown(rows, f"{folder.name}, {options.windows} windows, torch {torch.__version__}"))
    text = "\n".join(parts)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
