"""Runs the Triton kernels in Triton's interpreter, on CPU, against the float64 reference; prints one JSON line.

A program of its own: triton decides when it decorates a kernel, at import, whether that kernel is interpreted,
so one process cannot both interpret the kernels and compile them ahead of time. `test_interpreter.py` runs it.

torch fills every torch.empty with NaN (integers: the highest value) in deterministic mode, so whatever a kernel
should have written and did not poisons the result.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import baselines  # noqa: E402
import ptx_emulator  # noqa: E402
import torch  # noqa: E402
from packed_case import random_projection, random_routing  # noqa: E402

from kbvq_kernels import launch, prepare, reference  # noqa: E402

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32

# name -> (path, dtype, experts, hidden, intermediate, tokens, top_k, activation, gate_up options, down options).
# Between them: every path, dimension, codebook size, number of stages, activation and optional tensor;
# row counts and vector counts that divide no block; sentinels; an expert without tokens.
FULL = {"rank": 5}
SIGNED8 = {"signed": True, "vector_dim": 8, "codebook_dtype": "int8"}
SIGNED4 = {"signed": True, "vector_dim": 4, "codebook_dtype": "int8"}
RQ_MOE = {"codebook": "rq-moe", "num_stages": 3, "num_groups": 3, "vector_dim": 8, "per_expert": True}
MOE_CASES = {
    "pairs-d4": ("pairs", HALF, 5, 52, 28, 3, 3, "silu", FULL, FULL),
    "pairs-d4-12bit-int8": (
        "pairs", HALF, 3, 36, 20, 2, 2, "gelu",
        {"codebook_size": 4096, "per_expert": True, "rank": 3, "factor_dtype": "int8", "codebook_dtype": "int8"},
        {"codebook_size": 4096, "per_expert": True, "rank": 3, "factor_dtype": "int8"},
    ),
    "pairs-d8-rq2-bf16": (
        "pairs", BF16, 4, 96, 40, 2, 2, "gelu_pytorch_tanh",
        {"vector_dim": 8, "num_stages": 2, "has_scale": False},
        {"vector_dim": 8, "num_stages": 2, "has_bias": False, "rank": 2, "codebook_dtype": "int8"},
    ),
    "pairs-signed": (
        "pairs", HALF, 3, 136, 72, 2, 2, "silu", SIGNED8 | {"rank": 5, "factor_dtype": "int8"},
        SIGNED4 | {"per_expert": True, "rank": 3, "has_scale": False},
    ),
    "pairs-signed-exact-bf16": ("pairs", BF16, 3, 512, 256, 2, 2, "silu", SIGNED8, SIGNED4),
    "pairs-d2": (
        "pairs", BF16, 3, 44, 24, 2, 2, "silu", {"vector_dim": 2, "codebook_dtype": "int8"}, {"vector_dim": 2},
    ),
    "blocks-signed-16": (
        "blocks", HALF, 3, 72, 40, 13, 3, "relu", SIGNED4 | {"rank": 2}, {"signed": True, "vector_dim": 8},
    ),
    "blocks-rq-moe": ("blocks", HALF, 4, 56, 40, 5, 2, "silu", RQ_MOE, RQ_MOE | {"codebook_dtype": "int8", "rank": 2}),
    "blocks-rq-moe-12bit": (
        "blocks", BF16, 3, 48, 32, 4, 2, "silu", RQ_MOE | {"num_stages": 2, "codebook_size": 4096},
        {"codebook_dtype": "int8", "vector_dim": 8, "per_expert": True},
    ),
    "pairs-trellis": (
        "pairs", BF16, 2, 128, 64, 2, 2, "silu", {"codebook": "trellis", "codebook_size": 4, "rank": 2},
        {"codebook": "trellis", "codebook_size": 16},
    ),
    "blocks-trellis": (
        "blocks", HALF, 3, 256, 192, 9, 2, "silu", {"codebook": "trellis", "codebook_size": 16},
        {"codebook": "trellis", "codebook_size": 2, "per_expert": False},
    ),
    "pairs-trellis-3": (
        "pairs", HALF, 2, 256, 128, 2, 1, "relu", {"codebook": "trellis", "codebook_size": 8},
        {"codebook": "trellis", "codebook_size": 8},
    ),
    "grouped-d4": ("grouped", HALF, 5, 52, 28, 9, 3, "silu", FULL, FULL),
    "grouped-d8-rq2-12bit-bf16": (
        "grouped", BF16, 3, 72, 40, 6, 2, "gelu",
        {"vector_dim": 8, "num_stages": 2, "codebook_size": 4096, "per_expert": True},
        {"vector_dim": 8, "num_stages": 3, "rank": 4, "factor_dtype": "int8", "has_bias": False},
    ),
    "grouped-d2": ("grouped", FLOAT, 2, 10, 6, 5, 1, "relu", {"vector_dim": 2}, {"vector_dim": 2}),
    "grouped-signed": ("grouped", FLOAT, 3, 72, 40, 6, 2, "silu", SIGNED8 | {"rank": 3}, SIGNED4 | {"rank": 3}),
    "grouped-rq-moe": (
        "grouped", HALF, 3, 40, 24, 5, 2, "silu", RQ_MOE, RQ_MOE | {"vector_dim": 4, "codebook_size": 4096},
    ),
    "grouped-trellis": (
        "grouped", HALF, 3, 44, 20, 5, 2, "silu", {"codebook": "trellis", "codebook_size": 4, "rank": 2},
        {"codebook": "trellis", "codebook_size": 16},
    ),
    "scratch-d4": (
        "scratch", BF16, 4, 64, 32, 8, 2, "silu",
        {"rank": 5, "factor_dtype": "int8"},
        {"codebook_size": 4096, "has_bias": False},
    ),
    "scratch-signed": ("scratch", BF16, 3, 64, 32, 8, 2, "silu", SIGNED8, SIGNED4),
}  # fmt: skip


def kernel_form(tensors, fields, dtype):
    """A projection prepared as on CUDA."""
    return prepare(tensors, **fields, dtype=dtype, device_type="cuda")


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def moe_case(path, dtype, experts, hidden, intermediate, tokens, top_k, activation, gate_up_options, down_options):
    gate_up = random_projection(experts, 2 * intermediate, hidden, **gate_up_options, seed=1)
    down = random_projection(experts, hidden, intermediate, **down_options, seed=2)
    index, weights = random_routing(tokens, top_k, experts)
    index[-1, -1] = experts + 7  # an expert-parallel sentinel
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    if path == "scratch":
        weights = weights.to(BF16)
    y = launch.moe_forward(x, index, weights, kernel_form(*gate_up, dtype), kernel_form(*down, dtype), activation, path)
    return relative_error(y, expected_moe(x, index, weights, gate_up, down, activation))


def full_card_case(*arguments):
    """With the tiles that launches large enough for a card of compute capability 9 get."""
    replaced = launch.FULL_CARD, launch.capability
    launch.FULL_CARD, launch.capability = 1, lambda x: (9, 0)
    try:
        return moe_case(*arguments)
    finally:
        launch.FULL_CARD, launch.capability = replaced


def expected_moe(x, index, weights, gate_up, down, activation):
    (g, g_fields), (d, d_fields) = gate_up, down
    return reference.moe_forward(
        x.double(),
        index,
        weights,
        reference.dequantize(g, **g_fields),
        reference.dequantize(d, **d_fields),
        g.get("bias"),
        d.get("bias"),
        activation,
    )


def shared_case(path):
    gate_up, down = random_projection(1, 24, 32, seed=1), random_projection(1, 32, 12, seed=2)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).half()
    y = launch.moe_forward(x, None, None, kernel_form(*gate_up, HALF), kernel_form(*down, HALF), "silu", path)
    index, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    return relative_error(y, expected_moe(x, index, weights, gate_up, down, "silu"))


def dequantize_case(dtype, rows=35, **options):
    tensors, fields = random_projection(2, rows, 72, **options)
    prepared = kernel_form(tensors, fields, HALF)
    out = torch.empty(2, rows, 72, dtype=dtype)
    launch.dequantize(prepared, out)
    return relative_error(out, reference.dequantize(tensors, **fields))


def align_case(block_m, num_pairs, num_experts):
    """Counts mismatches against a sort in Python: 0.0 or the case is wrong."""
    g = torch.Generator().manual_seed(num_pairs)
    experts = torch.randint(-1, num_experts + 2, (num_pairs, 1), generator=g)
    experts[experts == 2] = 1  # an expert without pairs
    sorted_pairs, block_experts, ends, slots = launch.align(experts, num_experts, block_m)
    want_pairs, want_blocks, want_ends, mismatches = [], [], [], 0
    for e in range(num_experts):
        mine = [p for p in range(num_pairs) if experts[p, 0] == e]
        for i, p in enumerate(mine):
            mismatches += slots[p].item() != len(want_pairs) + i
        want_ends.append(len(want_pairs) + len(mine))
        blocks = -(-len(mine) // block_m)
        want_pairs += mine + [num_pairs] * (blocks * block_m - len(mine))
        want_blocks += [e] * blocks
    want_blocks += [-1] * (len(block_experts) - len(want_blocks))
    want_pairs += [num_pairs] * (len(sorted_pairs) - len(want_pairs))
    mismatches += (sorted_pairs != torch.tensor(want_pairs)).sum().item()
    mismatches += (block_experts != torch.tensor(want_blocks)).sum().item()
    mismatches += (ends != torch.tensor(want_ends)).sum().item()
    return float(mismatches)


def baseline_case(kind):
    """The benchmark's baselines compute what they are compared on."""
    g = torch.Generator().manual_seed(0)
    index, weights = random_routing(3, 2, 4)
    x = torch.randn(3, 256, generator=g)
    if kind == "gemv":
        banks = torch.randn(4, 24, 256, generator=g) / 16, torch.randn(4, 256, 12, generator=g) / 3
        dense = [w.double() for w in banks]
        y = baselines.gemv_moe(x, index, weights, *banks)
    else:
        banks = [baselines.random_int4(4, *size, "cpu") for size in ((256, 256), (256, 128))]
        dense = []
        for words, scale in banks:
            nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2) - 8
            dense.append(nibbles * scale.double().repeat_interleave(baselines.INT4_GROUP, -1))
        y = baselines.int4_moe(x, index, weights, *banks)
    return relative_error(y, reference.moe_forward(x, index, weights, *dense))


