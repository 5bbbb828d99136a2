"""CPU time of quantizing one decoder layer at the widths of real models, by stage: `python eval/speed_benchmark.py`.

Random weights and inputs, both with heavy-tailed channels, of a few experts of each bank; what grows with the experts
is scaled to all of them. Every stage runs on one core and is measured in CPU time, so that another process beside it
disturbs less. Projections have no shared basis. Each expert runs on the probe's pass, the teacher's, the student's
three, and once more with the original weights on the student's tokens (sensitivity, layer_quantization, matching).
Attention, files and the network's other parts are not in it, nor what a recipe tunes end to end. --plain: the searches
in torch, as without a C++ compiler. Rows of other models and recipes in speed.json are kept; writes it and speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.method import projection, vector_quantization
from kbvq.method.target_weights import Goal, TargetSums, goal_of
from kbvq.models.expert_forward import gated, run_experts, stacked_experts
from kbvq.quantization.sensitivity import noise_law, probed_rates
from kbvq.recipes import Recipe, make_recipe
from kbvq.structures import InputMoments
from kbvq_kernels import encode

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = 128 * 2048  # tokens
BITS = 2  # of codes, for every weight
FORWARD_PASSES = 6
MOMENT_PASSES = {"gate_up_proj": 2, "down_proj": 3}
"""The probe's and the student's; of down, by which channels are sorted, the teacher's too. Once there are the sums that
pair inputs with the outputs that they should give."""
STAGES = {
    "column scales": (projection, "column_scales"),
    "tables": (vector_quantization, "_fit_codebook"),
    "factors": (vector_quantization, "upper_factor"),
    "codes": (vector_quantization, "encode_with_feedback"),
    "output correction": (projection, "_correct_outputs"),
    "limit": (projection, "_spectrum"),
    "basis": (torch.linalg, "eigh"),
}
NOT_CODING = {"limit", "basis"}
"""What is done for the report and the probe."""

GOALS = {"fast": 0.7, "default": 1.2}
"""Microseconds of CPU that coding a weight may take, by recipe."""

OF_FEW_EXPERTS = {"limit": projection.LIMIT_EXPERTS, "column scales": vector_quantization.EXPERTS_FOR_SCALES}
"""Grows with the experts up to so many."""

PER_BANK = {"tables", "basis", *OF_FEW_EXPERTS}
"""Does not grow with the experts: k-means draws a subset of all vectors, and a shared basis has two eigenvalue problems
for all of them."""


@dataclass(frozen=True)
class Bank:
    """A bank of a model; tokens: routed to each expert, of the calibration text."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    tokens: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by name."""
        return {
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }


