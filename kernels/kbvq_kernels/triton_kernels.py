"""The Triton kernels. README.md derives them; `launch.py` chooses block sizes and calls them.

Shapes are constexpr: a model has a handful of them, and constant trip counts and strides spare instructions.

Names: N rows (out_features), K columns (in_features), E experts, P = T * k token-expert pairs.
A row of codes has STAGES planes of PLANE low bytes, each followed, when WIDE, by PLANE / 2 bytes of nibbles.
A *word* is an int64 of four 16-bit floats (an int32 of two when D == 2); a codeword is WORDS of them. The kernels
for few tokens read a table of words [.., STAGES, WORDS, C]: equal words of all codewords lie together, so that a
load of one word meets every memory bank. The others read codewords whole, [.., STAGES, C, D].

Kernels for few tokens (`gate_up_kernel`, `down_kernel`) read four codes as one int32, so that codes, codewords
and activations share one register layout, and multiply in float32. bfloat16 is widened by a shift, never by
arithmetic: that is exact, costs one instruction and is also right in the Triton interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half(word, i: tl.constexpr, IS_BF16: tl.constexpr):
    """Element i of words of 16-bit floats, as float32."""
    if i >= 2:
        pair = (word >> 32).to(tl.int32)
    else:
        pair = word.to(tl.int32)
    if IS_BF16:
        if i % 2 == 0:
            bits = pair << 16
        else:
            bits = pair & -65536
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = (pair >> (16 * (i % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


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
def _plane_offset(column, PLANE: tl.constexpr, D: tl.constexpr):
    """Where the gate_up kernel keeps column `column` of its output for the down kernel.

    Vector v = 4 w + b is stored at b * PLANE / 4 + w: lanes that hold neighbouring code words w then read
    neighbouring activations for each byte b, instead of ones four vectors apart.
    """
    v = column // D
    return ((v % 4) * (PLANE // 4) + v // 4) * D + column % D


@triton.jit
def _code_words(
    codes32_ptr, codes16_ptr, row, mask, w, stage: tl.constexpr, PLANE: tl.constexpr, WIDE: tl.constexpr
):
    """(low bytes, nibbles) of four codes per element; row: byte offset of each row [R, 1], w [1, BLOCK_W]."""
    STAGE_BYTES: tl.constexpr = PLANE + PLANE // 2 if WIDE else PLANE
    low = tl.load(
        codes32_ptr + row // 4 + (stage * STAGE_BYTES // 4 + w), mask=mask, other=0, eviction_policy="evict_first"
    )
    if WIDE:
        offset = row // 2 + ((stage * STAGE_BYTES + PLANE) // 2 + w)
        high = tl.load(codes16_ptr + offset, mask=mask, other=0, eviction_policy="evict_first").to(tl.int32)
    else:
        high = low
    return low, high


@triton.jit
def _codeword(
    table_ptr,
    table_row,
    low,
    high,
    byte: tl.constexpr,
    word: tl.constexpr,
    stage: tl.constexpr,
    C: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    code = (low >> (8 * byte)) & 255
    if WIDE:
        code = code | (((high >> (4 * byte)) & 15) << 8)
    return tl.load(table_ptr + table_row + (stage * WORDS + word) * C + code, eviction_policy="evict_last")


@triton.jit
def _row_sums(
    codes32_ptr,
    codes16_ptr,
    row,
    row_mask,
    table_ptr,
    table_row,
    x_ptr,
    x_row,
    x_mask,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    TABLE_BF16: tl.constexpr,
    X_BITS: tl.constexpr,
    X_BF16: tl.constexpr,
    X_PLANES: tl.constexpr,
    R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """<decode(codes_r), x_r> for R rows, float32 [R].

    row, row_mask [R, 1]; table_row, x_row, x_mask [R, 1] or [1, 1]: offsets, in words, of a row's table and x
    (x_row in elements when x is float32). X_PLANES: x is in the order of `_plane_offset`.
    """
    WORDS: tl.constexpr = (D + 3) // 4
    PER_WORD: tl.constexpr = D // WORDS
    NUM_W: tl.constexpr = PLANE // 4
    acc = tl.zeros([R, BLOCK_W], tl.float32)
    for w0 in range(0, NUM_W, BLOCK_W):
        w = (w0 + tl.arange(0, BLOCK_W))[None, :]
        mask = row_mask & (w < NUM_W)
        low0, high0 = _code_words(codes32_ptr, codes16_ptr, row, mask, w, 0, PLANE, WIDE)
        low1, high1 = low0, high0
        low2, high2 = low0, high0
        if STAGES > 1:
            low1, high1 = _code_words(codes32_ptr, codes16_ptr, row, mask, w, 1, PLANE, WIDE)
        if STAGES > 2:
            low2, high2 = _code_words(codes32_ptr, codes16_ptr, row, mask, w, 2, PLANE, WIDE)
        for byte in tl.static_range(4):
            v = 4 * w + byte
            if X_PLANES:
                slot = byte * NUM_W + w
            else:
                slot = v
            in_row = x_mask & (v < K // D)
            for word in tl.static_range(WORDS):
                word0 = _codeword(table_ptr, table_row, low0, high0, byte, word, 0, C, WORDS, WIDE)
                if STAGES > 1:
                    word1 = _codeword(table_ptr, table_row, low1, high1, byte, word, 1, C, WORDS, WIDE)
                if STAGES > 2:
                    word2 = _codeword(table_ptr, table_row, low2, high2, byte, word, 2, C, WORDS, WIDE)
                if X_BITS == 16:
                    x_word = tl.load(x_ptr + x_row + slot * WORDS + word, mask=in_row, other=0)
                for i in tl.static_range(PER_WORD):
                    if X_BITS == 16:
                        x = _half(x_word, i, X_BF16)
                    else:
                        x = tl.load(x_ptr + x_row + slot * D + word * PER_WORD + i, mask=in_row, other=0.0)
                    value = _half(word0, i, TABLE_BF16)
                    if STAGES > 1:
                        value += _half(word1, i, TABLE_BF16)
                    if STAGES > 2:
                        value += _half(word2, i, TABLE_BF16)
                    acc += value * x
    return tl.sum(acc, 1)


@triton.jit
def _scale_low_rank_bias(
    sums,
    row,
    mask,
    e,
    low_row,
    low_mask,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    low_ptr,
    factor_scale_ptr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """scale * (sums + coefficients @ low) + bias, [R]; row: index into [E * N]; e, low_row, low_mask [R | 1, 1]."""
    if RANK > 0:
        q = tl.arange(0, BLOCK_R)[None, :]
        low = tl.load(low_ptr + low_row * RANK + q, mask=low_mask & (q < RANK), other=0.0)
        if FACTOR_SCALE:
            low = low * tl.load(factor_scale_ptr + e * RANK + q, mask=low_mask & (q < RANK), other=0.0)
        offset = row[:, None] * RANK + q
        factor = tl.load(coefficients_ptr + offset, mask=mask[:, None] & (q < RANK), other=0.0).to(tl.float32)
        sums += tl.sum(factor * low, 1)
    if SCALE:
        sums = sums * tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
    return sums


@triton.jit
def low_rank_kernel(
    x_ptr,
    basis_ptr,
    out_ptr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    X_STRIDE: tl.constexpr,
    X_BF16: tl.constexpr,
    X_PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[m, q] = <basis_q, x_m>, float32; grid (M, rank / BLOCK_R). bfloat16 x comes as int16."""
    m = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if X_PLANES:
            slot = _plane_offset(k, PLANE, D)
        else:
            slot = k
        x = tl.load(x_ptr + m * X_STRIDE + slot, mask=k < K, other=0)
        if X_BF16:
            x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        basis_mask = (q < RANK)[:, None] & (k < K)[None, :]
        basis = tl.load(basis_ptr + q[:, None] * K + k[None, :], mask=basis_mask, other=0).to(tl.float32)
        acc += basis * x.to(tl.float32)[None, :]
    tl.store(out_ptr + m * RANK + q, tl.sum(acc, 1), mask=q < RANK)


