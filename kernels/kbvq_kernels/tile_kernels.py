"""Many tokens: tiles of weights decoded once and multiplied, or stored. Names as in codewords.py."""

from __future__ import annotations

import triton
import triton.language as tl

from kbvq_kernels.codewords import codeword_words, expert_tables, halves, signed_pair, spread_signs, trellis_level
from kbvq_kernels.epilogue import row_factors, store_rows, tile_rows
from kbvq_kernels.ptx import share_tables


@triton.jit
def _words(
    words_ptr,
    groups_ptr,
    shared,
    code0,
    code1,
    code2,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The words of the codewords of each stage."""
    a0, b0 = codeword_words(words_ptr, groups_ptr, shared, code0, code0, 0, D, C, GROUPS, COPIES)
    a1, b1, a2, b2 = a0, b0, a0, b0
    if STAGES > 1:
        a1, b1 = codeword_words(words_ptr, groups_ptr, shared, code0, code1, 1, D, C, GROUPS, COPIES)
    if STAGES > 2:
        a2, b2 = codeword_words(words_ptr, groups_ptr, shared, code0, code2, 2, D, C, GROUPS, COPIES)
    return a0, b0, a1, b1, a2, b2


@triton.jit
def _summed_pair(
    a0,
    b0,
    a1,
    b1,
    a2,
    b2,
    signs,
    i: tl.constexpr,
    STAGES: tl.constexpr,
    SIGNED: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Weights 2 i and 2 i + 1 of the sums of the stages' codewords; a0 .. b2: from `_words`."""
    low, high = halves(signed_pair(a0, b0, signs, i, SIGNED), BF16, FLOAT32)
    if STAGES > 1:
        more_low, more_high = halves(signed_pair(a1, b1, signs, i, False), BF16, FLOAT32)
        low, high = low + more_low, high + more_high
    if STAGES > 2:
        more_low, more_high = halves(signed_pair(a2, b2, signs, i, False), BF16, FLOAT32)
        low, high = low + more_low, high + more_high
    return low, high


@triton.jit
def _nibbles(codes_ptr, row, mask, offset, v0, PLANE: tl.constexpr, R: tl.constexpr, BLOCK_V: tl.constexpr):
    """A nibble for each of BLOCK_V vectors from a plane of PLANE / 2 bytes at `offset` of each row, int32."""
    b = v0 // 2 + tl.arange(0, BLOCK_V // 2)
    b_mask = mask[:, None] & (b < PLANE // 2)[None, :]
    byte = tl.load(
        codes_ptr + row[:, None] + (offset + b)[None, :], mask=b_mask, other=0, eviction_policy="evict_first"
    ).to(tl.int32)
    return tl.reshape((byte[:, :, None] >> (4 * tl.arange(0, 2))[None, None, :]) & 15, [R, BLOCK_V])


@triton.jit
def _codes(
    codes_ptr,
    row,
    mask,
    stage: tl.constexpr,
    v0,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Codes of one stage, int32 [R, BLOCK_V]."""
    START: tl.constexpr = stage * (PLANE + PLANE // 2 if WIDE else PLANE)
    v = v0 + tl.arange(0, BLOCK_V)
    v_mask = mask[:, None] & (v < PLANE)[None, :]
    code = tl.load(
        codes_ptr + row[:, None] + (START + v)[None, :], mask=v_mask, other=0, eviction_policy="evict_first"
    ).to(tl.int32)
    if WIDE:
        code = code | (_nibbles(codes_ptr, row, mask, START + PLANE, v0, PLANE, R, BLOCK_V) << 8)
    return code


@triton.jit
def _trellis_tile(
    codes_ptr,
    levels_ptr,
    n,
    mask,
    k0,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT32: tl.constexpr,
    R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Values of a trellis code, [R, BLOCK_K], of R rows, each ROWS of them adjacent, and BLOCK_K columns.

    ROWS rows share the four bytes that hold all their windows: 7 + (ROWS - 1) * BITS + 12 <= 32 bits.
    """
    BYTES: tl.constexpr = N * BITS // 8
    ROWS: tl.constexpr = 8 if BITS <= 2 else 4
    k = k0 + tl.arange(0, BLOCK_K)
    first = tl.min(tl.reshape(n, [R // ROWS, ROWS]), 1)
    bit = first * BITS
    byte = (bit // 8).to(tl.int32)
    some = tl.max(tl.reshape(mask.to(tl.int32), [R // ROWS, ROWS]), 1) > 0
    load_mask = some[:, None] & (k < K)[None, :]
    window = tl.zeros([R // ROWS, BLOCK_K], tl.int32)
    for i in tl.static_range(4):
        if BYTES < 8:
            place = (byte + i) % BYTES
        else:
            place = byte + i - tl.where(byte + i >= BYTES, BYTES, 0)
        part = tl.load(codes_ptr + k.to(tl.int64)[None, :] * BYTES + place[:, None], mask=load_mask, other=0)
        window = window | (part.to(tl.int32) << (8 * i))
    shift = (bit % 8).to(tl.int32)[:, None] + (tl.arange(0, ROWS) * BITS)[None, :]
    level = trellis_level(window[:, None, :] >> shift[:, :, None], BITS)
    value = tl.load(levels_ptr + 2 * level, eviction_policy="evict_last")
    if FLOAT32:
        value = value.to(tl.float32)
    return tl.reshape(value, [R, BLOCK_K])


@triton.jit
def _decode_tile(
    codes_ptr,
    words_ptr,
    groups_ptr,
    e,
    n,
    row_mask,
    shared,
    v0,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
    COPIES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weights without scale of R rows and BLOCK_V vectors from v0 on, [R, BLOCK_V * D], float32 or 16-bit."""
    if BITS > 0:
        tile = _trellis_tile(
            codes_ptr + e * (K * ROW_BYTES), words_ptr, n, row_mask, v0, N, K, BITS, FLOAT32, R, BLOCK_V
        )
    else:
        row = (e * N + n) * ROW_BYTES
        code0 = _codes(codes_ptr, row, row_mask, 0, v0, PLANE, WIDE, R, BLOCK_V)
        code1, code2, signs = code0, code0, code0
        if STAGES > 1:
            code1 = _codes(codes_ptr, row, row_mask, 1, v0, PLANE, WIDE, R, BLOCK_V)
        if STAGES > 2:
            code2 = _codes(codes_ptr, row, row_mask, 2, v0, PLANE, WIDE, R, BLOCK_V)
        if SIGNED and D == 8:
            signs = spread_signs(_codes(codes_ptr, row, row_mask, 1, v0, PLANE, False, R, BLOCK_V))
        if SIGNED and D == 4:
            signs = spread_signs(_nibbles(codes_ptr, row, row_mask, PLANE, v0, PLANE, R, BLOCK_V))
        a0, b0, a1, b1, a2, b2 = _words(
            words_ptr, groups_ptr, shared, code0, code1, code2, D, C, STAGES, GROUPS, COPIES
        )
        low0, high0 = _summed_pair(a0, b0, a1, b1, a2, b2, signs, 0, STAGES, SIGNED, BF16, FLOAT32)
        if D >= 4:
            low1, high1 = _summed_pair(a0, b0, a1, b1, a2, b2, signs, 1, STAGES, SIGNED, BF16, FLOAT32)
            if D == 8:
                low2, high2 = _summed_pair(a0, b0, a1, b1, a2, b2, signs, 2, STAGES, SIGNED, BF16, FLOAT32)
                low3, high3 = _summed_pair(a0, b0, a1, b1, a2, b2, signs, 3, STAGES, SIGNED, BF16, FLOAT32)
                low0, high0 = tl.join(low0, low2), tl.join(high0, high2)
                low1, high1 = tl.join(low1, low3), tl.join(high1, high3)
            low0, high0 = tl.join(low0, low1), tl.join(high0, high1)
        tile = tl.reshape(tl.join(low0, high0), [R, BLOCK_V * D])
    return tile


@triton.jit
def dequantize_kernel(
    codes_ptr,
    words_ptr,
    groups_ptr,
    scale_ptr,
    basis_ptr,
    coefficients_ptr,
    factor_scale_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Stored weights [E, N, K]; grid (N / BLOCK_N, K / D / BLOCK_V, E)."""
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v0 = tl.program_id(1) * BLOCK_V
    k = v0 * D + tl.arange(0, BLOCK_V * D)
    row = e * N + n
    row_mask = n < N
    words_ptr, groups_ptr = expert_tables(words_ptr, groups_ptr, e, D, C, TABLES, PER_EXPERT)
    tile = _decode_tile(
        codes_ptr, words_ptr, groups_ptr, e, n, row_mask, 0, v0, N, K, D, C, STAGES, GROUPS, PLANE, WIDE, SIGNED, BITS,
        ROW_BYTES, BF16, True, 0, BLOCK_N, BLOCK_V,
    )  # fmt: skip
    # The row scale goes into both terms before they meet: one live register less than scaling their sum.
    if SCALE:
        scale = tl.load(scale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        tile = tile * scale
    if RANK > 0:
        q = tl.arange(0, BLOCK_R)
        factor = row_factors(coefficients_ptr, factor_scale_ptr, e, row, row_mask, q, RANK, FACTOR_SCALE)
        if SCALE:
            factor = factor * scale
        basis_mask = (q < RANK)[:, None] & (k < K)[None, :]
        basis = tl.load(basis_ptr + q[:, None] * K + k[None, :], mask=basis_mask, other=0).to(tl.float32)
        tile = tl.dot(factor, basis, tile, input_precision="tf32")
    offset = row[:, None] * K + k[None, :]
    tl.store(out_ptr + offset, tile.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (k < K)[None, :])


@triton.jit
def grouped_kernel(
    x_ptr,
    low_ptr,
    sorted_ptr,
    block_experts_ptr,
    codes_ptr,
    words_ptr,
    groups_ptr,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    factor_scale_ptr,
    out_ptr,
    num_pairs,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLACKWELL: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One projection for blocks of pairs of one expert; grid (N / BLOCK_N, blocks). Weights are the M operand.

    GATED: x [T, K] is read at the pair's token and act(gate) * up [P, N / 2] is written; else x [P, K] is read at
    the pair and [P, N] is written. FLOAT32 multiplies in float32 instead of x's dtype on tensor cores.
    """
    m = tl.program_id(1)
    e = tl.load(block_experts_ptr + m).to(tl.int64)
    if e < 0:
        return
    pair = tl.load(sorted_ptr + m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    pair_mask = pair < num_pairs
    x_row = pair
    if GATED:
        x_row = pair // TOP_K
    n, row_mask = tile_rows(tl.program_id(0), tl.arange(0, BLOCK_N), N, GATED, BLOCK_N)
    words_ptr, groups_ptr = expert_tables(words_ptr, groups_ptr, e, D, C, TABLES, PER_EXPERT)
    shared = share_tables(words_ptr, TABLES, D, C, COPIES)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # One stage: deeper pipelines move the codeword reads into copies that bypass L1.
    for v0 in tl.range(0, tl.cdiv(K, D), BLOCK_V, num_stages=1):
        tile = _decode_tile(
            codes_ptr, words_ptr, groups_ptr, e, n, row_mask, shared, v0, N, K, D, C, STAGES, GROUPS, PLANE, WIDE,
            SIGNED, BITS, ROW_BYTES, BF16, FLOAT32, COPIES, BLOCK_N, BLOCK_V,
        )  # fmt: skip
        k = v0 * D + tl.arange(0, BLOCK_V * D)
        x_mask = (k < K)[:, None] & pair_mask[None, :]
        x = tl.load(x_ptr + x_row[None, :] * K + k[:, None], mask=x_mask, other=0.0)
        if BLACKWELL:
            # Triton 3.6 would store the codewords before reshaping them, in a layout that needs 16 bytes in a row,
            # and fail. A select in between keeps the reshape in registers.
            tile = tl.where(row_mask[:, None], tile, 0.0)
        if FLOAT32:
            acc = tl.dot(tile, x.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(tile.to(x.dtype), x, acc)
    store_rows(
        acc,
        e,
        pair,
        pair_mask,
        x_row,
        low_ptr,
        scale_ptr,
        bias_ptr,
        coefficients_ptr,
        factor_scale_ptr,
        out_ptr,
        N,
        SCALE,
        BIAS,
        RANK,
        FACTOR_SCALE,
        GATED,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
