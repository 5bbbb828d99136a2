"""The emulator itself: small kernels against numpy, and kernels with faults planted in them that it must find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.launches import Emulator, program_of

from kbvq_kernels import aot

HEADER = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b64 %rd2, [kernel_param_1];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 4;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
"""
SHARED_PLACE = "mov.b32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r7, %r5, %r6;"


def run(body: str, source: np.ndarray, warps: int = 2, grid=(1,), shared: int = 1024, out=None):
    """(what the body stored through %rd2 and %rd5, the emulator); %rd4: the thread's element of the source."""
    emulator = Emulator(80)
    given = torch.from_numpy(np.ascontiguousarray(source))
    out = torch.zeros(32 * warps, dtype=torch.int32) if out is None else out
    emulator.execute(HEADER + body + "\n}\n", grid, warps, shared, [given, out])
    return out.numpy(), emulator


def words(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32)


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("prmt.b32 %r3, %r2, 0x11223344, 0x5410U;", lambda x: (x & 0xFFFF) | 0x33440000),
        ("prmt.b32 %r3, %r2, 0, 0x8888;", lambda x: np.where(x & 0x80, -1, 0)),
        ("shf.r.wrap.b32 %r3, %r2, 5, 35;", lambda x: (x.view(np.uint32) >> 3) | np.uint32(5 << 29 & 0xFFFFFFFF)),
        ("bfe.s32 %r3, %r2, 4, 7;", lambda x: (x << 21) >> 25),
        ("bfe.u32 %r3, %r2, 28, 9;", lambda x: (x.view(np.uint32) >> 28).view(np.int32)),
        ("lop3.b32 %r3, %r2, 12345, 678, 0xe8;", lambda x: x & 12345 | x & 678 | 12345 & 678),
        ("shr.s32 %r3, %r2, 40;", lambda x: x >> 31),
        ("shl.b32 %r3, %r2, 32;", lambda x: 0 * x),
        ("mad.lo.s32 %r3, %r2, -7, 9;", lambda x: x * -7 + 9),
        ("mul.hi.u32 %r3, %r2, 0x8DB4863B;", lambda x: x.view(np.uint32).astype(np.uint64) * 0x8DB4863B >> 32),
        ("popc.b32 %r3, %r2;", lambda x: np.array([bin(v).count("1") for v in x.view(np.uint32)])),
        ("setp.lt.u32 %p1, %r2, 0x80000000; selp.b32 %r3, 7, %r2, %p1;", lambda x: np.where(x >= 0, 7, x)),
        ("cvt.u16.u32 %rs1, %r2; cvt.s8.s32 %r3, %r2;", lambda x: x.astype(np.int8)),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda x: x << 16 | x >> 16 & 0xFFFF),
        ("shfl.sync.bfly.b32 %r3, %r2, 3, 31, -1;", lambda x: x.reshape(-1, 32)[:, np.arange(32) ^ 3].reshape(-1)),
        ("shfl.sync.up.b32 %r3, %r2, 2, 0, -1;", lambda x: x.reshape(-1, 32)[:, np.r_[0, 1, 0:30]].reshape(-1)),
        ("shfl.sync.down.b32 %r3, %r2, 2, 31, -1;", lambda x: x.reshape(-1, 32)[:, np.r_[2:32, 30, 31]].reshape(-1)),
        ("redux.sync.add.s32 %r3, %r2, -1;", lambda x: np.repeat(x.reshape(-1, 32).sum(1, dtype=np.int32), 32)),
        (
            "setp.lt.s32 %p1, %r2, 0; vote.sync.ballot.b32 %r3, %p1, -1;",
            lambda x: np.repeat((x < 0).reshape(-1, 32) @ (1 << np.arange(32)), 32),
        ),
    ],
)  # fmt: skip
def test_integer_instructions(instruction, expected):
    x = words(64)
    body = "ld.global.b32 %r2, [%rd4];" + instruction + "st.global.b32 [%rd5], %r3; ret;"
    got, emulator = run(body, x)
    emulator.check()
    with np.errstate(over="ignore"):
        want = np.asarray(expected(x.copy())).astype(np.int64).astype(np.uint32)
    assert (got.view(np.uint32) == want).all()


