"""Mixtures, and parts of one, that the compiled kernels compute in the PTX emulator, against the float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from packed_case import random_projection, random_routing
from ptx_emulator.launches import POISON, Emulator

from kbvq_kernels import launch, prepare, reference

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32

TOLERANCE = {HALF: 2e-3, BF16: 1.2e-2, FLOAT: 5e-4}
"""Relative error in the Frobenius norm, as in test_gpu.py: h, y and (bfloat16) codewords and operands rounded once
each; float32: sums of tens of terms, the low-rank part in TF32 (2^-11)."""

READS_SKIPPED_ROWS = "routing_kernels.py:26"
"""Where low_rank_kernel reads x. For a pair whose expert lies elsewhere nobody wrote that row, and nobody reads what
comes of it."""


@dataclass(frozen=True)
class Mixture:
    """One call of moe_forward by a path. Expert 0 gets no token, expert 1 most, the last pair one that is not here.

    capability: 80 for sm_80. full: with the tiles of launches that fill a card. down: options of the down projection
    where they differ from those of gate and up. routed: False for a shared expert.
    """

    path: str
    options: dict[str, object]
    capability: int = 90
    dtype: torch.dtype = BF16
    tokens: int = 3
    experts: int = 5
    top_k: int = 3
    hidden: int = 136
    intermediate: int = 72
    activation: str = "silu"
    full: bool = False
    down: dict[str, object] | None = None
    routed: bool = True


@dataclass
class Outcome:
    """error: relative, to be within TOLERANCE. faults: what the emulator found. threads: emulated, of all launches."""

    error: float
    faults: list[str] = field(default_factory=list)
    launches: int = 0


@contextlib.contextmanager
def card(full: bool) -> Iterator[None]:
    """Within the block every launch counts as one that fills a card, if `full`."""
    replaced = launch.FULL_CARD
    launch.FULL_CARD = 1 if full else replaced
    try:
        yield
    finally:
        launch.FULL_CARD = replaced


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def run(case: Mixture, poison: np.ndarray = POISON) -> tuple[torch.Tensor, Outcome]:
    """(what the kernels computed, how that compares)."""
    gate_up = random_projection(case.experts, 2 * case.intermediate, case.hidden, **case.options, seed=1)
    down_options = case.options if case.down is None else case.down
    down = random_projection(case.experts, case.hidden, case.intermediate, **down_options, seed=2)
    x = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(3)).to(case.dtype)
    index, weights = random_routing(case.tokens, case.top_k, case.experts)
    if case.routed and case.tokens * case.top_k > 1:
        index[-1, -1] = case.experts + 7
    if case.path == "scratch":
        weights = weights.to(case.dtype)
    if not case.routed:
        index, weights = torch.zeros(case.tokens, 1, dtype=torch.int64), torch.ones(case.tokens, 1)
    prepared = [prepare(tensors, **fields, dtype=case.dtype, device_type="cuda") for tensors, fields in (gate_up, down)]
    emulator = Emulator(case.capability, poison)
    routing = (index, weights) if case.routed else (None, None)
    with emulator.installed(), card(case.full):
        y = launch.moe_forward(x, *routing, *prepared, case.activation, case.path)
    dense = [reference.dequantize(tensors, **fields) for tensors, fields in (gate_up, down)]
    biases = gate_up[0].get("bias"), down[0].get("bias")
    expected = reference.moe_forward(x.double(), index, weights, *dense, *biases, case.activation)
    faults = [line for line in emulator.faults.lines() if not _expected(line)]
    if emulator.unwritten(y):
        faults.append(f"{emulator.unwritten(y)} bytes of the result are not written")
    return y, Outcome(relative_error(y, expected), faults, len(emulator.launched))


def _expected(fault: str) -> bool:
    return fault.startswith("uninitialised memory") and READS_SKIPPED_ROWS in fault


def linear(path: str, capability: int, dtype: torch.dtype, tokens: int, **options: object) -> Outcome:
    """One projection of one expert, 48 rows and 136 columns, by a path of launch.linear."""
    tensors, fields = random_projection(1, 48, 136, **options)
    prepared = prepare(tensors, **fields, dtype=dtype, device_type="cuda")
    x = torch.randn(tokens, 136, generator=torch.Generator().manual_seed(3)).to(dtype)
    emulator = Emulator(capability)
    with emulator.installed():
        y = launch.linear(x, prepared, path)
    faults = emulator.faults.lines()
    if emulator.unwritten(y):
        faults.append(f"{emulator.unwritten(y)} bytes of the result are not written")
    expected = x.double() @ reference.dequantize(tensors, **fields)[0].T + tensors["bias"].double()
    return Outcome(relative_error(y, expected), faults, len(emulator.launched))


def dequantized(capability: int, dtype: torch.dtype, rows: int = 35, **options: object) -> Outcome:
    """Weights of two experts of `rows` rows and 72 columns, by dequantize_kernel."""
    tensors, fields = random_projection(2, rows, 72, **options)
    prepared = prepare(tensors, **fields, dtype=HALF, device_type="cuda")
    emulator = Emulator(capability)
    with emulator.installed():
        out = torch.empty(2, rows, 72, dtype=dtype)
        launch.dequantize(prepared, out)
    faults = emulator.faults.lines()
    if emulator.unwritten(out):
        faults.append(f"{emulator.unwritten(out)} bytes are not written")
    return Outcome(relative_error(out, reference.dequantize(tensors, **fields)), faults, 1)


def aligned(capability: int, block_m: int, num_pairs: int, num_experts: int) -> Outcome:
    """align_kernel against a sort in Python; the error is the number of differences."""
    g = torch.Generator().manual_seed(num_pairs)
    experts = torch.randint(-1, num_experts + 2, (num_pairs, 1), generator=g)
    experts[experts == 2] = 1  # an expert without pairs
    emulator = Emulator(capability)
    with emulator.installed():
        sorted_pairs, block_experts, ends, slots = launch.align(experts, num_experts, block_m)
    want_pairs, want_blocks, want_ends, differences = [], [], [], 0
    for e in range(num_experts):
        mine = [p for p in range(num_pairs) if experts[p, 0] == e]
        for i, p in enumerate(mine):
            differences += slots[p].item() != len(want_pairs) + i
        want_ends.append(len(want_pairs) + len(mine))
        blocks = -(-len(mine) // block_m)
        want_pairs += mine + [num_pairs] * (blocks * block_m - len(mine))
        want_blocks += [e] * blocks
    want_blocks += [-1] * (len(block_experts) - len(want_blocks))
    want_pairs += [num_pairs] * (len(sorted_pairs) - len(want_pairs))
    for got, want in ((sorted_pairs, want_pairs), (block_experts, want_blocks), (ends, want_ends)):
        differences += (got != torch.tensor(want)).sum().item()
    return Outcome(float(differences), emulator.faults.lines(), 1)
