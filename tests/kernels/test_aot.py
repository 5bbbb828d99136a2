"""Every kernel compiles for the cards that users have, without spills and with wide loads, on a machine without one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from packed_case import random_projection

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    from kbvq_kernels import PreparedProjection, aot, launch, prepare, triton_kernels

KERNELS = (
    "low_rank_kernel",
    "gate_up_kernel",
    "down_kernel",
    "dequantize_kernel",
    "align_kernel",
    "grouped_kernel",
    "combine_kernel",
)
BENCH = Path(__file__).parents[2] / "kernels/bench"
QWEN3, MIXTRAL = (2048, 768), (4096, 14336)
PATHS = {"decode": 2, "grouped": 16, "scratch": 512}
FORMATS = {
    "vq-d4": {"vector_dim": 4, "rank": 32},
    "vq-d4-12bit-int8": {"vector_dim": 4, "codebook_size": 4096, "rank": 32, "factor_dtype": "int8"},
    "rq2-d8": {"vector_dim": 8, "num_stages": 2, "per_expert": True},
    "rq3-d8": {"vector_dim": 8, "num_stages": 3},
    "rq2-d8-12bit": {"vector_dim": 8, "num_stages": 2, "codebook_size": 4096},
}


def meta_projection(experts: int, rows: int, columns: int, dtype: torch.dtype, **options) -> PreparedProjection:
    """A prepared projection of which only shapes and dtypes exist."""
    tensors, fields = random_projection(1, 1, columns, **options)
    sizes = {
        "codes": (experts, rows, -1),
        "scale": (experts, rows),
        "bias": (experts, rows),
        "coefficients": (experts, rows, -1),
        "coefficients_scale": (experts, -1),
    }
    if options.get("per_expert"):
        sizes["codebook"] = (experts, -1, -1, -1)
    meta = {name: t.to("meta").expand(sizes.get(name, t.shape)) for name, t in tensors.items()}
    return prepare(meta, **fields, dtype=dtype)


def launches(
    path: str, tokens: int, dtype: torch.dtype, capability: int = 90, lengths: tuple[int, int] = QWEN3, **options
) -> list[aot.Launch]:
    """What one call of the path launches, for a bank of 16 experts; lengths: hidden and intermediate size."""
    experts, (hidden, intermediate), top_k = 16, lengths, 4
    gate_up = meta_projection(experts, 2 * intermediate, hidden, dtype, **options)
    down = meta_projection(experts, hidden, intermediate, dtype, **options)
    x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
    index = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device="meta")
    with aot.record(capability) as recorded:
        launch.moe_forward(x, index, weights, gate_up, down, "silu", path)
    return recorded


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
        yield


def test_the_paths_launch_every_kernel():
    entries = [entry for path, tokens in PATHS.items() for entry in launches(path, tokens, torch.bfloat16, rank=4)]
    names = {entry.kernel.fn.__name__ for entry in entries}
    jitted = {name for name, k in vars(triton_kernels).items() if isinstance(k, triton_kernels.triton.JITFunction)}
    assert names == set(KERNELS) == {name for name in jitted if not name.startswith("_")}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("capability", aot.TARGETS)
def test_compiles_for_every_target_without_spills(capability, path):
    for entry in launches(path, PATHS[path], torch.bfloat16, capability, **FORMATS["vq-d4"]):
        code = aot.inspect(aot.compile_launch(entry, capability))
        assert code.spilled == 0, f"{entry.kernel.fn.__name__} sm_{capability}: {code.spilled} bytes spilled"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_without_spills_and_with_wide_code_loads(name):
    """In SASS, the loads of codes are those marked evict-first (.EF). Long rows get the largest tiles.

    Low bytes come in 8 bytes or more a lane; the nibbles of as many codes are half of that.
    """
    for path in ("decode", "grouped"):
        for entry in launches(path, PATHS[path], torch.bfloat16, lengths=MIXTRAL, **FORMATS[name]):
            kernel = entry.kernel.fn.__name__
            if kernel not in ("gate_up_kernel", "down_kernel", "grouped_kernel"):
                continue
            code = aot.inspect(aot.compile_launch(entry, 90))
            assert code.spilled == 0, f"{kernel}: {code.spilled} bytes spilled, {code.registers} registers"
            opcodes = "\n".join(code.instructions)
            if kernel == "grouped_kernel":
                assert re.search(r"HGMMA|HMMA", opcodes), f"{kernel}: no tensor-core instruction"
                assert re.search(r"LDG\.E\.EF\.(64|128)$", opcodes, re.M), opcodes
            else:
                narrow = re.findall(r"LDG\.E\.EF\.(?:U16|U8)$", opcodes, re.M)
                assert not narrow, f"{kernel}: {narrow}"
                assert re.search(r"LDG\.E\.EF\.(64|128)$", opcodes, re.M), opcodes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_dtypes_compile(dtype):
    for path in ("decode", "grouped"):
        for entry in launches(path, PATHS[path], dtype, vector_dim=4, has_bias=False):
            if entry.kernel.fn.__name__ in ("down_kernel", "grouped_kernel"):
                assert aot.inspect(aot.compile_launch(entry, 90)).spilled == 0, entry.kernel.fn.__name__


def test_benchmark_baselines_compile(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import baselines

    def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index, weights = empty(2, 4, dtype=torch.int64), empty(2, 4, dtype=torch.float32)
    int4 = [
        (empty(16, n, k // 8, dtype=torch.int32), empty(16, n, k // baselines.INT4_GROUP, dtype=torch.float16))
        for n, k in ((1536, 2048), (2048, 768))
    ]
    with aot.record(module=baselines) as recorded:
        baselines.gemv_moe(empty(2, 2048), index, weights, empty(16, 1536, 2048), empty(16, 2048, 768))
        baselines.int4_moe(empty(2, 2048), index, weights, *int4)
        baselines.lookup_kernel[(8,)](
            empty(512, dtype=torch.int64), empty(2048, dtype=torch.int64), ENTRIES=256, WORDS=2, REPEAT=4, BLOCK=256
        )
    assert len(recorded) == 5
    for entry in recorded:
        assert aot.inspect(aot.compile_launch(entry, 90)).spilled == 0, entry.kernel.fn.__name__