@pytest.mark.parametrize(
    "instruction, expected, tolerance",
    [
        ("fma.rn.f32 %r3, %r2, %r2, 0f3F800000;", lambda x: x * x + 1, 1e-7),
        ("div.full.f32 %r3, 0f3F800000, %r2;", lambda x: 1 / x, 1e-7),
        ("ex2.approx.f32 %r3, %r2;", np.exp2, 1e-7),
        ("cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1;", lambda x: x, 2**-8),
        ("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;", lambda x: x, 2**-11),
        ("cvt.rn.bf16x2.f32 %r4, %r2, 0f00000000; and.b32 %r3, %r4, 0xFFFF0000;", lambda x: x, 2**-8),
        ("cvt.rna.tf32.f32 %r3, %r2;", lambda x: x, 2**-11),
        ("cvt.rni.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r3, %r4;", np.rint, 0),
        ("max.f32 %r3, %r2, 0f00000000;", lambda x: np.maximum(x, 0), 0),
    ],
)
def test_float_instructions(instruction, expected, tolerance):
    x = np.random.default_rng(1).normal(size=64).astype(np.float32) * 3
    got, emulator = run("ld.global.b32 %r2, [%rd4];" + instruction + "st.global.b32 [%rd5], %r3; ret;", x)
    emulator.check()
    want = expected(x.astype(np.float64))
    assert (np.abs(got.view(np.float32) - want) <= tolerance * np.abs(want)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_through_shared_memory(transposed):
    """ldmatrix hands lane l row l / 4, columns 2 (l % 4) and the next of an 8x8 tile, or of its transpose."""
    x = np.arange(64, dtype=np.int16).reshape(8, 8)
    kind = ".trans" if transposed else ""
    body = SHARED_PLACE + (
        "ld.global.b32 %r2, [%rd4]; st.shared.b32 [%r7], %r2; bar.sync 0; and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 4;"
        f"add.s32 %r9, %r5, %r8; ldmatrix.sync.aligned.m8n8.x1{kind}.shared.b16 {{%r3}}, [%r9];"
        "st.global.b32 [%rd5], %r3; ret;"
    )
    got, emulator = run(body, x, warps=1)
    emulator.check()
    assert (got.view(np.int16).reshape(8, 8) == (x.T if transposed else x)).all()


def test_threads_that_branch_apart_meet_again():
    body = """
	setp.lt.u32 %p1, %r1, 40;
	mov.b32 %r2, 0;
	@!%p1 bra $L_else;
	mov.b32 %r3, 1;
$L_loop:
	add.s32 %r2, %r2, %r3;
	setp.le.u32 %p2, %r2, %r1;
	@%p2 bra $L_loop;
	bra.uni $L_end;
$L_else:
	mov.b32 %r2, 1000;
$L_end:
	bar.sync 0;
	shfl.sync.idx.b32 %r4, %r2, 0, 31, -1;
	add.s32 %r2, %r2, %r4;
	st.global.b32 [%rd5], %r2;
	ret;"""
    got, emulator = run(body, words(64))
    emulator.check()
    each = np.where(np.arange(64) < 40, np.arange(64) + 1, 1000)
    assert (got == each + np.repeat(each[::32], 32)).all()


@triton.jit
def _sum_kernel(x_ptr, w_ptr, y_ptr, n, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [n, 16] = w [n, K] @ x [K, 16]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, 16], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + row[:, None] * K + k[None, :], mask=(row < n)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + k[:, None] * 16 + tl.arange(0, 16)[None, :], mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="tf32")
    tl.store(y_ptr + row[:, None] * 16 + tl.arange(0, 16)[None, :], acc, mask=(row < n)[:, None])


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float32, 1e-3)])
def test_a_product_that_triton_compiled(capability, dtype, tolerance, stages):
    """mma.sync and wgmma, with operands through swizzled shared memory, copied ahead by several stages; float32 in
    TF32."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=g).to(dtype) for size in ((72, 16), (70, 72)))
    y = torch.full((70, 16), float("nan"))
    entry = aot.Launch(
        _sum_kernel, (2,),
        {"x_ptr": x, "w_ptr": w, "y_ptr": y, "n": 70, "K": 72, "BLOCK_N": 64, "BLOCK_K": 32},
        {"num_warps": 4, "num_stages": stages},
    )  # fmt: skip
    emulator = Emulator(capability)
    emulator.run(entry)
    emulator.check()
    expected = w.double() @ x.double()
    assert (y - expected).norm() <= tolerance * expected.norm()


FAULTS = {
    "off by one behind": ("ld.global.b32 %r2, [%rd4+4]; st.global.b32 [%rd5], %r2; ret;", {"out of bounds"}),
    "off by one before": ("ld.global.b32 %r2, [%rd4]; st.global.b32 [%rd5+-4], %r2; ret;", {"out of bounds"}),
    "misaligned vector": ("ld.global.v2.b32 {%r2, %r3}, [%rd4]; ret;", {"misaligned", "out of bounds"}),
    "wrong mask": (
        "setp.le.u32 %p1, %r1, 64; @%p1 st.global.b32 [%rd5], %r1; add.s64 %rd6, %rd5, 256;"
        "setp.ge.u32 %p2, %r1, 63; @%p2 st.global.b32 [%rd6], %r1; ret;",
        {"out of bounds"},
    ),
    "missing barrier": (
        SHARED_PLACE + "st.shared.b32 [%r7], %r1; xor.b32 %r8, %r6, 252; add.s32 %r9, %r5, %r8;"
        "ld.shared.b32 %r2, [%r9]; st.global.b32 [%rd5], %r2; ret;",
        {"race"},
    ),
    "missing barrier before reuse": (
        SHARED_PLACE + "st.shared.b32 [%r7], %r1; bar.sync 0; xor.b32 %r8, %r6, 252; add.s32 %r9, %r5, %r8;"
        "ld.shared.b32 %r2, [%r9]; st.shared.b32 [%r7], %r2; ret;",
        {"race"},
    ),
    "missing barrier between writes": (
        SHARED_PLACE + "and.b32 %r8, %r6, 124; add.s32 %r9, %r5, %r8; st.shared.b32 [%r9], %r1; ret;",
        {"race"},
    ),
    "behind the shared memory": (SHARED_PLACE + "st.shared.b32 [%r7+772], %r1; ret;", {"out of bounds"}),
    "shared memory that nobody wrote": (SHARED_PLACE + "ld.shared.b32 %r2, [%r7]; ret;", {"uninitialised memory"}),
    "register that nobody set": (
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra $L_1; mov.b32 %r2, 1;\n$L_1:\nst.global.b32 [%rd5], %r2; ret;",
        {"uninitialised register"},
    ),
    "barrier that some miss": (
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra $L_1; bar.sync 0;\n$L_1:\nmov.b32 %r2, 1; st.global.b32 [%rd5], %r2; ret;",
        {"divergence"},
    ),
    "shuffle without half a warp": (
        "setp.lt.u32 %p1, %r1, 40; @%p1 bra $L_1; shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;\n$L_1:\nret;",
        {"divergence"},
    ),
    "two threads store in one place": ("st.global.b32 [%rd2], %r1; ret;", {"race"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    body, kinds = FAULTS[name]
    _, emulator = run(body, words(64))
    assert emulator.faults.kinds() == kinds


def test_the_same_with_barriers_is_no_fault():
    body = SHARED_PLACE + (
        "st.shared.b32 [%r7], %r1; bar.sync 0; xor.b32 %r8, %r6, 252; add.s32 %r9, %r5, %r8;"
        "ld.shared.b32 %r2, [%r9]; bar.sync 0; st.shared.b32 [%r7], %r2; st.global.b32 [%rd5], %r2; ret;"
    )
    got, emulator = run(body, words(64))
    emulator.check()
    assert (got == 63 - np.arange(64)).all()


def test_programs_that_use_each_others_results_are_a_race():
    body = (
        "mov.u32 %r2, %ctaid.x; mul.wide.u32 %rd6, %r2, 256; add.s64 %rd7, %rd5, %rd6; st.global.b32 [%rd7], %r2;"
        "ld.global.b32 %r3, [%rd5]; ret;"
    )
    _, emulator = run(body, words(64), grid=(3,), out=torch.zeros(192, dtype=torch.int32))
    assert emulator.faults.kinds() == {"race"}


def test_what_no_kernel_has_written_is_a_fault():
    emulator = Emulator(80)
    with emulator.installed():
        given, out = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        body = "setp.ne.u32 %p1, %r1, 9; @%p1 st.global.b32 [%rd5], %r1; ret;\n}\n"
        emulator.execute(HEADER + body, (1,), 2, 0, [given, out])
        assert emulator.unwritten(out) == 4 and not emulator.faults.kinds()
        emulator.execute(HEADER + "ld.global.b32 %r2, [%rd5]; ret;\n}\n", (1,), 2, 0, [given, out])
    (fault,) = emulator.faults.lines()
    assert fault.startswith("uninitialised memory") and "argument 1 + 36" in fault


def test_shared_memory_counts_bank_conflicts():
    for stride, cycles in ((1, 1), (2, 2), (32, 32)):
        emulator = Emulator(80, counting=True)
        body = (
            f"mul.lo.s32 %r6, %r1, {4 * stride}; mov.b32 %r5, global_smem; add.s32 %r7, %r5, %r6;"
            "st.shared.b32 [%r7], %r1; ret;\n}\n"
        )
        out = torch.zeros(32, dtype=torch.int32)
        counts = emulator.execute(HEADER + body, (1,), 1, 4096, [out, out])
        assert list(counts.cycles.values()) == [cycles]


@pytest.mark.parametrize(
    "address, load, cycles",
    [
        ("shl.b32 %r6, %r1, 2", "ld.global.b32 %r2", 1),  # 128 bytes of one line
        ("and.b32 %r6, %r1, 0", "ld.global.b32 %r2", 1),  # one word for all
        ("shl.b32 %r6, %r1, 4", "ld.global.v4.b32 {%r2, %r3, %r4, %r8}", 4),  # 512 bytes of 4 lines
        ("shl.b32 %r6, %r1, 7", "ld.global.b32 %r2", 8),  # 32 lines
        ("shl.b32 %r6, %r1, 6", "@%p1 ld.global.b32 %r2", 2.5),  # 10 lines
    ],
)
def test_global_memory_counts_lines(address, load, cycles):
    emulator = Emulator(80, counting=True)
    body = f"{address}; setp.lt.u32 %p1, %r1, 20; cvt.u64.u32 %rd6, %r6; add.s64 %rd7, %rd1, %rd6; {load}, [%rd7]; ret;"
    counts = emulator.execute(HEADER + body + "\n}\n", (1,), 1, 0, [torch.zeros(1024, dtype=torch.int32)] * 2)
    emulator.check()
    assert list(counts.cycles.values()) == [cycles]


def test_instructions_are_counted_by_warps_in_loops_and_outside():
    """Two warps; of the second, eight threads take the loop, twice. Warps that come by an instruction count, whether
    their guard is true or not."""
    body = """
	setp.lt.u32 %p1, %r1, 40;
	mov.b32 %r2, 0;
	shr.u32 %r3, %r1, 5;
