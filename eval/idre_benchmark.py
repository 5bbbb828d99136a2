"""When a shared low-rank basis pays behind error feedback: synthetic layers with a documented spectrum.

    python eval/idre_benchmark.py           # writes docs/results/idre.{json,md}

Inputs have second moment Q diag(λ) Qᵀ, λ_j ∝ j^−1.5 and Q a random rotation, and a few outlier channels of thirty
times the deviation of the others, as in large language models. The weights of all experts share a row space of rank 8:
a share of their energy lies in it, the rest is white. Row space: random, or that of the strongest input directions.

Both errors are weighted by the inputs' second moment. The basis costs bits that the codes could have had; the gain is
given in bits: ½ log₂(error without / error with), less the true bits of the basis. Positive, it pays.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kbvq.method.projection import quantize_projection, report_projection
from kbvq.recipes import make_recipe
from kbvq.structures import InputMoments

ROOT = Path(__file__).resolve().parent.parent
RANK = 8
SPECTRUM = 1.5
OUTLIERS, OUTLIER_FACTOR = 4, 30.0


@dataclass(frozen=True)
class Shape:
    num_experts: int = 8
    out_features: int = 512
    in_features: int = 1024
    tokens: int = 4096


def layer(shape: Shape, share: float, aligned: bool, seed: int) -> tuple[Tensor, InputMoments]:
    """Weights [E, out, in] with `share` of their energy in a common row space, and the inputs' moments."""
    generator = torch.Generator().manual_seed(seed)
    n = shape.in_features
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    deviations = torch.arange(1, n + 1).float().pow(-SPECTRUM / 2)
    outliers = torch.ones(n)
    outliers[torch.randperm(n, generator=generator)[:OUTLIERS]] = OUTLIER_FACTOR
    moments = InputMoments.zeros(shape.num_experts, n)
    for expert in range(shape.num_experts):
        inputs = (torch.randn(shape.tokens, n, generator=generator) * deviations) @ rotation.T * outliers
        moments.add_(expert, inputs, torch.ones(shape.tokens))
    if aligned:
        directions = (rotation[:, :RANK].T * outliers).T
    else:
        directions = torch.randn(n, RANK, generator=generator)
    basis = torch.linalg.qr(directions)[0].T
    white = torch.randn(shape.num_experts, shape.out_features, n, generator=generator)
    private = torch.randn(shape.num_experts, shape.out_features, RANK, generator=generator)
    weights = math.sqrt(1 - share) * white + math.sqrt(share * n / RANK) * private @ basis
    return 0.02 * weights, moments


def measure(shape: Shape, share: float, aligned: bool, bits: int, seed: int) -> dict[str, float | bool]:
    weights, moments = layer(shape, share, aligned, seed)
    found = {}
    for name, divisor in (("without", None), ("with", shape.in_features // RANK)):
        changes = {} if divisor is None else {"idre": True, "rank_divisor": divisor}
        recipe = make_recipe("fast", bits, budget=False, bcos=False, **changes)
        format = recipe.projection_format(*weights.shape)
        packed = quantize_projection(weights, moments, moments, format, recipe, seed=seed)
        found[name] = report_projection(weights, packed, moments, prior_tokens=recipe.prior_tokens)
    gain = 0.5 * math.log2(found["without"].relative_error / found["with"].relative_error)
    cost = found["with"].bits_per_weight - found["without"].bits_per_weight
    return {
        "share": share,
        "aligned": aligned,
        "bits": bits,
        "error_without": found["without"].relative_error,
        "error_with": found["with"].relative_error,
        "gain_bits": gain,
        "cost_bits": cost,
    }


def markdown(rows: list[dict], shape: Shape) -> str:
    lines = [
        "| row space | share of energy | code bits | error without | error with | gain, bits | cost, bits | net |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {'strongest inputs' if row['aligned'] else 'random'} | {row['share']:.3f} | {row['bits']} | "
            f"{row['error_without']:.5f} | {row['error_with']:.5f} | {row['gain_bits']:.3f} | {row['cost_bits']:.3f} | "
            f"{row['gain_bits'] - row['cost_bits']:+.3f} |"
        )
    return (
        "\n".join(lines)
        + f"\n\nMade by `python eval/idre_benchmark.py`: {shape.num_experts} experts of {shape.out_features} × "
        f"{shape.in_features}, rank {RANK} in int8, recipe `fast` without its output correction.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.008, 0.03, 0.1, 0.3])
    parser.add_argument("--quick", action="store_true", help="a small layer, in seconds")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "idre.json")
    options = parser.parse_args()
    shape = Shape(2, 64, 128, 1024) if options.quick else Shape()
    rows = []
    for bits in options.bits:
        for aligned in (False, True):
            for share in options.shares:
                rows.append(measure(shape, share, aligned, bits, seed=0))
                print(markdown(rows[-1:], shape).splitlines()[2], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"shape": vars(shape), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(rows, shape), encoding="utf-8")


if __name__ == "__main__":
    main()
