"""CPU decode: packed experts against bfloat16 grouped_mm, in one process, alternating. Run: python kernels/bench/cpu.py

Both are checked against each other's weights first; a wrong result stops before any time is taken. Prints, for each
model shape and format, median milliseconds for one layer's experts and the ratio bf16 / packed (above 1: faster).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from synthetic import EXPANDED, FORMATS, MEASURED, SHAPES, grouped_mm_forward, random_bank, random_routing

import kbvq_kernels
from kbvq_kernels import cpu


def milliseconds(calls, repeats: int, summary=statistics.median, clock=time.perf_counter) -> list[float]:
    """Median time of each call, or another summary, the calls taken in turn so that a busy machine slows all alike."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent in zip(calls, times, strict=True):
            start = clock()
            call()
            spent.append(1e3 * (clock() - start))
    return [summary(t) for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--experts", type=int, default=32, help="experts kept per layer, to bound memory")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 32], help="of the low-rank part")
    parser.add_argument("--only", default="", help="measure what has this in its model's or format's name")
    parser.add_argument("--portable", action="store_true", help="measure the path without a compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.portable:
        cpu.library = lambda: None
    compiled = cpu.library() is not None
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    print(f"{name or platform.processor()}, {options.threads} threads, torch {torch.__version__}, compiled: {compiled}")
    print("| model | format | rank | T | bf16 ms | packed ms | bf16 / packed |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        shape = replace(shape, num_experts=min(shape.num_experts, options.experts))
        for code in (*FORMATS[:MEASURED], EXPANDED):
            if options.only not in f"{shape.name} {code.name}":
                continue
            for rank in options.ranks:
                gate_up, down = random_bank(shape, code, rank)
                dense = [kbvq_kernels.dequantize(p, torch.bfloat16) for p in (gate_up, down)]
                zeroed = [replace(p, bias=None) for p in (gate_up, down)]
                for tokens in options.tokens:
                    x = torch.randn(tokens, shape.hidden).bfloat16()
                    index, weights = random_routing(shape, tokens)
                    ours = kbvq_kernels.moe_forward(x, index, weights, *zeroed).float()
                    theirs = grouped_mm_forward(x, index, weights, *dense).float()
                    if not (ours - theirs).norm() < 2e-2 * theirs.norm():
                        raise SystemExit(f"{shape.name} {code.name}: results differ; no time is reported")
                    bf16, packed = milliseconds(
                        (
                            lambda: grouped_mm_forward(x, index, weights, *dense),  # noqa: B023
                            lambda: kbvq_kernels.moe_forward(x, index, weights, gate_up, down),  # noqa: B023
                        ),
                        options.repeats,
                    )
                    row = (shape.name, code.name, rank, tokens, f"{bf16:.2f}", f"{packed:.2f}", f"{bf16 / packed:.2f}")
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
