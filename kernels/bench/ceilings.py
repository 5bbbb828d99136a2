"""Ceilings of every format from the compiled code, without a GPU. Run: python kernels/bench/ceilings.py

For each kernel's inner loop on sm_90: instructions, table lookups and code bytes per weight, and the speed-up over
bfloat16 weights read at the full copy bandwidth that each resource of an H200 would allow by itself:

    HBM    16 / code bits
    table  random lookups through the L1 cache: bank conflicts (simulated) and four tags a cycle
    issue  one instruction a cycle for each of an SM's four schedulers

The kernel's ceiling is the least of the three. Nothing here was timed: the machine numbers below are the inputs.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from synthetic import FORMATS, SHAPES, random_tensors

from kbvq_kernels import aot, launch, prepare

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


def kernels_of(code, capability: int = 90):
    """(label, launch, weights per pass of the inner loop and warp, bytes per lookup) for long rows."""
    shape = replace(SHAPES[2], num_experts=8)
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    projections = []
    for rows, columns in sizes:
        tensors, fields = random_tensors(code, 1, 1, columns)
        whole = {"codes": (shape.num_experts, rows, -1), "scale": (8, rows), "bias": (8, rows)}
        meta = {name: t.to("meta").expand(whole.get(name, t.shape)) for name, t in tensors.items()}
        projections.append(prepare(meta, **fields, dtype=torch.bfloat16))
    for label, path, tokens in (("decode", "decode", 1), ("grouped", "grouped", 16), ("grouped 128", "grouped", 2048)):
        x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
        index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
        weights = torch.empty(tokens, shape.top_k, device="meta")
        with aot.record(capability) as recorded:
            launch.moe_forward(x, index, weights, *projections, "silu", path)
        for entry in recorded:
            a, warps = entry.arguments, entry.options.get("num_warps", 4)
            name = entry.kernel.fn.__name__
            if name == "gate_up_kernel":
                rows = 2 * a["BLOCK_N"]
                yield f"{label} gate_up", entry, rows * a["BLOCK_W"] * 4 * a["D"] / warps, min(8, 2 * a["D"])
            elif name == "down_kernel":
                rows = a["BLOCK_N"] * a["BLOCK_J"]
                yield f"{label} down", entry, rows * a["BLOCK_W"] * 4 * a["D"] / warps, min(8, 2 * a["D"])
            elif name == "grouped_kernel" and not a["GATED"]:
                yield f"{label} down", entry, a["BLOCK_N"] * a["BLOCK_V"] * a["D"] / warps, 2 * a["D"]


def main() -> None:
    print(f"H200 inputs: {SM_COUNT} SMs, {CLOCK_HZ / 1e9} GHz, {COPY_BYTES_PER_S / 1e12} TB/s; bf16 x, sm_90")
    columns = "format kernel registers spilled lookups/weight instructions/weight HBM table issue ceiling".split()
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for code in FORMATS:
        for label, entry, weights, load_bytes in kernels_of(code):
            compiled = aot.inspect(aot.compile_launch(entry, 90))
            per_weight = sum(compiled.loop.values()) / weights
            lookups = code.num_stages / code.vector_dim
            cycles = lookup_cycles(2 * code.vector_dim, load_bytes, code.codebook_size)
            hbm = 16 / code.bits
            table = SM_COUNT * CLOCK_HZ * 32 / cycles / lookups / BF16_WEIGHTS_PER_S
            issue = SM_COUNT * 4 * CLOCK_HZ / per_weight / BF16_WEIGHTS_PER_S
            limit = min(("HBM", hbm), ("table", table), ("issue", issue), key=lambda pair: pair[1])
            print(
                f"| {code.name} | {label} | {compiled.registers} | {compiled.spilled} | {lookups:.3f} "
                f"| {32 * per_weight:.2f} | {hbm:.1f}x | {table:.2f}x | {issue:.2f}x | {limit[1]:.2f}x ({limit[0]}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