MODELS: dict[str, tuple[int, list[Bank]]] = {
    "Qwen3-30B-A3B": (48, [Bank("routed", 2048, 768, 128, CALIBRATION * 8 // 128)]),
    "Qwen1.5-MoE-A2.7B": (
        24,
        [Bank("routed", 2048, 1408, 60, CALIBRATION * 4 // 60), Bank("shared", 2048, 5632, 1, CALIBRATION)],
    ),
    "Mixtral-8x7B": (32, [Bank("routed", 4096, 14336, 8, CALIBRATION * 2 // 8)]),
}
"""Decoder layers and the banks of one, from the models' configurations."""


@contextmanager
def stage_times(times: dict[str, float]) -> Iterator[None]:
    """Adds the CPU seconds spent in each of STAGES while it is open; no stage runs within another but factors."""
    originals = {name: getattr(module, function) for name, (module, function) in STAGES.items()}

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            nested, start = times["factors"], time.process_time()
            result = function(*arguments, **options)
            times[name] += time.process_time() - start
            if name != "factors":
                times[name] -= times["factors"] - nested
            return result

        return run

    for name, (module, function) in STAGES.items():
        setattr(module, function, timed(name, originals[name]))
    try:
        yield
    finally:
        for name, (module, function) in STAGES.items():
            setattr(module, function, originals[name])


def heavy_tailed(*shape: int, generator: torch.Generator) -> Tensor:
    """Unit-Gaussian values times a log-normal factor for each of the last dimension's channels."""
    return torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()


def input_moments(experts: int, in_features: int, tokens: int, seconds: dict[str, float]) -> InputMoments:
    generator = torch.Generator().manual_seed(in_features)
    moments = InputMoments.zeros(experts, in_features)
    routing_weights = torch.rand(tokens, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    for expert in range(experts):
        inputs = heavy_tailed(tokens, in_features, generator=generator) @ mixing
        start = time.process_time()
        moments.add_(expert, inputs, routing_weights, by_routing=True)
        seconds["moments"] += time.process_time() - start
    return moments


def target_sums(experts: int, shape: tuple[int, int], tokens: int, seconds: dict[str, float]) -> TargetSums:
    """Of outputs that are wanted, [num_experts, outputs, in_features]."""
    generator = torch.Generator().manual_seed(3)
    sums = TargetSums.zeros(experts, *shape)
    for expert in range(experts):
        wanted, inputs = (torch.randn(tokens, width, generator=generator) for width in shape)
        start = time.process_time()
        sums.add_(expert, 0.01 * wanted, inputs, torch.ones(tokens))
        seconds["moments"] += time.process_time() - start
    return sums


def forward_time(bank: Bank, experts: int, tokens: int) -> tuple[float, float]:
    """CPU seconds of a pass of so many tokens through each of so many experts, and of its matrix products alone."""
    generator = torch.Generator().manual_seed(1)
    weights = [heavy_tailed(experts, *shape, generator=generator) for shape in bank.projections().values()]
    hidden = torch.randn(experts * tokens, bank.hidden_size, generator=generator)
    index = torch.arange(experts * tokens)[:, None] % experts
    of_expert = stacked_experts(weights, [None, None])
    start = time.process_time()
    run_experts(
        hidden, index, torch.ones(index.shape), num_experts=experts, expert_weights=of_expert, gating=gated(F.silu)
    )
    whole = time.process_time() - start
    inputs = [torch.randn(tokens, weight.shape[-1], generator=generator) for weight in weights]
    start = time.process_time()
    for expert in range(experts):
        for weight, of_projection in zip(weights, inputs, strict=True):
            F.linear(of_projection, weight[expert])
    return whole, time.process_time() - start


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[stage] += time.process_time() - start


def measure_bank(bank: Bank, recipe: Recipe, experts: int, tokens: int, *, alone: bool) -> dict[str, float]:
    """CPU seconds by stage for the bank, all experts and the whole calibration text, from so many of both. alone: of
    the coding, the forward passes and the moments, without probe, goals and report."""
    seconds: dict[str, float] = defaultdict(float)
    share = bank.tokens / tokens
    forward, products = forward_time(bank, experts, tokens)
    for name, (out_features, in_features) in bank.projections().items():
        of_moments: dict[str, float] = defaultdict(float)
        moments = input_moments(experts, in_features, tokens, of_moments)
        seconds["moments"] += MOMENT_PASSES[name] * share * of_moments["moments"]
        of_sums: dict[str, float] = defaultdict(float)
        # Gate and up are to give what they gave on the original's inputs, down what the layer lacks.
        sums = target_sums(experts, (bank.hidden_size, in_features), tokens, of_sums)
        seconds["moments"] += share * of_sums["moments"]
        generator = torch.Generator().manual_seed(2)
        weights = 0.02 * heavy_tailed(experts, out_features, in_features, generator=generator)
        goal = Goal(weights, torch.zeros_like(weights[..., 0]))
        if not alone:
            basis = seconds["basis"]
            with timed(seconds, "probe"), stage_times(seconds):
                law = noise_law(weights, moments, recipe, probed_rates(recipe))
                white = law.white(generator)
                for rate in law.deviations:
                    law.noise(white, rate)
            seconds["probe"] -= seconds["basis"] - basis
            with timed(seconds, "goals"):
                targets = sums.mapped(weights) if name == "gate_up_proj" else sums
                goal = goal_of(weights, targets, moments, recipe.prior_tokens)
            del targets, white, law
        del sums
        format = recipe.projection_format(experts, out_features, in_features, bits=BITS, rank=0, bias=True)
        with timed(seconds, "quantize"), stage_times(seconds):
            packed = projection.quantize_projection(weights, moments, moments, format, recipe, seed=0, goal=goal)
        if alone:
            continue
        limit = seconds["limit"]
        with timed(seconds, "report"), stage_times(seconds):
            report = projection.report_projection(weights, packed, moments, prior_tokens=recipe.prior_tokens)
        seconds["report"] -= seconds["limit"] - limit
        print(f"  {bank.name} {name}: relative error {report.relative_error:.4f}", flush=True)
    seconds["other"] = seconds.pop("quantize") - sum(seconds[stage] for stage in STAGES if stage not in NOT_CODING)
    scale = bank.num_experts / experts
    seconds = {stage: value * (1 if stage in PER_BANK else scale) for stage, value in seconds.items()}
    for stage, most in OF_FEW_EXPERTS.items():
        if stage in seconds:  # what is left out has no time
            seconds[stage] *= min(most, bank.num_experts) / min(most, experts)
    passes = FORWARD_PASSES * share * scale
    return seconds | {"forward": passes * forward, "forward, products alone": passes * products}


def measured(row: dict) -> str:
    """What was measured of how much, for people."""
    banks = zip(row["experts"], MODELS[row["model"]][1], strict=True)
    experts = " + ".join(f"{few} of {bank.num_experts}" for few, bank in banks)
    narrower = "" if row["width_divisor"] == 1 else f", 1/{row['width_divisor']} of the widths"
    plain = ", searches in torch" if row["plain"] else ""
    return f"{experts} experts, {row['tokens']} tokens{narrower}{plain}"


def table(results: list[dict]) -> list[str]:
    stages = [*STAGES, "other", "report", "goals", "probe", "moments", "forward"]
    columns = ["model", "recipe", *stages, "coding, µs a weight", "goal", "forward, share of products", "model, h"]
    lines = [f"| {' | '.join([*columns, 'measured', 'load'])} |", "|---" * (len(columns) + 2) + "|"]
    for row in results:
        # A stage that was left out has no time: 0 is what takes none, as tables do for a trellis.
        left_out = NOT_CODING | {"report", "goals", "probe"} if row["alone"] else set()
        cells = ["–" if stage in left_out else f"{row['seconds'][stage]:.1f}" for stage in stages]
        goal = GOALS.get(row["recipe"])
        verdict = "" if goal is None else f"{goal}: {'met' if row['coding'] <= goal else 'missed'}"
        cells += [
            f"{row['coding']:.2f}",
            verdict,
            f"{row['products_share']:.2f}",
            "–" if row["alone"] else f"{row['hours']:.1f}",
        ]
        cells += [measured(row), f"{row['load']:.1f}"]
        lines.append(f"| {row['model']} | {row['recipe']} | {' | '.join(cells)} |")
    return lines


def markdown(kept: dict) -> str:
    """The page from what is kept in JSON."""
    lines = [
        "# Speed of quantization at real widths",
        "",
        f"CPU seconds for one decoder layer's experts on one core of {kept['machine']}, 2 code bits, calibration of "
        f"{CALIBRATION:,} tokens. Few experts of each bank, and few tokens for each of them, are measured and scaled "
        "to all, as the table says; load: of the machine at the end of the row, by all that ran on it.",
        "",
        *table(kept["rows"]),
        "",
        f"Made by `python eval/speed_benchmark.py`, torch {kept['torch']}. coding: from column scales to other, "
        "without limit and basis. limit: the Shannon limit of few experts, for the report. goals: the weights that are "
        "coded in the place of the original ones. probe: noise for the sensitivities; basis: the eigenvalue problems "
        f"of a projection's shared basis, for them. forward: {FORWARD_PASSES} passes. model: all decoder layers' "
        "experts, core-hours.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["fast", "default"])
    parser.add_argument("--experts", type=int, default=4, help="of each bank, scaled to all")
    parser.add_argument("--tokens", type=int, default=1024, help="for each expert, scaled to the calibration text")
    parser.add_argument("--plain", action="store_true", help="searches in torch instead of the compiled ones")
    parser.add_argument("--coding-alone", action="store_true", help="without probe, goals and report")
    parser.add_argument("--width-divisor", type=int, default=1, help="narrower banks, to try the script")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plain:
        encode.trellis_library = encode.feedback_library = lambda: None
    kept = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    kept |= {"machine": f"a machine of {os.cpu_count()} cores ({platform.machine()})", "torch": torch.__version__}
    for model in options.models:
        layers, banks = MODELS[model]
        for name in options.recipes:
            print(f"{model} {name}", flush=True)
            recipe = make_recipe(name, BITS)
            totals: dict[str, float] = defaultdict(float)
            weights = 0
            experts = [min(options.experts, bank.num_experts) for bank in banks]
            for bank, few in zip(banks, experts, strict=True):
                narrow = options.width_divisor
                bank = Bank(
                    bank.name,
                    bank.hidden_size // narrow,
                    bank.intermediate_size // narrow,
                    bank.num_experts,
                    bank.tokens,
                )
                for stage, value in measure_bank(bank, recipe, few, options.tokens, alone=options.coding_alone).items():
                    totals[stage] += value
                weights += bank.num_experts * 3 * bank.hidden_size * bank.intermediate_size
            products = totals.pop("forward, products alone")
            coding = sum(totals[stage] for stage in (*STAGES, "other") if stage not in NOT_CODING)
            row = {
                "model": model,
                "recipe": name,
                "experts": experts,
                "tokens": options.tokens,
                "width_divisor": options.width_divisor,
                "alone": options.coding_alone,
                "plain": options.plain,
                "load": os.getloadavg()[0],
                "seconds": dict(totals),
                "coding": 1e6 * coding / weights,
                "products_share": products / totals["forward"],
                "hours": layers * sum(totals.values()) / 3600,
            }
            same = ("model", "recipe", "plain")
            others = [old for old in kept["rows"] if any(old[field] != row[field] for field in same)]
            kept["rows"] = sorted([*others, row], key=lambda row: list(MODELS).index(row["model"]))
            options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(markdown(kept), encoding="utf-8")
    print(options.output.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
