"""The compiled kernels, executed in the PTX emulator, against float64: no fault, and the right result.

A part of what kernels/bench/emulate.py runs: between them every path, kernel, dimension, codebook size, number of
stages and activation, with rows and columns that fill no tile, on sm_80 or sm_90.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_case import random_routing

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    import emulated_cases as cases
    from emulated_cases import BF16, FLOAT, HALF, Mixture
    from ptx_emulator.launches import Emulator

    from kbvq_kernels import reference

FULL = {"rank": 5}
SIGNED8 = {"signed": True, "vector_dim": 8, "codebook_dtype": "int8"}
SIGNED4 = {"signed": True, "vector_dim": 4, "codebook_dtype": "int8"}
RQ_GROUPED = {"codebook": "rq-grouped", "num_stages": 2, "num_groups": 3, "vector_dim": 8, "per_expert": True}
RQ3 = {"vector_dim": 8, "num_stages": 3}
INT8_FACTORS = {"rank": 5, "factor_dtype": "int8"}
TRELLIS = {"experts": 3, "top_k": 2, "hidden": 128, "intermediate": 192}
SMALL = {"hidden": 44, "intermediate": 20}
SHORT = {"hidden": 52, "intermediate": 28}  # rows that do not start at multiples of 16 bytes


def trellis(bits: int, **options: object) -> dict[str, object]:
    return {"codebook": "trellis", "codebook_size": 2**bits} | options


MIXTURES = {
    "pairs, signed d8, int8 factors": Mixture("pairs", SIGNED8 | INT8_FACTORS, 90),
    "pairs, signed d4, an expert's codebooks, no scale": Mixture(
        "pairs", SIGNED4 | {"per_expert": True, "rank": 3, "has_scale": False}, 80, HALF, tokens=1
    ),
    "pairs on a full card": Mixture("pairs", SIGNED8, 90, full=True, down=SIGNED4),
    "pairs, vq d4, short rows": Mixture("pairs", FULL, 80, HALF, activation="gelu", **SHORT),
    "pairs, 12 bits, int8": Mixture(
        "pairs", {"codebook_size": 4096, "per_expert": True, "codebook_dtype": "int8"}, 90, tokens=1
    ),
    "pairs, vq d2": Mixture("pairs", {"vector_dim": 2, "has_bias": False}, 80, tokens=1, **SHORT),
    "pairs, two stages": Mixture("pairs", {"vector_dim": 8, "num_stages": 2}, 90, activation="gelu_pytorch_tanh"),
    "pairs, trellis of 2 and 4 bits": Mixture(
        "pairs", trellis(2, rank=2, tail=12), 90, tokens=2, down=trellis(4), **TRELLIS
    ),
    "one token of a shared expert": Mixture("pairs", SIGNED8, 80, tokens=1, experts=1, routed=False),
    "blocks of 8, signed d8": Mixture("blocks", SIGNED8 | FULL, 80, tokens=5),
    "blocks of 16 on a full card": Mixture("blocks", SIGNED4, 90, tokens=13, full=True, activation="relu"),
    "blocks of 32": Mixture("blocks", SIGNED8, 90, HALF, tokens=21),
    "blocks, groups": Mixture("blocks", RQ_GROUPED, 90, tokens=5),
    "blocks, trellis of 3 bits and 1": Mixture("blocks", trellis(3), 80, HALF, tokens=5, down=trellis(1), **TRELLIS),
    "grouped, signed d8": Mixture("grouped", SIGNED8 | FULL, 90, tokens=9),
    "grouped, signed d4, tiles of 64": Mixture("grouped", SIGNED4, 80, tokens=36, activation="gelu"),
    "grouped, three stages, tiles of 128": Mixture("grouped", RQ3 | INT8_FACTORS, 90, tokens=130, experts=2, top_k=1),
    "grouped, 12 bits of two stages": Mixture(
        "grouped", {"vector_dim": 8, "num_stages": 2, "codebook_size": 4096}, 80, HALF, tokens=6
    ),
    "grouped, groups": Mixture("grouped", RQ_GROUPED, 90, HALF, tokens=5),
    "grouped, float32": Mixture("grouped", {"vector_dim": 2}, 80, FLOAT, tokens=5, hidden=12, intermediate=10),
    "grouped, trellis": Mixture("grouped", trellis(2, rank=2), 90, tokens=5, down=trellis(4, tail=20), **SMALL),
    "grouped, a shared expert": Mixture("grouped", {}, 80, HALF, experts=1, routed=False),
    "scratch, signed d8, int8 factors": Mixture("scratch", SIGNED8 | INT8_FACTORS, 90, tokens=8),
    "scratch, 12 bits": Mixture("scratch", {"codebook_size": 4096}, 80, tokens=8),
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
        yield


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_equals_reference_without_a_fault(name):
    _, outcome = cases.run(MIXTURES[name])
    assert outcome.faults == []
    assert outcome.error <= cases.TOLERANCE[MIXTURES[name].dtype]


@pytest.mark.parametrize(
    "path, capability, dtype, tokens, stages",
    [("pairs", 90, BF16, 1, 2), ("pairs", 80, HALF, 2, 1), ("blocks", 80, BF16, 9, 2), ("scratch", 90, BF16, 25, 2)],
)
def test_linear_equals_reference(path, capability, dtype, tokens, stages):
    outcome = cases.linear(path, capability, dtype, tokens, vector_dim=2, num_stages=stages)
    assert outcome.faults == []
    assert outcome.error <= cases.TOLERANCE[dtype]


def test_what_a_load_leaves_undefined_reaches_no_result():
    """trellis_kernel takes anything for codes past the last column: two kinds of anything, the same bits."""
    case = Mixture("pairs", trellis(2), 80, tokens=1, **TRELLIS | {"hidden": 128, "intermediate": 64})
    results = [cases.run(case, poison)[0] for poison in (np.zeros(64, np.uint8), np.full(64, 0xA7, np.uint8))]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "capability, dtype, rows, options",
    [
        (80, FLOAT, 35, {"vector_dim": 8, "num_stages": 3, "codebook_size": 4096, "per_expert": True} | INT8_FACTORS),
        (90, HALF, 35, SIGNED4 | {"per_expert": True, "rank": 2}),
        (80, FLOAT, 24, trellis(1)),
        (90, FLOAT, 40, trellis(3, rank=2)),
    ],
)
def test_dequantize_equals_reference(capability, dtype, rows, options):
    outcome = cases.dequantized(capability, dtype, rows, **options)
    assert outcome.faults == []
    assert outcome.error <= 1e-3  # the low-rank part in TF32


@pytest.mark.parametrize("capability, block_m, pairs, experts", [(80, 16, 75, 5), (90, 1, 300, 7), (80, 8, 1100, 40)])
def test_pairs_are_sorted_by_expert(capability, block_m, pairs, experts):
    outcome = cases.aligned(capability, block_m, pairs, experts)
    assert outcome.faults == []
    assert outcome.error == 0


def test_benchmark_baselines_compute_what_they_are_compared_on(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels/bench"))
    import baselines

    g = torch.Generator().manual_seed(0)
    index, weights = random_routing(3, 2, 4)
    x = torch.randn(3, 256, generator=g)
    banks = torch.randn(4, 24, 256, generator=g) / 16, torch.randn(4, 256, 12, generator=g) / 3
    int4 = [baselines.random_int4(4, *size, "cpu") for size in ((256, 256), (256, 128))]
    unpacked = []
    for words, scale in int4:
        nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2) - 8
        unpacked.append(nibbles * scale.double().repeat_interleave(baselines.INT4_GROUP, -1))
    for forward, packed, dense in (
        (baselines.gemv_moe, banks, [w.double() for w in banks]),
        (baselines.int4_moe, int4, unpacked),
    ):
        emulator = Emulator(80)
        with emulator.installed(modules=[baselines]):
            y = forward(x, index, weights, *packed)
        emulator.check()
        assert cases.relative_error(y, reference.moe_forward(x, index, weights, *dense)) <= 1e-6
