"""What stretched levels save a trellis code on the weights of a model: squared error by projection, coded both ways.

    python eval/trellis_levels.py --model DIR --output docs/results/trellis_levels.md

Columns of each projection's busiest expert, behind row and channel scales, are coded at 2, 3 and 4 bits with the levels
of Gaussian values and with those that kbvq.codes.level_choice chooses, beside the error that it foresees. A column
counts by what its error costs under the second moment of the expert's inputs; the heaviest ones are all coded, of the
others every STEP-th one. Errors are those of the code alone, without feedback, relative to the values' own square.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from observed_model import observed_model
from torch import Tensor

from kbvq.codes.level_choice import best_tail, value_histogram
from kbvq.codes.trellis import TrellisCode
from kbvq.method.error_feedback import channel_order
from kbvq.method.vector_quantization import expert_factor, row_scales
from kbvq.recipes import make_recipe
from kbvq.structures import PROJECTIONS, InputMoments

BITS = (2, 3, 4)
HEAVIEST, STEP = 32, 8
LENGTH = 256


@dataclass(frozen=True)
class Row:
    """Of one projection: its mean kurtosis, and by bits (error at tail 0, tail chosen, its error, error foreseen)."""

    name: str
    kurtosis: float
    errors: dict[int, tuple[float, int, float, float]]


def measure(name: str, weights: Tensor, moments: InputMoments) -> Row:
    """weights: [num_experts, out_features, in_features]. moments: of their inputs."""
    recipe = make_recipe("default", 2)
    expert = int(moments.tokens.argmax())
    weight = weights[expert].float()
    second_moment, _ = moments.expert_moments(expert, recipe.prior_tokens)
    order = channel_order(second_moment, 1)
    tokens = int(moments.tokens[expert])
    diagonal = expert_factor(second_moment[order][:, order], tokens, recipe).diagonal().square()
    scales = row_scales(weight)
    scaled = weight[:, order] / scales[:, None]
    histogram = value_histogram(scaled, scales.square(), diagonal)
    variances = scaled.square().mean(0)
    taken = torch.cat([torch.arange(HEAVIEST), torch.arange(HEAVIEST, len(order), STEP)])
    mass = (diagonal * variances)[taken]
    mass[HEAVIEST:] *= STEP
    values = (scaled / variances.sqrt()).T[taken].contiguous()
    of_rows = (scales.square() / scales.square().mean()).expand_as(values).contiguous()

    def error(bits: int, tail: int) -> float:
        code = TrellisCode(bits, tail=tail)
        wrong = (values - code.decode(code.encode(values, of_rows))).square()
        return ((wrong * of_rows).mean(1) @ mass / mass.sum()).item()

    errors = {}
    for bits in BITS:
        tail, foreseen = best_tail(bits, histogram)
        errors[bits] = error(bits, 0), tail, error(bits, tail), foreseen
    return Row(name, values.pow(4).mean().item(), errors)


def measure_model(folder: Path, windows: int) -> list[Row]:
    return [
        measure(f"{path}.{projection}", module.weights[projection], module.moments[projection])
        for path, module in observed_model(folder, windows, length=LENGTH).items()
        for projection in PROJECTIONS
    ]


def markdown(rows: list[Row], setting: str) -> str:
    lines = ["# Levels of the trellis on real weights", "", f"Made by `python eval/trellis_levels.py`. {setting}", ""]
    lines += ["Squared error with Gaussian levels → with those chosen (tail; foreseen).", ""]
    lines += ["| projection | kurtosis | " + " | ".join(f"{bits} bits" for bits in BITS) + " |"]
    lines += ["|---|---:|" + "---|" * len(BITS)]
    for row in rows:
        cells = [f"{old:.4f} → {new:.4f} ({tail}; {seen:.4f})" for old, tail, new, seen in row.errors.values()]
        lines.append(f"| {row.name} | {row.kurtosis:.1f} | " + " | ".join(cells) + " |")
    means = [sum(row.errors[bits][2] / row.errors[bits][0] for row in rows) / len(rows) for bits in BITS]
    lines.append("| mean of the ratios | | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the original model")
    parser.add_argument("--windows", type=int, default=48, help=f"of {LENGTH} tokens, for the second moments")
    parser.add_argument("--output", type=Path, help="a Markdown file; printed if left out")
    options = parser.parse_args()
    rows = measure_model(options.model, options.windows)
    text = markdown(rows, f"{options.model.name}, {options.windows} windows, torch {torch.__version__}.")
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