@triton.jit
def gate_up_kernel(
    x_ptr,
    low_ptr,
    experts_ptr,
    codes32_ptr,
    codes16_ptr,
    table_ptr,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    factor_scale_ptr,
    h_ptr,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    TABLE_BF16: tl.constexpr,
    X_BITS: tl.constexpr,
    X_BF16: tl.constexpr,
    H_PLANE: tl.constexpr,
    H_D: tl.constexpr,
    ROUTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[p] = act(gate) * up of pair p's expert, in plane order; grid (N / 2 / BLOCK_N, P). Skips invalid experts."""
    pair = tl.program_id(1).to(tl.int64)
    token = pair // TOP_K
    if ROUTED:
        e = tl.load(experts_ptr + pair).to(tl.int64)
        if (e < 0) | (e >= E):
            return
    else:
        e = pair * 0
    # Gate and up rows alternate, so that one tile holds both and shares x.
    WORDS: tl.constexpr = (D + 3) // 4
    INTERMEDIATE: tl.constexpr = N // 2
    r = tl.arange(0, 2 * BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + r // 2
    mask = n < INTERMEDIATE
    row = e * N + (r % 2) * INTERMEDIATE + n
    token_row = tl.full([1, 1], 0, tl.int64) + token
    one = token_row >= 0
    UNIT: tl.constexpr = D // WORDS if X_BITS == 16 else 1
    table_row = tl.full([1, 1], 0, tl.int64)
    if PER_EXPERT:
        table_row += e * (STAGES * C * WORDS)
    sums = _row_sums(
        codes32_ptr,
        codes16_ptr,
        row[:, None] * ROW_BYTES,
        mask[:, None],
        table_ptr,
        table_row,
        x_ptr,
        token_row * (K // UNIT),
        one,
        K,
        D,
        C,
        STAGES,
        PLANE,
        WIDE,
        TABLE_BF16,
        X_BITS,
        X_BF16,
        False,
        2 * BLOCK_N,
        BLOCK_W,
    )
    sums = _scale_low_rank_bias(
        sums,
        row,
        mask,
        token_row * 0 + e,
        token_row,
        one,
        scale_ptr,
        bias_ptr,
        coefficients_ptr,
        low_ptr,
        factor_scale_ptr,
        SCALE,
        BIAS,
        RANK,
        FACTOR_SCALE,
        BLOCK_R,
    )
    gate, up = tl.split(tl.reshape(sums, [BLOCK_N, 2]))
    h = _activation(gate, ACTIVATION) * up
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = pair * (H_PLANE * H_D) + _plane_offset(column, H_PLANE, H_D)
    tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=column < INTERMEDIATE)


@triton.jit
def down_kernel(
    x_ptr,
    low_ptr,
    experts_ptr,
    weights_ptr,
    codes32_ptr,
    codes16_ptr,
    table_ptr,
    scale_ptr,
    bias_ptr,
    coefficients_ptr,
    factor_scale_ptr,
    y_ptr,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    TABLE_BF16: tl.constexpr,
    X_BITS: tl.constexpr,
    X_BF16: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[t] = sum_j weight_tj * (W_down,e x[t, j] + bias_e); grid (N / BLOCK_N, T); x in plane order.

    A tile's rows are the BLOCK_N output rows of all of the token's experts: their codes are all in flight at once,
    and the sum over experts stays inside the program, in a fixed order.
    """
    t = tl.program_id(1).to(tl.int64)
    WORDS: tl.constexpr = (D + 3) // 4
    UNIT: tl.constexpr = D // WORDS if X_BITS == 16 else 1
    r = tl.arange(0, BLOCK_N * BLOCK_J)
    j = r % BLOCK_J
    n = tl.program_id(0) * BLOCK_N + r // BLOCK_J
    pair = t * TOP_K + j
    if ROUTED:
        e = tl.load(experts_ptr + pair, mask=j < TOP_K, other=-1).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=j < TOP_K, other=0.0).to(tl.float32)
    else:
        e = pair * 0
        weight = (pair * 0 + 1).to(tl.float32)
    valid = (j < TOP_K) & (e >= 0) & (e < E)
    mask = valid & (n < N)
    e = tl.where(valid, e, 0)
    row = e * N + n
    if PER_EXPERT:
        table_row = e[:, None] * (STAGES * C * WORDS)
    else:
        table_row = tl.full([1, 1], 0, tl.int64)
    sums = _row_sums(
        codes32_ptr,
        codes16_ptr,
        row[:, None] * ROW_BYTES,
        mask[:, None],
        table_ptr,
        table_row,
        x_ptr,
        pair[:, None] * (PLANE * D // UNIT),
        valid[:, None],
        K,
        D,
        C,
        STAGES,
        PLANE,
        WIDE,
        TABLE_BF16,
        X_BITS,
        X_BF16,
        True,
        BLOCK_N * BLOCK_J,
        BLOCK_W,
    )
    sums = _scale_low_rank_bias(
        sums,
        row,
        mask,
        e[:, None],
        pair[:, None],
        valid[:, None],
        scale_ptr,
        bias_ptr,
        coefficients_ptr,
        low_ptr,
        factor_scale_ptr,
        SCALE,
        BIAS,
        RANK,
        FACTOR_SCALE,
        BLOCK_R,
    )
    weighted = tl.where(mask, sums * weight, 0.0)
    y = tl.sum(tl.reshape(weighted, [BLOCK_N, BLOCK_J]), 1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + t * N + column, y.to(y_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _decode_tile(
    codes_ptr,
    row,
    mask,
    table_ptr,
    v0,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    FLOAT32: tl.constexpr,
    R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Codewords of R rows and BLOCK_V vectors from v0 on, [R, BLOCK_V * D], in float32 or in the table's dtype."""
    STAGE_BYTES: tl.constexpr = PLANE + PLANE // 2 if WIDE else PLANE
    v = v0 + tl.arange(0, BLOCK_V)
    d = tl.arange(0, D)
    for stage in tl.static_range(STAGES):
        offset = row[:, None] + (stage * STAGE_BYTES + v)[None, :]
        v_mask = mask[:, None] & (v < PLANE)[None, :]
        code = tl.load(codes_ptr + offset, mask=v_mask, other=0, eviction_policy="evict_first").to(tl.int32)
        if WIDE:
            b = v0 // 2 + tl.arange(0, BLOCK_V // 2)
            offset = row[:, None] + (stage * STAGE_BYTES + PLANE + b)[None, :]
            b_mask = mask[:, None] & (b < PLANE // 2)[None, :]
            byte = tl.load(codes_ptr + offset, mask=b_mask, other=0, eviction_policy="evict_first").to(tl.int32)
            high = (byte[:, :, None] >> (4 * tl.arange(0, 2))[None, None, :]) & 15
            code = code | (tl.reshape(high, [R, BLOCK_V]) << 8)
        part = tl.load(
            table_ptr + (stage * C + code[:, :, None]) * D + d[None, None, :], eviction_policy="evict_last"
        )
        if FLOAT32:
            part = part.to(tl.float32)
        if stage == 0:
            tile = part
        else:
            tile += part
    return tl.reshape(tile, [R, BLOCK_V * D])


@triton.jit
def dequantize_kernel(
    codes_ptr,
    table_ptr,
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
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
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
    mask = n < N
    if PER_EXPERT:
        table_ptr += e * (STAGES * C * D)
    tile = _decode_tile(
        codes_ptr, row * ROW_BYTES, mask, table_ptr, v0, D, C, STAGES, PLANE, WIDE, True, BLOCK_N, BLOCK_V
    )
    # The row scale goes into both terms before they meet: one live register less than scaling their sum.
    if SCALE:
        scale = tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)[:, None]
        tile = tile * scale
    if RANK > 0:
        q = tl.arange(0, BLOCK_R)
        factor_mask = mask[:, None] & (q < RANK)[None, :]
        factor = tl.load(coefficients_ptr + row[:, None] * RANK + q[None, :], mask=factor_mask, other=0).to(tl.float32)
        if FACTOR_SCALE:
            factor = factor * tl.load(factor_scale_ptr + e * RANK + q, mask=q < RANK, other=0.0)[None, :]
        if SCALE:
            factor = factor * scale
        basis_mask = (q < RANK)[:, None] & (k < K)[None, :]
        basis = tl.load(basis_ptr + q[:, None] * K + k[None, :], mask=basis_mask, other=0).to(tl.float32)
        tile = tl.dot(factor, basis, tile, input_precision="tf32")
    offset = row[:, None] * K + k[None, :]
    tl.store(out_ptr + offset, tile.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (k < K)[None, :])


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
    table_ptr,
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
    PLANE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    r = tl.arange(0, BLOCK_N)
    if GATED:
        x_row = pair // TOP_K
        n = tl.program_id(0) * (BLOCK_N // 2) + r // 2
        mask = n < N // 2
        row = e * N + (r % 2) * (N // 2) + n
    else:
        x_row = pair
        n = tl.program_id(0) * BLOCK_N + r
        mask = n < N
        row = e * N + n
    if PER_EXPERT:
        table_ptr += e * (STAGES * C * D)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # One stage: deeper pipelines move the codeword reads into copies that bypass L1.
    for v0 in tl.range(0, PLANE, BLOCK_V, num_stages=1):
        tile = _decode_tile(
            codes_ptr, row * ROW_BYTES, mask, table_ptr, v0, D, C, STAGES, PLANE, WIDE, FLOAT32, BLOCK_N, BLOCK_V
        )
        k = v0 * D + tl.arange(0, BLOCK_V * D)
        x_mask = (k < K)[:, None] & pair_mask[None, :]
        x = tl.load(x_ptr + x_row[None, :] * K + k[:, None], mask=x_mask, other=0.0)
        if BLACKWELL and D < 8:
            # Triton 3.6 would store the codewords before reshaping them, in a layout that needs 16 bytes in a row,
            # and fail. A select in between keeps the reshape in registers.
            tile = tl.where(mask[:, None], tile, 0.0)
        if FLOAT32:
            acc = tl.dot(tile, x.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(tile.to(x.dtype), x, acc)
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
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, BLOCK_M]), (0, 2, 1)))
        out = _activation(gate, ACTIVATION) * up
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        WIDTH: tl.constexpr = N // 2
    else:
        out = acc
        column = n
        WIDTH: tl.constexpr = N
    offset = pair[None, :] * WIDTH + column[:, None]
    out_mask = (column < WIDTH)[:, None] & pair_mask[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=out_mask)


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
