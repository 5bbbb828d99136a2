"""Ceilings of every format from the compiled code, without a GPU. Run: python kernels/bench/ceilings.py

For each kernel's inner loop on sm_90: instructions, table lookups and code bytes per weight, and the speed-up over
bfloat16 weights read at the full copy bandwidth that each resource of an H200 would allow by itself:

    HBM    16 / code bits
    L1     the unit of L1 cache and shared memory: random lookups (simulated bank conflicts, four tags a cycle) and
           whatever else the loop loads and stores there
    issue  one instruction a cycle for each of an SM's four schedulers

The kernel's ceiling is the least of the three. Nothing here was timed: the machine numbers below are the inputs.
"""

from __future__ import annotations

import random

import torch
from synthetic import FORMATS, SHAPES, CodeFormat, ExpertShape, meta_bank

from kbvq_kernels import aot, launch

SM_COUNT, CLOCK_HZ, COPY_BYTES_PER_S = 132, 1.755e9, 4.3e12
"""An H200: multiprocessors, an assumed sustained clock, and the copy bandwidth measured on one."""

BF16_WEIGHTS_PER_S = COPY_BYTES_PER_S / 2


def cached_lookup_cycles(entry_bytes: int, load_bytes: int, entries: int, trials: int = 400) -> float:
    """Cycles an SM spends on 32 random lookups through the L1 cache, each of entry_bytes in loads of load_bytes.

    A wavefront serves the lanes of one phase (128 bytes' worth) whose banks differ; equal addresses merge. Tags are
    checked at four 128-byte lines a cycle for each load.
    """
    rng, total = random.Random(0), 0.0
    for _ in range(trials):
        codes = [rng.randrange(entries) for _ in range(32)]
        for part in range(entry_bytes // load_bytes):
            # Each part of the codewords is a table of its own.
            addresses = [(part * entries + code) * load_bytes for code in codes]
            tags = len({a // 128 for a in addresses}) / 4
            total += max(tags, wavefronts(addresses, load_bytes))
    return total / trials


def shared_lookup_cycles(entry_bytes: int, entries: int, copies: int, trials: int = 400) -> float:
    """Cycles an SM spends on 32 random lookups in shared memory with `copies` of the tables: bank conflicts alone."""
    rng, total = random.Random(0), 0
    for _ in range(trials):
        codes = [rng.randrange(entries) for _ in range(32)]
        addresses = [(code * copies + lane % copies) * entry_bytes for lane, code in enumerate(codes)]
        total += wavefronts(addresses, entry_bytes)
    return total / trials


def wavefronts(addresses: list[int], load_bytes: int) -> int:
    """Cycles for the data of one load by 32 lanes."""
    lanes, waves = min(32, 128 // load_bytes), 0
    for start in range(0, 32, lanes):
        slots: dict[int, set[int]] = {}
        for a in addresses[start : start + lanes]:
            slots.setdefault(a % 128 // load_bytes, set()).add(a)
        waves += max(map(len, slots.values()))
    return waves


def l1_cycles(code: CodeFormat, tokens: float, entry: aot.Launch, compiled: aot.MachineCode, weights: float) -> float:
    """Cycles that the L1 cache and shared memory, one unit, spend on a weight.

    Lookups (and in rq-grouped those of groups, one byte each), the copies of the tables that every program writes, then
    every other load and store of the loop at 128 bytes a cycle. A load of x in decode_kernel touches four lines for
    each of its `tokens`, at four tags a cycle; 0 tokens: grouped_kernel.
    """
    a, copies, trellis = entry.arguments, entry.arguments["COPIES"], code.codebook == "trellis"
    lookups = code.lookups
    entries = 256 if trellis else code.codebook_size
    if copies:
        size = 4 if trellis else 2 * code.vector_dim
        cycles = lookups * shared_lookup_cycles(size, entries, copies) / 32
        rows = a["BLOCK_N"] * a.get("ROW_WARPS", 1)
        cycles += a["TABLES"] * entries * copies * size / 128 / (rows * a["K"])
    else:
        size = 2 if trellis else 2 * code.vector_dim
        cycles = lookups * cached_lookup_cycles(size, min(8, size), entries) / 32
    if code.num_groups > 1:
        cycles += (code.num_stages - 1) / code.vector_dim * cached_lookup_cycles(1, 1, 256) / 32
    other = 0.0
    for opcode, count in compiled.loop.items():
        parts = opcode.split(".")
        if parts[0] not in ("LDS", "STS", "LDSM", "STSM", "LDG") or "EL" in parts:
            continue
        each = 4 if "128" in parts or parts[-1] == "4" else 2 if "64" in parts else 1
        if parts[0] == "LDG" and "EF" not in parts and tokens:
            each = tokens
        elif parts[0] == "LDG" and trellis:
            each = 1  # four columns, the same for the lanes of all rows
        other += count * each
    if copies:  # the lookups are among these loads
        other -= lookups * weights / 32 * max(1, size // 4)
    return cycles + other / weights


PATHS = (
    ("1 token", SHAPES[2], "pairs", 1, 1.0),
    ("1.6 tokens", SHAPES[0], "blocks", 16, launch.expected_reuse(16, SHAPES[0].top_k, SHAPES[0].num_experts)),
    ("8 tokens", SHAPES[2], "blocks", 16, 8.0),
    ("128 tokens", SHAPES[2], "grouped", 2048, 0.0),
)
"""(tokens of an expert, model, path, tokens of the call, tokens whose x a load of decode_kernel reads). The second is a
batch of 16 on Qwen3-30B-A3B, the others are long rows."""


def projection(code: CodeFormat, shape: ExpertShape, path: str, tokens: int, gated: bool = False) -> aot.Launch:
    """The launch of the down projection, or of gate and up, in a call with so many tokens."""
    projections = meta_bank(shape, code)
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
    index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, shape.top_k, device="meta")
    with aot.record(90) as recorded:
        launch.moe_forward(x, index, weights, *projections, "silu", path)
    return next(r for r in recorded if "words_ptr" in r.arguments and r.arguments["GATED"] == gated)


def speedups(bits: float, l1: float, instructions: float) -> dict[str, float]:
    """Over bfloat16, by resource: bits of HBM, cycles of L1 and instructions of a warp for each weight."""
    cycles = SM_COUNT * CLOCK_HZ / BF16_WEIGHTS_PER_S
    return {"HBM": 16 / bits, "L1": cycles / l1, "issue": 4 * cycles / instructions}


def least(speed: dict[str, float]) -> str:
    """The ceiling and what sets it, for a table."""
    name = min(speed, key=speed.get)
    return f"{speed[name]:.2f}x ({name})"


def main() -> None:
    print(f"H200 inputs: {SM_COUNT} SMs, {CLOCK_HZ / 1e9} GHz, {COPY_BYTES_PER_S / 1e12} TB/s; bf16 x, sm_90")
    columns = "format,tokens,registers,spilled,lookups/weight,instructions/weight,HBM,L1,issue,ceiling".split(",")
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for code in FORMATS:
        for label, shape, path, batch, tokens in PATHS:
            entry = projection(code, shape, path, batch)
            weights = aot.weights_per_pass(entry)
            compiled = aot.inspect(aot.compile_launch(entry, 90))
            per_weight = sum(compiled.loop.values()) / weights
            speed = speedups(code.bits, l1_cycles(code, tokens, entry, compiled, weights), per_weight)
            print(
                f"| {code.name} | {label} | {compiled.registers} | {compiled.spilled} | {code.lookups:.3f} "
                f"| {32 * per_weight:.2f} | {speed['HBM']:.1f}x | {speed['L1']:.2f}x | {speed['issue']:.2f}x"
                f" | {least(speed)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
