"""Every kernel compiles for the cards that users have, without spills and with wide loads, on a machine without one."""

from __future__ import annotations

import multiprocessing
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
    from kbvq_kernels import aot, launch

KERNELS = (
    "low_rank_kernel",
    "decode_kernel",
    "trellis_kernel",
    "dequantize_kernel",
    "align_kernel",
    "grouped_kernel",
    "combine_kernel",
)
BENCH = Path(__file__).parents[2] / "kernels/bench"
LARGEST_SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory a program may have, by compute capability (CUDA programming guide)."""
QWEN3 = {"hidden": 2048, "intermediate": 768}
DEFAULT = aot.FORMATS["signed d8 int8 low-rank"]


def _cases(name: str, capability: int) -> list[aot.Case]:
    """What the tests compile of a format for a card: on sm_90 every path, for others the first; of the defaults every
    path for each. Of pairs and blocks one: int8 codebooks with gate and up fused."""
    paths = ["pairs", "blocks", "grouped", "scratch"]
    if name not in aot.DEFAULTS:
        paths.remove("pairs" if "int8" in name or "trellis" in name else "blocks")
    if name not in aot.DEFAULTS and capability != 90:
        paths = paths[:1]
    return [aot.Case(name, path, capability) for path in paths]


@pytest.fixture(scope="module")
def compiled(request):
    """Case -> future of its machine code, of what the collected tests ask for; two processes compile."""
    asked = [item.callspec.params for item in request.session.items if item.originalname == COMPILING]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {
            case: pool.submit(aot.compile_case, case)
            for parameters in asked
            for case in _cases(parameters["name"], parameters["capability"])
        }
        pool.shutdown(cancel_futures=True)


def check_code(entry: aot.Launch, code: aot.MachineCode, capability: int) -> None:
    """No spills; tensor cores; no more shared memory than a launch gets; the decode loop stays in registers.

    Triton asks for more than 48 KiB when its own part exceeds that, not for the copies of the tables besides.
    decode_kernel: codes come in 8 bytes or more a lane (in SASS, the loads marked evict-first, .EF), half of that for
    nibbles and for signs of vectors of 4. In its loop and trellis_kernel's shared memory serves the lookups alone, one
    load for each codeword, and nothing is exchanged between lanes: Triton found no layout to convert.
    """
    kernel = entry.kernel.fn.__name__
    assert code.spilled == 0, f"{kernel} sm_{capability}: {code.spilled} bytes spilled, {code.registers} registers"
    total = code.shared_memory + code.tables
    assert total <= 48 << 10 or 48 << 10 < code.shared_memory and total <= LARGEST_SHARED[capability], total
    opcodes = "\n".join(code.instructions)
    if kernel in ("decode_kernel", "trellis_kernel", "grouped_kernel") and not entry.arguments.get("FLOAT32"):
        assert re.search(r"HGMMA|HMMA|UTC\w*MMA", opcodes), f"{kernel}: no tensor-core instruction"
    if kernel not in ("decode_kernel", "trellis_kernel"):
        return
    a = entry.arguments
    if capability == 90 and kernel == "decode_kernel":
        assert re.search(r"LDG\.E\.EF\.(64|128)$", opcodes, re.M), opcodes
        assert not re.search(r"LDG\.E\.EF\.(U16|U8)$", opcodes, re.M), opcodes
    split = a["WARPS"] // a["ROW_WARPS"]
    steps = a["K"] / (32 * split) if kernel == "trellis_kernel" else a["PLANE"] / (16 * split * a["LENGTH"])
    if steps > 1:  # else there is no loop to look at
        assert not [name for name in code.loop if re.match(r"STS|STSM|SHFL|LDSM", name)], code.loop
        loads = sum(count for name, count in code.loop.items() if name.startswith("LDS"))
        lookups = aot.weights_per_pass(entry) / 32 * a["STAGES"] / a["D"]
        assert loads == (lookups if a["COPIES"] else 0), code.loop


def check_launch(entry: aot.Launch, capability: int) -> None:
    check_code(entry, aot.inspect(aot.compile_launch(entry, capability)), capability)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)
        yield


def test_the_paths_launch_every_kernel():
    entries = [entry for path in ("pairs", "blocks", "grouped", "scratch") for entry in aot.launches(path, 64, DEFAULT)]
    entries += aot.launches("pairs", 1, aot.FORMATS["trellis 2 bits"])
    names = {entry.kernel.fn.__name__ for entry in entries}
    assert names == set(KERNELS) == {name for module in aot.KERNEL_MODULES for name in aot.kernels_of(module)}


@pytest.mark.parametrize("capability", aot.TARGETS)
@pytest.mark.parametrize("name", aot.FORMATS)
def test_every_format_compiles_for_every_target(compiled, name, capability):
    for case in _cases(name, capability):
        check_code(case.launch(), compiled[case].result(), capability)


COMPILING = test_every_format_compiles_for_every_target.__name__


@pytest.mark.parametrize("capability", aot.TARGETS)
def test_the_other_kernels_compile_for_every_target(capability):
    for entry in aot.launches("blocks", 64, DEFAULT, capability=capability):
        if "words_ptr" not in entry.arguments:
            check_launch(entry, capability)


@pytest.mark.parametrize("name", ["signed d8 int8 low-rank", "trellis 2 bits"])
def test_a_single_token_of_a_shared_expert_compiles(name):
    """No routing, and a number of pairs of one, which Triton makes a constant."""
    bank = [aot.meta_projection(1, *size, torch.bfloat16, **aot.FORMATS[name]) for size in ((1536, 2048), (2048, 768))]
    with aot.record() as recorded:
        launch.moe_forward(torch.empty(1, 2048, dtype=torch.bfloat16, device="meta"), None, None, *bank, "silu")
    assert recorded[-1].arguments["num_pairs"] == 1
    for entry in recorded:
        check_launch(entry, 90)


@pytest.mark.parametrize("dtype, tokens", [(torch.bfloat16, 64), (torch.bfloat16, 200), (torch.float32, 64)])
def test_every_tile_of_grouped_kernel_fits(dtype, tokens):
    entries = aot.launches("grouped", tokens, DEFAULT, dtype=dtype)
    check_launch([e for e in entries if "words_ptr" in e.arguments][0], 90)


@pytest.mark.parametrize("path", ["pairs", "grouped"])
def test_short_rows_compile(path):
    """Rows that need a mask, and rows of one step."""
    entries = aot.launches(path, 8, DEFAULT, **QWEN3)
    check_launch([entry for entry in entries if "words_ptr" in entry.arguments][1], 90)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_dtypes_compile(dtype):
    """float32 hidden states take grouped_kernel, whatever their number."""
    decodable = launch.decodes(aot.meta_projection(1, 32, 64, dtype, **DEFAULT), dtype)
    path = launch.select_path(1, 4, 16, dtype, (9, 0), 0, decodable)
    assert path == ("pairs" if dtype == torch.float16 else "grouped")
    entry = [e for e in aot.launches(path, 1, DEFAULT, dtype=dtype, **QWEN3) if "words_ptr" in e.arguments][1]
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
    with aot.record(modules=[baselines]) as recorded:
        baselines.gemv_moe(empty(2, 2048), index, weights, empty(16, 1536, 2048), empty(16, 2048, 768))
        baselines.int4_moe(empty(2, 2048), index, weights, *int4)
        baselines.lookup_kernel[(8,)](
            empty(512, dtype=torch.int64), empty(2048, dtype=torch.int64), ENTRIES=256, WORDS=2, REPEAT=4, BLOCK=256
        )
        for vector_dim in (4, 8):
            baselines.shared_lookup_kernel[(8,)](
                empty(512, dtype=torch.int64),
                empty(2048, dtype=torch.int64),
                D=vector_dim,
                COPIES=8,
                REPEAT=4,
                BLOCK=256,
            )
    assert len(recorded) == 7
    for entry in recorded:
        assert aot.inspect(aot.compile_launch(entry, 90)).spilled == 0, entry.kernel.fn.__name__