CASES = {name: (lambda a=a: moe_case(*a)) for name, a in MOE_CASES.items()} | {
    "pairs-full-card": lambda: full_card_case("pairs", HALF, 2, 512, 256, 2, 1, "silu", SIGNED8, SIGNED4),
    "blocks-full-card": lambda: full_card_case("blocks", HALF, 3, 256, 128, 8, 2, "silu", SIGNED8, SIGNED4),
    "shared-pairs": lambda: shared_case("pairs"),
    "shared-grouped": lambda: shared_case("grouped"),
    "dequantize-d4": lambda: dequantize_case(FLOAT, rank=5),
    "dequantize-d8-rq3-12bit": lambda: dequantize_case(
        HALF, vector_dim=8, num_stages=3, codebook_size=4096, per_expert=True, rank=3, factor_dtype="int8"
    ),
    "dequantize-signed": lambda: dequantize_case(FLOAT, **SIGNED8, per_expert=True, rank=2),
    "dequantize-rq2-int8": lambda: dequantize_case(FLOAT, vector_dim=8, num_stages=2, codebook_dtype="int8"),
    "dequantize-trellis-1": lambda: dequantize_case(FLOAT, 24, codebook="trellis", codebook_size=2),
    "dequantize-trellis-2": lambda: dequantize_case(FLOAT, 84, codebook="trellis", codebook_size=4, rank=2),
    "dequantize-trellis-3": lambda: dequantize_case(FLOAT, 40, codebook="trellis", codebook_size=8),
    "dequantize-trellis-4": lambda: dequantize_case(FLOAT, 34, codebook="trellis", codebook_size=16),
    "align-blocks": lambda: align_case(16, 75, 5),
    "align-sort": lambda: align_case(1, 300, 7),
    "baseline-gemv": lambda: baseline_case("gemv"),
    "baseline-int4": lambda: baseline_case("int4"),
}


def main() -> None:
    ptx_emulator.install()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    results = {}
    for name in sys.argv[1:] or CASES:
        try:
            results[name] = CASES[name]()
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
