"""The Triton kernels. README.md derives them; `launch.py` chooses block sizes and calls them.

Shapes are constexpr: a model has a handful of them, and constant trip counts and strides spare instructions.

Names: N rows (out_features), K columns (in_features), E experts, P = T * k token-expert pairs.
A row of codes has STAGES planes of PLANE low bytes, each followed, when WIDE, by PLANE / 2 bytes of nibbles, and last,
when SIGNED, a bit per weight. A *word* is an int64 of a codeword's values (an int32 or int16 when the codeword is
smaller); a codeword is WORDS of them. Tables of words are [.., TABLES, WORDS, C]: equal words of all codewords lie
together, so that a load of one word meets every memory bank.

A *pair* is two adjacent weights of a codeword as 16-bit floats. Codewords in int8 become pairs by bit operations on
both at once: `prepared.table_words` orders their bytes so that a mask isolates a pair; or-ing them into the mantissa
of MAGIC and subtracting MAGIC is exact. MASK and MAGIC are arguments, not constants, because ptxas would move a
constant to a register before each use.

Where FLOAT32 is set values are widened before any arithmetic: the Triton interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIGNS = tl.constexpr(-2147450880)  # 0x80008000: the sign bits of a pair


@triton.jit
def _halves(pair, BF16: tl.constexpr, FLOAT32: tl.constexpr):
    """The two 16-bit floats of an int32."""
    HALF: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low = pair.to(tl.int16).to(HALF, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    if FLOAT32:
        low, high = low.to(tl.float32), high.to(tl.float32)
    return low, high


@triton.jit
def _pair(
    word,
    signs,
    i: tl.constexpr,
    mask,
    magic,
    D: tl.constexpr,
    INT8: tl.constexpr,
    SIGNED: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Weights 2 i and 2 i + 1 of codewords; word: the word that holds them; signs: spread by `_spread`."""
    if INT8:
        if i >= 2:
            pair = (word >> 32).to(tl.int32)
        else:
            pair = word.to(tl.int32)
        if i % 2 == 1:
            pair = pair >> 8
        if SIGNED:
            sign = (signs << (15 - 2 * i)) & _SIGNS
        else:
            sign = (pair << 8) & _SIGNS
        base = sign | magic
        low, high = _halves((pair & mask) | base, BF16, FLOAT32)
        low0, high0 = _halves(base, BF16, FLOAT32)
        low, high = low - low0, high - high0
    else:
        if i % 2 == 1:
            pair = (word >> 32).to(tl.int32)
        else:
            pair = word.to(tl.int32)
        if SIGNED:
            pair = pair ^ ((signs << (15 - 2 * i)) & _SIGNS)
        low, high = _halves(pair, BF16, FLOAT32)
    return low, high


@triton.jit
def _spread(signs):
    """Sign bits 2 i at 2 i, sign bits 2 i + 1 at 2 i + 16: one shift then puts those of a pair in their places."""
    return signs | (signs << 15)


