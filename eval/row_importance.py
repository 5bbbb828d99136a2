"""What it saves that a trellis spends its bits on the outputs of gate and up whose errors cost most.

    python eval/row_importance.py --model DIR --output docs/results/row_importance.md

Every STEP-th column of gate and up of each layer's busiest expert, behind row scales, is coded at 2 and 3 bits with
rows weighted by their scales alone and with the importance of kbvq.quantization.row_importance, and the squared errors
are compared weighted with the importance. Beside it what a rate of its own for each row would give, the geometric mean
of the rows' weights by the arithmetic one, and the same with the rows in descending order of their neurons' energy,
where a row has rows of its own kind beside it. Errors are those of the code alone, without feedback.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from drawn_windows import drawn_windows
from torch import Tensor
from transformers import AutoTokenizer

from kbvq.codes.trellis import TrellisCode
from kbvq.method.vector_quantization import row_scales
from kbvq.models.calibration import LayerRunner, observe_banks, run_and_watch
from kbvq.models.layer_stream import LayerStream
from kbvq.quantization.matching import token_weights
from kbvq.quantization.row_importance import row_importance
from kbvq.recipes import make_recipe
from kbvq.structures import PROJECTIONS

BITS = (2, 3)
STEP = 16
LENGTH = 256


@dataclass(frozen=True)
class Row:
    """Of gate and up of one bank. ideal: the geometric by the arithmetic mean of the rows' weights. spread, descending:
    by bits, the weighted error with importance by that without, in the order of rows that kbvq stores and in the
    descending one."""

    name: str
    ideal: float
    spread: dict[int, float]
    descending: dict[int, float]

    @property
    def bits(self) -> float:
        """What the ideal is worth."""
        return -math.log2(self.ideal) / 2


def measure(name: str, weight: Tensor, importance: Tensor, energy: Tensor) -> Row:
    """weight: [rows, in_features] of one expert. importance: of its rows. energy: of its neurons, half as many."""
    scales = row_scales(weight.float())
    values = (weight.float() / scales[:, None]).T[::STEP].contiguous()
    values /= values.square().mean(1, keepdim=True).sqrt()
    alone, mass = scales.square(), scales.square() * importance
    found: dict[str, dict[int, float]] = {"spread": {}, "descending": {}}
    descending = torch.cat([part + energy.argsort(descending=True) for part in range(0, len(weight), len(energy))])
    for bits in BITS:
        code = TrellisCode(bits)

        def error(rows: Tensor, weights: Tensor, code: TrellisCode = code) -> float:
            own = values[:, rows].contiguous()
            wrong = own - code.decode(code.encode(own, (weights / weights.mean())[rows].expand_as(own).contiguous()))
            return (wrong.square().mean(0) @ mass[rows]).item()

        natural = torch.arange(len(weight))
        for order, rows in (("spread", natural), ("descending", descending)):
            found[order][bits] = error(rows, mass) / error(natural, alone)
    return Row(name, (mass.log().mean().exp() / mass.mean()).item(), **found)


@torch.no_grad()
def measure_model(folder: Path, windows: int) -> list[Row]:
    stream = LayerStream(folder, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = drawn_windows(tokenizer, windows, length=LENGTH)
    (_, of_one), (states, of_all) = (stream.layer_inputs(part) for part in (tokens[:1], tokens))
    arguments = {1: of_one, windows: of_all}
    recipe = make_recipe("default", 2, row_importance=1.0)
    found = []
    for index in range(stream.num_layers):
        banks = [bank for bank in stream.banks if bank.decoder_layer == index]
        with stream.layer(index) as layer:
            run = LayerRunner(
                layer, lambda rows, index=index: arguments[rows][index], batch_size=windows, device=stream.device
            )
            observed = observe_banks(layer, f"{stream.layers_path}.{index}", banks)
            outputs, moments = run_and_watch(run, states, observed, PROJECTIONS, by_routing=True)
            for bank, module in observed.items():
                order = module.sort_channels_(moments[bank]["down_proj"], 1)
                moments[bank]["down_proj"].reorder_(order)
            importance = row_importance(run, states, token_weights(outputs), observed, recipe)
            for bank, module in observed.items():
                of_down = moments[bank]["down_proj"]
                expert = int(of_down.tokens.argmax())
                weight = module.weights["gate_up_proj"][expert]
                found.append(
                    measure(bank.path, weight, importance[bank].rows[expert], of_down.upper_sum[expert].diagonal())
                )
            states = outputs
    return found


def markdown(rows: list[Row], setting: str) -> str:
    lines = [
        "# Importance of the outputs of gate and up",
        "",
        f"Made by `python eval/row_importance.py`. {setting}",
        "",
    ]
    lines += ["Weighted squared error, by that without importance; in brackets with rows in descending order.", ""]
    lines += ["| bank | worth, bits | a rate for each row | " + " | ".join(f"{bits} bits" for bits in BITS) + " |"]
    lines += ["|---|---:|---:|" + "---|" * len(BITS)]
    for row in rows:
        cells = [f"{row.spread[bits]:.3f} ({row.descending[bits]:.3f})" for bits in BITS]
        lines.append(f"| {row.name} | {row.bits:.2f} | {row.ideal:.3f} | " + " | ".join(cells) + " |")
    count = len(rows)
    means = [sum(row.spread[bits] for row in rows) / count for bits in BITS]
    ideal, worth = sum(row.ideal for row in rows) / count, sum(row.bits for row in rows) / count
    lines.append(f"| mean | {worth:.2f} | {ideal:.3f} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the original model")
    parser.add_argument("--windows", type=int, default=16, help=f"of {LENGTH} tokens")
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
