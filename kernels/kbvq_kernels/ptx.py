"""What Triton has no words for, as PTX: loads, a product and lookups in shared memory, by thread.

Triton lays a tensor of 32 elements for each warp of the program out with element i in thread i. Such tensors are the
registers of ordinary SIMT code, and `mma` may take them as the fragments that PTX names, whatever a version of Triton
thinks of layouts.

Lookups: Triton has none in shared memory that keeps its table. `share_tables` writes COPIES copies of the tables side
by side, so that each lane of a load has banks of its own and no two lanes wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOAD = (
    "{{ .reg .pred p; setp.ne.s32 p, ${predicate}, 0; {zeros} @p ld.global{cached}.{type} {registers}, [${address}]; }}"
)


def _load(words: int, cached: str, zeros: bool) -> tl.constexpr:
    outputs = [f"${i}" for i in range(words)]
    return tl.constexpr(
        _LOAD.format(
            zeros=" ".join(f"mov.u32 {register}, 0;" for register in outputs if zeros),
            cached=cached,
            type="u32" if words == 1 else f"v{words}.u32",
            registers=outputs[0] if words == 1 else "{" + ", ".join(outputs) + "}",
            address=words,
            predicate=words + 1,
        )
    )


# Weights are read once, hidden states by every row of a program.
_LOAD_1, _LOAD_2, _LOAD_4 = (_load(words, "", True) for words in (1, 2, 4))
_STREAM_1, _STREAM_2, _STREAM_4 = (_load(words, ".L1::evict_first", True) for words in (1, 2, 4))
_LOOSE_1, _LOOSE_2, _LOOSE_4 = (_load(words, ".L1::evict_first", False) for words in (1, 2, 4))

_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
_MMA_BF16, _MMA_F16 = (tl.constexpr(_MMA.format(t)) for t in ("bf16", "f16"))

# Before compute capability 9 there is no sum of bfloat16, but a multiply-add.
_ADD_BF16 = tl.constexpr("fma.rn.bf16x2 $0, $1, $3, $2;")
_ADD_F16 = tl.constexpr("fma.rn.f16x2 $0, $1, $3, $2;")
_ONES_BF16, _ONES_F16 = tl.constexpr(0x3F803F80), tl.constexpr(0x3C003C00)

_FUNNEL = tl.constexpr("shf.r.wrap.b32 $0, $1, $2, $3;")

_ALLOCATE = "{{ .reg .u64 a; .shared .align 16 .b8 tables[{}]; mov.u64 a, tables; cvt.u32.u64 $0, a; }}"
_ALLOCATE_8K = tl.constexpr(_ALLOCATE.format(8192))
_ALLOCATE_32K = tl.constexpr(_ALLOCATE.format(32768))
_KEEP = tl.constexpr("mov.u32 $0, $1;")

# Codewords of 8, 4 and 2 values are 16, 8 and 4 bytes.
_STORE_8 = tl.constexpr("st.shared.v2.u64 [$1], {$2, $3}; mov.u32 $0, 0;")
_STORE_4 = tl.constexpr("st.shared.u64 [$1], $2; mov.u32 $0, 0;")
_STORE_2 = tl.constexpr("st.shared.u32 [$1], $2; mov.u32 $0, 0;")

# table + (lane mod copies) * bytes of an entry + code * bytes of all its copies
_LOOKUP = (
    "{{ .reg .u32 a; mov.u32 a, %laneid; and.b32 a, a, ${copies}; mad.lo.u32 a, a, ${entry}, ${table}; "
    "mad.lo.u32 a, ${code}, ${stride}, a; {load}, [a]; }}"
)
_LOOKUP_8 = tl.constexpr(_LOOKUP.format(table=2, code=3, stride=4, copies=5, entry=6, load="ld.shared.v2.u64 {$0, $1}"))
_LOOKUP_4 = tl.constexpr(_LOOKUP.format(table=1, code=2, stride=3, copies=4, entry=5, load="ld.shared.u64 $0"))
_LOOKUP_2 = tl.constexpr(_LOOKUP.format(table=1, code=2, stride=3, copies=4, entry=5, load="ld.shared.u32 $0"))


@triton.jit
def load_words(address, predicate, N: tl.constexpr, KIND: tl.constexpr):
    """N (1, 2, 4) int32 from each int64 address, a multiple of 4 N, in one load; zeros where predicate is false.

    KIND: "kept" in the L1 cache, "streamed" through it, or "loose": streamed, and anything where predicate is false.
    """
    arguments = [address, predicate.to(tl.int32)]
    if N == 1:
        asm: tl.constexpr = _LOAD_1 if KIND == "kept" else _STREAM_1 if KIND == "streamed" else _LOOSE_1
        words = (tl.inline_asm_elementwise(asm, "=&r,l,r", arguments, dtype=tl.int32, is_pure=True, pack=1),)
    elif N == 2:
        asm: tl.constexpr = _LOAD_2 if KIND == "kept" else _STREAM_2 if KIND == "streamed" else _LOOSE_2
        words = tl.inline_asm_elementwise(
            asm, "=&r,=&r,l,r", arguments, dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        asm: tl.constexpr = _LOAD_4 if KIND == "kept" else _STREAM_4 if KIND == "streamed" else _LOOSE_4
        words = tl.inline_asm_elementwise(
            asm,
            "=&r,=&r,=&r,=&r,l,r",
            arguments,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return words


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr):
    """c + a @ b of a 16x16 and a 16x8 tile for each warp: PTX's mma.m16n8k16, float32 sums of pairs of 16-bit floats.

    With g = lane / 4 and t = lane % 4 a lane holds of a, as int32 pairs, row g (a0, a2) and row g + 8 (a1, a3), of b
    column g (b0, b1), each at columns (rows) 2 t, 2 t + 1 (first) and those + 8; of c rows g (c0, c1) and g + 8
    (c2, c3) at columns 2 t and 2 t + 1.
    """
    asm: tl.constexpr = _MMA_BF16 if BF16 else _MMA_F16
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def add_pairs(a, b, BF16: tl.constexpr):
    """Sums of the two 16-bit floats of int32."""
    asm: tl.constexpr = _ADD_BF16 if BF16 else _ADD_F16
    ones: tl.constexpr = _ONES_BF16 if BF16 else _ONES_F16
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, ones], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def funnel(low, high, shift):
    """Low 32 bits of the 64 of high and low, shifted right by `shift` < 32."""
    return tl.inline_asm_elementwise(_FUNNEL, "=r,r,r,r", [low, high, shift], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def share_tables(words_ptr, TABLES: tl.constexpr, D: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr):
    """Address of COPIES copies of the tables in shared memory, entry by entry; 0 without any. Words as in _lookup."""
    address = tl.program_id(0) * 0
    if COPIES > 0:
        asm: tl.constexpr = _ALLOCATE_8K if TABLES * C * COPIES * 2 * D <= 8192 else _ALLOCATE_32K
        address = tl.inline_asm_elementwise(asm, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)
        # COPIES neighbours read one entry and write it to neighbouring places: no two lanes meet in a bank.
        i = tl.arange(0, C * COPIES)
        for table in tl.static_range(TABLES):
            source = words_ptr + table * (2 if D == 8 else 1) * C + i // COPIES
            place = address + (table * C * COPIES + i) * (2 * D)
            word = tl.load(source)
            if D == 8:
                arguments = [place, word, tl.load(source + C)]
                tl.inline_asm_elementwise(_STORE_8, "=r,r,l,l", arguments, dtype=tl.int32, is_pure=False, pack=1)
            elif D == 4:
                tl.inline_asm_elementwise(_STORE_4, "=r,r,l", [place, word], dtype=tl.int32, is_pure=False, pack=1)
            else:
                tl.inline_asm_elementwise(_STORE_2, "=r,r,r", [place, word], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        # Lookups are pure, so that Triton may choose their layouts: what keeps them after the barrier is this address.
        address = tl.inline_asm_elementwise(_KEEP, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)
    return address


@triton.jit
def shared_words(table, code, D: tl.constexpr, COPIES: tl.constexpr):
    """The two int64 words of codewords of 8, the one of 4 or the one int32 of 2, twice; table: address of the first."""
    arguments = [table, code, 2 * D * COPIES, COPIES - 1, 2 * D]
    if D == 8:
        word0, word1 = tl.inline_asm_elementwise(
            _LOOKUP_8, "=l,=l,r,r,r,r,r", arguments, dtype=(tl.int64, tl.int64), is_pure=True, pack=1
        )
    elif D == 4:
        word0 = tl.inline_asm_elementwise(_LOOKUP_4, "=l,r,r,r,r,r", arguments, dtype=tl.int64, is_pure=True, pack=1)
        word1 = word0
    else:
        word0 = tl.inline_asm_elementwise(_LOOKUP_2, "=r,r,r,r,r,r", arguments, dtype=tl.int32, is_pure=True, pack=1)
        word1 = word0
    return word0, word1