$L_outer:
	@!%p1 bra $L_end;
$L_loop:
	ld.global.b32 %r4, [%rd4];
	add.s32 %r2, %r2, 1;
	setp.le.u32 %p2, %r2, %r3;
	@%p2 bra $L_loop;
	setp.eq.u32 %p3, %r2, 99;
	@%p3 bra $L_outer;
$L_end:
	mov.b32 %r5, global_smem;
	@!%p1 st.shared.b32 [%r5], %r3;
	st.global.b32 [%rd5], %r2;
	ret;
}
"""
    emulator = Emulator(80, counting=True)
    tensors = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    ptx = HEADER + body
    counts = emulator.execute(ptx, (1,), 2, 1024, tensors)
    emulator.check()
    program = program_of(ptx)
    (loop,) = program.loops()
    assert [program.instructions[place].parts[0] for place in loop] == ["ld", "add", "setp", "bra"]
    # The header is 6 instructions; before, between and behind the loops are 4, 2 and 4.
    inside, outside = 4 * 1 + 4 * 2, 2 * (6 + 4 + 2 + 4)
    assert counts.instructions(program, loop) == inside
    assert counts.instructions(program) == inside + outside
    assert counts.instructions(program, loop, "global") == 1 + 2
    assert counts.instructions(program, None, "global") == 1 + 2 + 2
    assert counts.instructions(program, None, "shared") == 2
