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
    "decode_kernel",
    "dequantize_kernel",
    "align_kernel",
    "grouped_kernel",
    "combine_kernel",
)
BENCH = Path(__file__).parents[2] / "kernels/bench"
QWEN3, MIXTRAL = (2048, 768), (4096, 14336)
PATHS = {"pairs": 2, "blocks": 64, "grouped": 512, "scratch": 512}
SIGNED = {"signed": True, "codebook_dtype": "int8", "rank": 32, "factor_dtype": "int8"}
MAIN = {
    "signed-d8": SIGNED | {"vector_dim": 8},
    "signed-d4": SIGNED | {"vector_dim": 4},
    "trellis-2": {"codebook": "trellis", "codebook_size": 4, "rank": 32},
}
"""What the quantizer writes by default, and the format without a table: compiled for every card."""
OTHERS = {
    "vq-d4": {"vector_dim": 4, "rank": 32},
    "vq-d4-int8": {"vector_dim": 4, "codebook_dtype": "int8"},
    "vq-d4-12bit-int8": {"vector_dim": 4, "codebook_size": 4096, "codebook_dtype": "int8", "rank": 32},
    "signed-d8-half": {"signed": True, "vector_dim": 8},
    "rq2-d8": {"vector_dim": 8, "num_stages": 2, "per_expert": True, "codebook_dtype": "int8"},
    "rq3-d8": {"vector_dim": 8, "num_stages": 3},
    "rq2-d8-12bit": {"vector_dim": 8, "num_stages": 2, "codebook_size": 4096},
    "rq-moe2-d8": {"codebook": "rq-moe", "vector_dim": 8, "num_stages": 2, "num_groups": 8},
}


def meta_projection(experts: int, rows: int, columns: int, dtype: torch.dtype, **options) -> PreparedProjection:
    """A prepared projection of which only shapes and dtypes exist."""
    tensors, fields = random_projection(1, 16, columns, **options)
    trellis = options.get("codebook") == "trellis"
    meta = {}
    for name, t in tensors.items():
        size = list(t.shape)
        if name in ("codes", "scale", "bias", "coefficients", "coefficients_scale"):
            size[0] = experts
        if name in ("codes", "scale", "bias", "coefficients"):
            axis = 2 if name == "codes" and trellis else 1
            size[axis] = size[axis] * rows // 16
        if name in ("codebook", "codebook_scale", "groups") and options.get("per_expert"):
            size[0] = experts
        meta[name] = torch.empty(size, dtype=t.dtype, device="meta")
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


def check_code(entry: aot.Launch, capability: int) -> None:
    """No spills; tensor cores; in SASS, the loads of codes are those marked evict-first (.EF).

    decode_kernel: codes come in 8 bytes or more a lane, half of that for nibbles and for signs of vectors of 4, and
    weights never go through shared memory inside the loop.
    """
    kernel = entry.kernel.fn.__name__
    code = aot.inspect(aot.compile_launch(entry, capability))
    assert code.spilled == 0, f"{kernel} sm_{capability}: {code.spilled} bytes spilled, {code.registers} registers"
    opcodes = "\n".join(code.instructions)
    if kernel in ("decode_kernel", "grouped_kernel"):
        assert re.search(r"HGMMA|HMMA|UTC\w*MMA", opcodes), f"{kernel}: no tensor-core instruction"
    if kernel == "decode_kernel" and capability == 90:
        assert re.search(r"LDG\.E\.EF\.(64|128)$", opcodes, re.M), opcodes
        assert not re.search(r"LDG\.E\.EF\.(U16|U8)$", opcodes, re.M), opcodes
        looped = entry.arguments["K"] > 2048  # shorter rows may take one step, with no loop to look at
        assert not (looped and [name for name in code.loop if re.match(r"STS|LDS|STSM", name)]), code.loop


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


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("capability", aot.TARGETS)
def test_main_formats_compile_for_every_target(capability, name):
    """Each kernel once: gate and up of pairs, down of blocks, gate and up of large blocks, dequantization of down."""
    trellis = MAIN[name].get("codebook") == "trellis"
    for path, which in {"pairs": 0, "blocks": 1, "grouped": 0, "scratch": 1}.items():
        if trellis and path in ("pairs", "blocks"):
            continue
        entries = launches(path, PATHS[path], torch.bfloat16, capability, **MAIN[name])
        check_code([entry for entry in entries if "words_ptr" in entry.arguments][which], capability)


@pytest.mark.parametrize("name", ["signed-d8", "signed-d4"])
def test_default_formats_decode_in_registers(name):
    entries = launches("pairs", 1, torch.bfloat16, lengths=MIXTRAL, **MAIN[name])
    check_code([entry for entry in entries if "words_ptr" in entry.arguments][1], 90)


@pytest.mark.parametrize("capability", aot.TARGETS)
def test_the_other_kernels_compile_for_every_target(capability):
    for entry in launches("blocks", 64, torch.bfloat16, capability, vector_dim=4, rank=32):
        if "words_ptr" not in entry.arguments:
            check_code(entry, capability)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("capability", aot.TARGETS)
def test_the_other_formats_compile_for_every_target(capability, name):
    """Long rows get the largest tiles."""
    for path in ("blocks", "grouped") if capability == 90 else ("blocks",):
        entries = launches(path, PATHS[path], torch.bfloat16, capability, MIXTRAL, **OTHERS[name])
        check_code([entry for entry in entries if "words_ptr" in entry.arguments][1], capability)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_dtypes_compile(dtype):
    """float32 hidden states take grouped_kernel, whatever their number."""
    path = launch.select_path(1, 4, 16, dtype, (9, 0), 0, launch.decodes(meta_projection(1, 32, 64, dtype), dtype))
    assert path == ("pairs" if dtype == torch.float16 else "grouped")
    entry = [e for e in launches(path, 1, dtype, **SIGNED, vector_dim=8) if "words_ptr" in e.arguments][1]
    assert aot.inspect(aot.compile_launch(entry, 90)).spilled == 0


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