@triton.jit
def _lookup(
    words_ptr,
    groups_ptr,
    first,
    code,
    stage: tl.constexpr,
    word: tl.constexpr,
    C: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Word `word` of the codewords of one stage; first: the codes of stage 0, which choose among GROUPS tables."""
    table = stage
    if stage > 0 and GROUPS > 1:
        table = 1 + (stage - 1) * GROUPS + tl.load(groups_ptr + first, eviction_policy="evict_last").to(tl.int32)
    return tl.load(words_ptr + (table * WORDS + word) * C + code, eviction_policy="evict_last")


@triton.jit
def _both_words(
    words_ptr,
    groups_ptr,
    first,
    code,
    stage: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    INT8: tl.constexpr,
):
    """The words of codewords of one stage: two where 16-bit codewords of 8 have two, else the one word twice."""
    WORDS: tl.constexpr = 2 if D == 8 and not INT8 else 1
    word0 = _lookup(words_ptr, groups_ptr, first, code, stage, 0, C, WORDS, GROUPS)
    word1 = word0
    if WORDS == 2:
        word1 = _lookup(words_ptr, groups_ptr, first, code, stage, 1, C, WORDS, GROUPS)
    return word0, word1


@triton.jit
def _words(
    words_ptr,
    groups_ptr,
    code0,
    code1,
    code2,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    INT8: tl.constexpr,
):
    """The words of the codewords of each stage."""
    a0, b0 = _both_words(words_ptr, groups_ptr, code0, code0, 0, D, C, GROUPS, INT8)
    a1, b1, a2, b2 = a0, b0, a0, b0
    if STAGES > 1:
        a1, b1 = _both_words(words_ptr, groups_ptr, code0, code1, 1, D, C, GROUPS, INT8)
    if STAGES > 2:
        a2, b2 = _both_words(words_ptr, groups_ptr, code0, code2, 2, D, C, GROUPS, INT8)
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
    mask,
    magic,
    D: tl.constexpr,
    STAGES: tl.constexpr,
    INT8: tl.constexpr,
    SIGNED: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """Weights 2 i and 2 i + 1 of the sums of the stages' codewords; a0 .. b2: from `_words`."""
    low, high = _pair(b0 if i >= 2 else a0, signs, i, mask, magic, D, INT8, SIGNED, BF16, FLOAT32)
    if STAGES > 1:
        more_low, more_high = _pair(b1 if i >= 2 else a1, signs, i, mask, magic, D, INT8, SIGNED, BF16, FLOAT32)
        low, high = low + more_low, high + more_high
    if STAGES > 2:
        more_low, more_high = _pair(b2 if i >= 2 else a2, signs, i, mask, magic, D, INT8, SIGNED, BF16, FLOAT32)
        low, high = low + more_low, high + more_high
    return low, high


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def low_rank_kernel(
    x_ptr,
    basis_ptr,
    out_ptr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    X_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, q] = <basis_q, x_m>, float32; grid (M, rank / BLOCK_R). bfloat16 x comes as int16."""
    m = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0)
        if X_BF16:
            x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        basis_mask = (q < RANK)[:, None] & (k < K)[None, :]
        basis = tl.load(basis_ptr + q[:, None] * K + k[None, :], mask=basis_mask, other=0).to(tl.float32)
        acc += basis * x.to(tl.float32)[None, :]
    tl.store(out_ptr + m * RANK + q, tl.sum(acc, 1), mask=q < RANK)


@triton.jit
def _rows(block, r, N: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row in the expert, its mask) of row r of a tile; GATED: gate rows in the first half, their up rows in the
    second."""
    if GATED:
        i = block * (BLOCK_N // 2) + r % (BLOCK_N // 2)
        n = (r // (BLOCK_N // 2)) * (N // 2) + i
        mask = i < N // 2
    else:
        n = block * BLOCK_N + r
        mask = n < N
    return n, mask


@triton.jit
def _finish(
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
    N: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store scale * (acc + coefficients @ low) + bias of BLOCK_N rows and BLOCK_M pairs, or act(gate) * up of them."""
    block = tl.program_id(0)
    n, mask = _rows(block, tl.arange(0, BLOCK_N), N, GATED, BLOCK_N)
    row = e * N + n
    if RANK > 0:
        q = tl.arange(0, BLOCK_R)
        factor_mask = mask[:, None] & (q < RANK)[None, :]
        factor = tl.load(coefficients_ptr + row[:, None] * RANK + q[None, :], mask=factor_mask, other=0).to(tl.float32)
        if FACTOR_SCALE:
            factor = factor * tl.load(factor_scale_ptr + e * RANK + q, mask=q < RANK, other=0.0)[None, :]
        low_mask = (q < RANK)[:, None] & pair_mask[None, :]
        low = tl.load(low_ptr + x_row[None, :] * RANK + q[:, None], mask=low_mask, other=0.0)
        acc = tl.dot(factor, low, acc, input_precision="tf32")
    if SCALE:
        acc = acc * tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N // 2, BLOCK_M]), (1, 2, 0)))
        out = _activation(gate, ACTIVATION) * up
        column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        WIDTH: tl.constexpr = N // 2
    else:
        out = acc
        column = n
        WIDTH: tl.constexpr = N
    offset = pair[None, :] * WIDTH + column[:, None]
    out_mask = (column < WIDTH)[:, None] & pair_mask[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _nth(t, i: tl.constexpr, LENGTH: tl.constexpr, A: tl.constexpr, WARPS: tl.constexpr):
    """t[..., i] of t [A, WARPS, 8, 4, LENGTH], without leaving the registers."""
    if LENGTH == 2:
        even, odd = tl.split(t)
    else:
        even, odd = tl.split(tl.reshape(t, [A, WARPS, 8, 4, 2, 2]))
    if i % 2 == 1:
        part = odd
    else:
        part = even
    if LENGTH == 4:
        first, second = tl.split(part)
        if i >= 2:
            part = second
        else:
            part = first
    return part


@triton.jit
def _fragment(low0, high0, low1, high1):
    """Two pairs of each lane side by side, [.., 4, 2, 2]: what one tensor-core instruction takes from a lane."""
    return tl.join(tl.join(low0, low1), tl.join(high0, high1))


@triton.jit
def decode_kernel(
    x_ptr,
    low_ptr,
    experts_ptr,
    sorted_ptr,
    codes32_ptr,
    codes16_ptr,
    words_ptr,
    groups_ptr,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    factor_scale_ptr,
    out_ptr,
    num_pairs,
    mask,
    magic,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    INT8: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
    WARPS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One projection of few tokens; grid (N / BLOCK_N, pairs or blocks of pairs). Weights are the M operand.

    ALIGNED: blocks of up to BLOCK_M pairs of one expert, from `align_kernel` (experts: of each block, sorted: its
    pairs); else block m is pair m alone. GATED: x [T, K] is read at the pair's token and act(gate) * up [P, N / 2]
    is written; else x [P, K] is read at the pair and [P, N] is written.

    Codes, codewords and x are loaded by the lanes that hand them to the tensor cores, so that nothing goes through
    shared memory. A lane of a 16x16 tile holds two pairs of row g and of row g + 8, g = lane / 4: with the order of
    columns free, as long as x has the same, both come from one codeword (D = 8 makes two such tiles). So a lane takes
    LENGTH * 4 codewords of its rows at a time, and the WARPS split the columns; their sums meet at the end.
    """
    m = tl.program_id(1).to(tl.int64)
    if ROUTED:
        e = tl.load(experts_ptr + m).to(tl.int64)
        if (e < 0) | (e >= E):
            return
    else:
        e = m * 0
    slot = tl.arange(0, BLOCK_M)
    if ALIGNED:
        pair = tl.load(sorted_ptr + m * BLOCK_M + slot).to(tl.int64)
    else:
        pair = tl.where(slot == 0, m, num_pairs)
    pair_mask = pair < num_pairs
    x_row = pair
    if GATED:
        x_row = pair // TOP_K

    ROWS8: tl.constexpr = BLOCK_N // 8
    TOKENS8: tl.constexpr = BLOCK_M // 8
    NUM_W: tl.constexpr = PLANE // 4
    STAGE_BYTES: tl.constexpr = PLANE + PLANE // 2 if WIDE else PLANE
    EXACT: tl.constexpr = K == PLANE * D and NUM_W % (4 * WARPS * LENGTH) == 0
    # Axes: [rows / 8 or tokens / 8, warp, row or token, lane, word].
    eight = tl.arange(0, 8)[None, None, :, None, None]
    lane = (tl.arange(0, WARPS) * 4)[None, :, None, None, None] + tl.arange(0, 4)[None, None, None, :, None]
    i = tl.arange(0, LENGTH)[None, None, None, None, :]
    r = tl.arange(0, ROWS8)[:, None, None, None, None] * 8 + eight
    n, row_mask = _rows(tl.program_id(0), r, N, GATED, BLOCK_N)
    row = (e * N + n) * ROW_BYTES
    t = tl.arange(0, TOKENS8)[:, None, None, None, None] * 8 + eight
    if ALIGNED:
        token = tl.load(sorted_ptr + m * BLOCK_M + t).to(tl.int64)
    else:
        token = tl.where(t == 0, m, num_pairs)
    token_mask = token < num_pairs
    if GATED:
        token = token // TOP_K
    if PER_EXPERT:
        words_ptr += e * (TABLES * C * (2 if D == 8 and not INT8 else 1))
        groups_ptr += e * C

    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    for w0 in tl.range(0, NUM_W, 4 * WARPS * LENGTH, num_stages=1):
        w = w0 + lane * LENGTH + i
        inside = row_mask
        if not EXACT:
            inside = row_mask & (w < NUM_W)
        low_bytes0 = tl.load(codes32_ptr + (row // 4 + w), mask=inside, other=0, eviction_policy="evict_first")
        low_bytes1, low_bytes2 = low_bytes0, low_bytes0
        if STAGES > 1:
            offset = row // 4 + (STAGE_BYTES // 4 + w)
            low_bytes1 = tl.load(codes32_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")
        if STAGES > 2:
            offset = row // 4 + (STAGE_BYTES // 2 + w)
            low_bytes2 = tl.load(codes32_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")
        nibbles0, nibbles1, nibbles2 = low_bytes0, low_bytes0, low_bytes0
        if WIDE:
            offset = row // 2 + (PLANE // 2 + w)
            nibbles0 = tl.load(codes16_ptr + offset, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
            nibbles1, nibbles2 = nibbles0, nibbles0
            if STAGES > 1:
                offset += STAGE_BYTES // 2
                nibbles1 = tl.load(codes16_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")
                nibbles1 = nibbles1.to(tl.int32)
            if STAGES > 2:
                offset += STAGE_BYTES // 2
                nibbles2 = tl.load(codes16_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")
                nibbles2 = nibbles2.to(tl.int32)
        sign_bits = low_bytes0
        if SIGNED and D == 8:
            offset = row // 4 + (PLANE // 4 + w)
            sign_bits = tl.load(codes32_ptr + offset, mask=inside, other=0, eviction_policy="evict_first")
        if SIGNED and D == 4:
            offset = row // 2 + (PLANE // 2 + w)
            sign_bits = tl.load(codes16_ptr + offset, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)
        for j in tl.static_range(LENGTH):
            for byte in tl.static_range(4):
                code0 = (_nth(low_bytes0, j, LENGTH, ROWS8, WARPS) >> (8 * byte)) & 255
                code1 = (_nth(low_bytes1, j, LENGTH, ROWS8, WARPS) >> (8 * byte)) & 255
                code2 = (_nth(low_bytes2, j, LENGTH, ROWS8, WARPS) >> (8 * byte)) & 255
                if WIDE:
                    code0 = code0 | (((_nth(nibbles0, j, LENGTH, ROWS8, WARPS) >> (4 * byte)) & 15) << 8)
                    code1 = code1 | (((_nth(nibbles1, j, LENGTH, ROWS8, WARPS) >> (4 * byte)) & 15) << 8)
                    code2 = code2 | (((_nth(nibbles2, j, LENGTH, ROWS8, WARPS) >> (4 * byte)) & 15) << 8)
                signs = _spread((_nth(sign_bits, j, LENGTH, ROWS8, WARPS) >> (D * byte)) & ((1 << D) - 1))
                # x in loads of 16 bytes: for one vector of 8 or two of 4.
                if D == 8 or byte % 2 == 0:
                    unit = tl.arange(0, 4)[None, None, None, None, :]
                    v = 4 * (w0 + lane * LENGTH + j) + byte
                    x_mask = token_mask
                    if not EXACT:
                        x_mask = token_mask & (v + unit // (D // 2) < K // D)
                    x = tl.load(x_ptr + (token * (K // 2) + (v * (D // 2) + unit)), mask=x_mask, other=0)
                a0, b0, a1, b1, a2, b2 = _words(words_ptr, groups_ptr, code0, code1, code2, D, C, STAGES, GROUPS, INT8)
                for tile in tl.static_range(D // 4):
                    low0, high0 = _summed_pair(
                        a0, b0, a1, b1, a2, b2, signs, 2 * tile, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
                    )
                    low1, high1 = _summed_pair(
                        a0, b0, a1, b1, a2, b2, signs, 2 * tile + 1, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
                    )
                    weights = tl.permute(_fragment(low0, high0, low1, high1), (1, 0, 2, 4, 3, 5))
                    x0 = _nth(x, 2 * (tile if D == 8 else byte % 2), 4, TOKENS8, WARPS)
                    x1 = _nth(x, 2 * (tile if D == 8 else byte % 2) + 1, 4, TOKENS8, WARPS)
                    low0, high0 = _halves(x0, BF16, FLOAT32)
                    low1, high1 = _halves(x1, BF16, FLOAT32)
                    values = tl.permute(_fragment(low0, high0, low1, high1), (1, 4, 3, 5, 0, 2))
                    acc = tl.dot(
                        tl.reshape(weights, [WARPS, BLOCK_N, 16]),
                        tl.reshape(values, [WARPS, 16, BLOCK_M]),
                        acc,
                        input_precision="ieee",
                    )
    _finish(
        tl.sum(acc, 0),
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
    MULTIPLIER: tl.constexpr = (
        -1917548997 if BITS == 1 else -1018351313 if BITS == 2 else -524750729 if BITS == 3 else 1339978321
    )
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
    state = (window[:, None, :] >> shift[:, :, None]) & 4095
    level = ((state * MULTIPLIER) >> 24) & 255
    value = tl.load(levels_ptr + level, eviction_policy="evict_last")
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
    v0,
    mask,
    magic,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    INT8: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BF16: tl.constexpr,
    FLOAT32: tl.constexpr,
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
        if PER_EXPERT:
            words_ptr += e * (TABLES * C * (2 if D == 8 and not INT8 else 1))
            groups_ptr += e * C
        code0 = _codes(codes_ptr, row, row_mask, 0, v0, PLANE, WIDE, R, BLOCK_V)
        code1, code2, signs = code0, code0, code0
        if STAGES > 1:
            code1 = _codes(codes_ptr, row, row_mask, 1, v0, PLANE, WIDE, R, BLOCK_V)
        if STAGES > 2:
            code2 = _codes(codes_ptr, row, row_mask, 2, v0, PLANE, WIDE, R, BLOCK_V)
        if SIGNED and D == 8:
            signs = _spread(_codes(codes_ptr, row, row_mask, 1, v0, PLANE, False, R, BLOCK_V))
        if SIGNED and D == 4:
            signs = _spread(_nibbles(codes_ptr, row, row_mask, PLANE, v0, PLANE, R, BLOCK_V))
        a0, b0, a1, b1, a2, b2 = _words(words_ptr, groups_ptr, code0, code1, code2, D, C, STAGES, GROUPS, INT8)
        low0, high0 = _summed_pair(
            a0, b0, a1, b1, a2, b2, signs, 0, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
        )
        if D >= 4:
            low1, high1 = _summed_pair(
                a0, b0, a1, b1, a2, b2, signs, 1, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
            )
            if D == 8:
                low2, high2 = _summed_pair(
                    a0, b0, a1, b1, a2, b2, signs, 2, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
                )
                low3, high3 = _summed_pair(
                    a0, b0, a1, b1, a2, b2, signs, 3, mask, magic, D, STAGES, INT8, SIGNED, BF16, FLOAT32
                )
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
    mask,
    magic,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TABLES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    INT8: tl.constexpr,
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
    tile = _decode_tile(
        codes_ptr, words_ptr, groups_ptr, e, n, row_mask, v0, mask, magic, N, K, D, C, STAGES, GROUPS, TABLES, PLANE,
        WIDE, INT8, SIGNED, BITS, ROW_BYTES, PER_EXPERT, BF16, True, BLOCK_N, BLOCK_V,
    )  # fmt: skip
    # The row scale goes into both terms before they meet: one live register less than scaling their sum.
    if SCALE:
        scale = tl.load(scale_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        tile = tile * scale
    if RANK > 0:
        q = tl.arange(0, BLOCK_R)
        factor_mask = row_mask[:, None] & (q < RANK)[None, :]
        factor = tl.load(coefficients_ptr + row[:, None] * RANK + q[None, :], mask=factor_mask, other=0).to(tl.float32)
        if FACTOR_SCALE:
            factor = factor * tl.load(factor_scale_ptr + e * RANK + q, mask=q < RANK, other=0.0)[None, :]
        if SCALE:
            factor = factor * scale
        basis_mask = (q < RANK)[:, None] & (k < K)[None, :]
        basis = tl.load(basis_ptr + q[:, None] * K + k[None, :], mask=basis_mask, other=0).to(tl.float32)
        tile = tl.dot(factor, basis, tile, input_precision="tf32")
    offset = row[:, None] * K + k[None, :]
    tl.store(out_ptr + offset, tile.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (k < K)[None, :])


@triton.jit
def align_kernel(
    experts_ptr,
    sorted_ptr,
    block_experts_ptr,
    ends_ptr,
    slots_ptr,
    num_pairs,
    max_blocks,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sorts pairs by expert into blocks of BLOCK_M that hold one expert each; grid (E + 1,), no atomics, no host.

    sorted[i]: the pair at slot i, or num_pairs for none; block_experts[b]: the expert of block b, or -1;
    ends[e]: the slot after expert e's last pair; slots[p]: the slot of pair p (not written for skipped pairs).
    Every program counts all pairs again: that costs less than a second launch.
    """
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for p0 in range(0, num_pairs, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        expert = tl.load(experts_ptr + p, mask=p < num_pairs, other=E)
        expert = tl.where((expert < 0) | (expert > E), E, expert).to(tl.int32)
        counts += tl.histogram(expert, BINS)
    blocks = tl.where(bins < E, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    start = tl.sum(tl.where(bins < e, blocks, 0))
    if e == E:
        for i in range(0, max_blocks, BLOCK_P):
            b = i + tl.arange(0, BLOCK_P)
            tl.store(block_experts_ptr + b, -1, mask=(b >= start) & (b < max_blocks))
        for i in range(0, max_blocks * BLOCK_M, BLOCK_P):
            s = i + tl.arange(0, BLOCK_P)
            tl.store(sorted_ptr + s, num_pairs, mask=(s >= start * BLOCK_M) & (s < max_blocks * BLOCK_M))
    else:
        count = tl.sum(tl.where(bins == e, counts, 0))
        end = start + (count + BLOCK_M - 1) // BLOCK_M
        for i in range(0, max_blocks, BLOCK_P):
            b = i + tl.arange(0, BLOCK_P)
            tl.store(block_experts_ptr + b, e, mask=(b >= start) & (b < end))
        s = (end - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(sorted_ptr + s, num_pairs, mask=s >= start * BLOCK_M + count)
        tl.store(ends_ptr + e, start * BLOCK_M + count)
        slot = start * BLOCK_M
        for p0 in range(0, num_pairs, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            mine = (tl.load(experts_ptr + p, mask=p < num_pairs, other=-1) == e).to(tl.int32)
            slots = slot + tl.cumsum(mine, 0) - 1
            tl.store(sorted_ptr + slots, p, mask=mine > 0)
            tl.store(slots_ptr + p, slots, mask=mine > 0)
            slot += tl.sum(mine)


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
    mask,
    magic,
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
    INT8: tl.constexpr,
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
    n, row_mask = _rows(tl.program_id(0), tl.arange(0, BLOCK_N), N, GATED, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # One stage: deeper pipelines move the codeword reads into copies that bypass L1.
    for v0 in tl.range(0, tl.cdiv(K, D), BLOCK_V, num_stages=1):
        tile = _decode_tile(
            codes_ptr, words_ptr, groups_ptr, e, n, row_mask, v0, mask, magic, N, K, D, C, STAGES, GROUPS, TABLES,
            PLANE, WIDE, INT8, SIGNED, BITS, ROW_BYTES, PER_EXPERT, BF16, FLOAT32, BLOCK_N, BLOCK_V,
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
    _finish(
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


@triton.jit
def combine_kernel(
    rows_ptr,
    slots_ptr,
    experts_ptr,
    weights_ptr,
    y_ptr,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS_BF16: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] = sum_j weight_tj * rows[pair or its slot]; grid (N / BLOCK_N, T). bfloat16 rows come as int16."""
    t = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BLOCK_J)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = t * TOP_K + j
    e = tl.load(experts_ptr + pair, mask=j < TOP_K, other=-1)
    weight = tl.load(weights_ptr + pair, mask=j < TOP_K, other=0.0).to(tl.float32)
    valid = (e >= 0) & (e < E)
    slot = pair
    if SORTED:
        slot = tl.load(slots_ptr + pair, mask=valid, other=0).to(tl.int64)
    mask = valid[:, None] & (column < N)[None, :]
    row = tl.load(rows_ptr + slot[:, None] * N + column[None, :], mask=mask, other=0)
    if ROWS_BF16:
        row = (row.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    y = tl.sum(tl.where(mask, weight[:, None] * row.to(tl.float32), 0.0), 0)
    tl.store(y_ptr + t * N + column, y.to(y_ptr.dtype.element_ty), mask=column < N)
