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
from dataclasses import replace

import torch
from synthetic import FORMATS, SHAPES, CodeFormat, meta_bank

from kbvq_kernels import aot, launch

SM_COUNT, CLOCK_HZ, COPY_BYTES_PER_S = 132, 1.755e9, 4.3e12
"""An H200: multiprocessors, an assumed sustained clock, and the copy bandwidth measured on one."""

BF16_WEIGHTS_PER_S = COPY_BYTES_PER_S / 2


def lookup_cycles(entry_bytes: int, load_bytes: int, entries: int, trials: int = 400) -> float:
    """Cycles an SM's L1 cache spends on 32 random lookups, each of entry_bytes in loads of load_bytes.

    A wavefront serves the lanes of one phase (128 bytes' worth) whose banks differ; equal addresses merge. Tags are
    checked at four 128-byte lines a cycle for each load.
    """
    rng, total = random.Random(0), 0.0
    lanes = 128 // load_bytes if load_bytes > 4 else 32
    for _ in range(trials):
        codes = [rng.randrange(entries) for _ in range(32)]
        for part in range(entry_bytes // load_bytes):
            # Each part of the codewords is a table of its own.
            addresses = [(part * entries + code) * load_bytes for code in codes]
            tags = len({a // 128 for a in addresses}) / 4
            waves = 0
            for start in range(0, 32, lanes):
                slots: dict[int, set[int]] = {}
                for a in addresses[start : start + lanes]:
                    slots.setdefault(a % 128 // load_bytes, set()).add(a)
                waves += max(map(len, slots.values()))
            total += max(tags, waves)
    return total / trials


def table_of(code: CodeFormat) -> tuple[int, int]:
    """(bytes of a codeword on CUDA, entries that its lookups spread over)."""
    if code.codebook == "trellis":
        return 2, 256
    one_table = code.num_stages == 1 and code.vector_dim >= 4
    size = code.vector_dim * (1 if code.codebook_dtype == "int8" and one_table else 2)
    return size, code.codebook_size


def l1_cycles(code: CodeFormat, path: str, compiled: aot.MachineCode, weights: float) -> float:
    """Cycles that the L1 cache and shared memory, one unit, spend on a weight.

    Lookups (and in rq-moe those of groups, one byte each), then every other load and store of the loop at 128 bytes a
    cycle. A load of x in decode_kernel touches 32 lines at four tags a cycle, or a single token's four lines.
    """
    size, entries = table_of(code)
    lookups = code.num_stages / code.vector_dim
    cycles = lookups * lookup_cycles(size, min(8, size), entries) / 32
    if code.num_groups > 1:
        cycles += (code.num_stages - 1) / code.vector_dim * lookup_cycles(1, 1, 256) / 32
    for opcode, count in compiled.loop.items():
        parts = opcode.split(".")
        if parts[0] not in ("LDS", "STS", "LDSM", "STSM", "LDG") or "EL" in parts:
            continue
        each = 4 if "128" in parts or parts[-1] == "4" else 2 if "64" in parts else 1
        if parts[0] == "LDG" and "EF" not in parts and path != "grouped":
            each = 1 if path == "pairs" else 8
        cycles += count * each / weights
    return cycles


def kernels_of(code: CodeFormat, capability: int = 90):
    """(label, launch, weights per pass of the inner loop and warp) for long rows."""
    shape = replace(SHAPES[2], num_experts=8)
    projections = meta_bank(shape, code)
    paths = (("pairs", 1), ("blocks", 16), ("grouped", 2048))
    for path, tokens in paths:
        if path != "grouped" and not all(launch.decodes(p, torch.bfloat16) for p in projections):
            continue
        x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
        index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
        weights = torch.empty(tokens, shape.top_k, device="meta")
        with aot.record(capability) as recorded:
            launch.moe_forward(x, index, weights, *projections, "silu", path)
        for entry in recorded:
            a, warps = entry.arguments, entry.options.get("num_warps", 4)
            name = entry.kernel.fn.__name__
            if a.get("GATED"):
                continue
            if name == "decode_kernel":
                yield path, entry, a["BLOCK_N"] * a["LENGTH"] * 16 * a["D"]
            elif name == "grouped_kernel":
                yield path, entry, a["BLOCK_N"] * a["BLOCK_V"] * a["D"] / warps


def main() -> None:
    print(f"H200 inputs: {SM_COUNT} SMs, {CLOCK_HZ / 1e9} GHz, {COPY_BYTES_PER_S / 1e12} TB/s; bf16 x, sm_90")
    columns = "format path registers spilled lookups/weight instructions/weight HBM L1 issue ceiling".split()
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for code in FORMATS:
        for label, entry, weights in kernels_of(code):
            compiled = aot.inspect(aot.compile_launch(entry, 90))
            per_weight = sum(compiled.loop.values()) / weights
            lookups = code.num_stages / code.vector_dim
            hbm = 16 / code.bits
            table = SM_COUNT * CLOCK_HZ / l1_cycles(code, label, compiled, weights) / BF16_WEIGHTS_PER_S
            issue = SM_COUNT * 4 * CLOCK_HZ / per_weight / BF16_WEIGHTS_PER_S
            limit = min(("HBM", hbm), ("L1", table), ("issue", issue), key=lambda pair: pair[1])
            print(
                f"| {code.name} | {label} | {compiled.registers} | {compiled.spilled} | {lookups:.3f} "
                f"| {32 * per_weight:.2f} | {hbm:.1f}x | {table:.2f}x | {issue:.2f}x | {limit[1]:.2f}x ({limit[0]}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
