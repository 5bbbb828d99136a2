"""Few tokens: weights decoded in the registers of the threads that multiply with them. Names as in codewords.py."""

from __future__ import annotations

import triton
import triton.language as tl

from kbvq_kernels.codewords import codeword_words, expert_tables, signed_pair, spread_signs, trellis_level
from kbvq_kernels.epilogue import store_rows, tile_rows
from kbvq_kernels.ptx import add_pairs, funnel, load_words, mma, share_tables, shared_words


@triton.jit
def _stack(parts, N: tl.constexpr):
    """N (1, 2, 4) tensors [..] as one [.., N]."""
    if N == 4:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        stacked = tl.reshape(joined, parts[0].shape + [4])
    elif N == 2:
        stacked = tl.join(parts[0], parts[1])
    else:
        stacked = tl.expand_dims(parts[0], -1)
    return stacked


@triton.jit
def _row_words(
    row_address,
    row_mask,
    w,
    R: tl.constexpr,
    NUM_W: tl.constexpr,
    STAGES: tl.constexpr,
    STAGE_BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """For each of R rows the int32 of codes from the lane's words w on: per stage LENGTH of low bytes and, when WIDE,
    LENGTH / 2 of nibbles; then the sign bits, LENGTH for vectors of 8 and LENGTH / 2 for vectors of 4."""
    words = ()
    for r in tl.static_range(R):
        inside = row_mask[r] & (w < NUM_W)
        for stage in tl.static_range(STAGES):
            address = row_address[r] + (stage * STAGE_BYTES + 4 * w)
            words = words + load_words(address, inside, LENGTH, "streamed")
            if WIDE:
                words = words + load_words(
                    row_address[r] + (stage * STAGE_BYTES + 4 * NUM_W + 2 * w), inside, LENGTH // 2, "streamed"
                )
        if SIGNED and D == 8:
            words = words + load_words(row_address[r] + (4 * NUM_W + 4 * w), inside, LENGTH, "streamed")
        if SIGNED and D == 4:
            words = words + load_words(row_address[r] + (4 * NUM_W + 2 * w), inside, LENGTH // 2, "streamed")
    return words


@triton.jit
def _code(
    words,
    first: tl.constexpr,
    j: tl.constexpr,
    byte: tl.constexpr,
    WIDE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Code `byte` of word j, where the LENGTH words of low bytes start at `first`."""
    code = (words[first + j] >> (8 * byte)) & 255
    if WIDE:
        nibbles = words[first + LENGTH + j // 2] >> (16 * (j % 2) + 4 * byte)
        code = code | ((nibbles & 15) << 8)
    return code


@triton.jit
def _vector_pairs(
    words,
    r: tl.constexpr,
    j: tl.constexpr,
    byte: tl.constexpr,
    words_ptr,
    groups_ptr,
    shared,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BF16: tl.constexpr,
    COPIES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The D / 2 pairs of vector 4 j + byte of row r of `_row_words`."""
    EACH: tl.constexpr = LENGTH + LENGTH // 2 if WIDE else LENGTH
    SIGN_WORDS: tl.constexpr = (LENGTH if D == 8 else LENGTH // 2) if SIGNED else 0
    start: tl.constexpr = r * (STAGES * EACH + SIGN_WORDS)
    code0 = _code(words, start, j, byte, WIDE, LENGTH)
    signs = code0
    if SIGNED and D == 8:
        signs = spread_signs((words[start + EACH + j] >> (8 * byte)) & 255)
    if SIGNED and D == 4:
        signs = spread_signs((words[start + EACH + j // 2] >> (16 * (j % 2) + 4 * byte)) & 15)
    a, b = codeword_words(words_ptr, groups_ptr, shared, code0, code0, 0, D, C, GROUPS, COPIES)
    pairs = ()
    for i in tl.static_range(D // 2):
        pairs = pairs + (signed_pair(a, b, signs, i, SIGNED),)
    for stage in tl.static_range(1, STAGES):
        code = _code(words, start + stage * EACH, j, byte, WIDE, LENGTH)
        a, b = codeword_words(words_ptr, groups_ptr, shared, code0, code, stage, D, C, GROUPS, COPIES)
        sums = ()
        for i in tl.static_range(D // 2):
            sums = sums + (add_pairs(pairs[i], signed_pair(a, b, signs, i, False), BF16),)
        pairs = sums
    return pairs


@triton.jit
def _row_pairs(
    words,
    r: tl.constexpr,
    j: tl.constexpr,
    unit: tl.constexpr,
    words_ptr,
    groups_ptr,
    shared,
    D: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BF16: tl.constexpr,
    COPIES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The pairs of a vector of 8 or 4, or of two of 2: number `unit` among those of word j."""
    EACH: tl.constexpr = 2 if D == 2 else 1
    pairs = ()
    for i in tl.static_range(EACH):
        pairs = pairs + _vector_pairs(
            words, r, j, EACH * unit + i, words_ptr, groups_ptr, shared, D, C, STAGES, GROUPS, WIDE, SIGNED, BF16,
            COPIES, LENGTH,
        )  # fmt: skip
    return pairs


@triton.jit
def _four(values, at: tl.constexpr):
    return (values[at], values[at + 1], values[at + 2], values[at + 3])


@triton.jit
def _multiply(
    top,
    bottom,
    x,
    token: tl.constexpr,
    unit: tl.constexpr,
    acc,
    place: tl.constexpr,
    WIDTH: tl.constexpr,
    X_LOADS: tl.constexpr,
    BF16: tl.constexpr,
):
    """The four sums at `place`, plus WIDTH weights of rows g and g + 8 times what of x goes with them."""
    START: tl.constexpr = token * (4 // X_LOADS) + (2 if WIDTH == 4 and X_LOADS == 1 and unit % 2 == 1 else 0)
    c = _four(acc, 4 * place)
    for i in tl.static_range(WIDTH // 4):
        c = mma(
            top[2 * i], bottom[2 * i], top[2 * i + 1], bottom[2 * i + 1],
            x[START + 2 * i], x[START + 2 * i + 1], c[0], c[1], c[2], c[3], BF16,
        )  # fmt: skip
    return c


@triton.jit
def _block(
    experts_ptr,
    sorted_ptr,
    num_pairs,
    E: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(number of the block, its expert, -1 for none, its pairs [BLOCK_M], num_pairs for none); see decode_kernel."""
    m = tl.program_id(1).to(tl.int64)
    e = m * 0
    if ROUTED:
        e = tl.load(experts_ptr + m).to(tl.int64)
        e = tl.where(e < E, e, -1)
    slot = tl.arange(0, BLOCK_M)
    if ALIGNED:
        pair = tl.load(sorted_ptr + m * BLOCK_M + slot).to(tl.int64)
    else:
        pair = tl.where(slot == 0, m, num_pairs)
    return m, e, pair


@triton.jit
def _token_addresses(
    x_ptr,
    sorted_ptr,
    m,
    g,
    num_pairs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS8: tl.constexpr,
):
    """Where the row of x of tokens g, g + 8, .. of block m starts, and whether there is such a token."""
    addresses, masks = (), ()
    for i in tl.static_range(TOKENS8):
        if ALIGNED:
            token = tl.load(sorted_ptr + m * (8 * TOKENS8) + i * 8 + g).to(tl.int64)
        else:
            token = tl.where((g == 0) & (i == 0), m, num_pairs)
        masks = masks + (token < num_pairs,)
        if GATED:
            token = token // TOP_K
        addresses = addresses + (x_ptr.to(tl.int64) + token * (2 * K),)
    return addresses, masks


@triton.jit
def _total(acc, ROW_WARPS: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, TOKENS8: tl.constexpr):
    """Sums of `mma` by tile of 16 rows and 8 tokens, added over the warps that split the columns: [rows, tokens]."""
    tiles = ()
    for tile in tl.static_range(TILES):
        tokens = ()
        for i in tl.static_range(TOKENS8):
            tokens = tokens + (_stack(_four(acc, 4 * (tile * TOKENS8 + i)), 4),)
        tiles = tiles + (_stack(tokens, TOKENS8),)
    total = tl.reshape(_stack(tiles, TILES), [ROW_WARPS, SPLIT, 8, 4, 2, 2, TOKENS8, TILES])
    total = tl.reshape(tl.sum(total, 1), [ROW_WARPS, 8, 4, 2, 2, TOKENS8, TILES])
    total = tl.permute(total, (0, 6, 3, 1, 5, 2, 4))  # row warp, tile, half, g; token / 8, t, column
    return tl.reshape(total, [ROW_WARPS * TILES * 16, TOKENS8 * 8])


@triton.jit
def decode_kernel(
    x_ptr,
    low_ptr,
    experts_ptr,
    sorted_ptr,
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
    COPIES: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One projection of few tokens; grid (N / ROWS, pairs or blocks of pairs). Weights are the M operand.

    ALIGNED: blocks of up to BLOCK_M pairs of one expert, from `align_kernel` (experts: of each block, sorted: its
    pairs); else block m is pair m alone. GATED: x [T, K] is read at the pair's token and act(gate) * up [P, N / 2]
    is written; else x [P, K] is read at the pair and [P, N] is written. x and the rows of codes start at multiples of
    16 bytes.

    All tensors before the epilogue have one element a thread: see ptx.py. Codes, codewords and x are loaded by the
    lanes that hand them to the tensor cores, so that no weight goes through shared memory. A lane of a 16x16 tile holds
    two pairs of row g and of row g + 8, g = lane / 4: with the order of columns free, as long as x has the same, both
    come from one codeword (D = 8 makes two such tiles; D = 2 takes two codewords). So a lane takes LENGTH * 4 codewords
    of its rows at a time, and loads the codes of the next ones before it decodes these. A warp has BLOCK_N rows;
    ROW_WARPS of the WARPS have rows of their own, ROWS together, and as many as share rows split the columns; their
    sums meet at the end.
    """
    m, e, pair = _block(experts_ptr, sorted_ptr, num_pairs, E, ALIGNED, ROUTED, BLOCK_M)
    if e < 0:
        return
    SPLIT: tl.constexpr = WARPS // ROW_WARPS
    ROWS: tl.constexpr = BLOCK_N * ROW_WARPS
    TILES: tl.constexpr = BLOCK_N // 16
    TOKENS8: tl.constexpr = BLOCK_M // 8
    NUM_W: tl.constexpr = PLANE // 4
    STAGE_BYTES: tl.constexpr = PLANE + PLANE // 2 if WIDE else PLANE
    STEP: tl.constexpr = 4 * SPLIT * LENGTH
    WIDTH: tl.constexpr = max(4, D)
    X_LOADS: tl.constexpr = 1 if K % 8 == 0 else 2
    thread = tl.arange(0, 32 * WARPS)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4

    words_ptr, groups_ptr = expert_tables(words_ptr, groups_ptr, e, D, C, TABLES, PER_EXPERT)
    shared = share_tables(words_ptr, TABLES, D, C, COPIES)

    row_address, row_mask = (), ()
    for r in tl.static_range(BLOCK_N // 8):
        n, mask = tile_rows(tl.program_id(0), warp // SPLIT * BLOCK_N + r * 8 + g, N, GATED, ROWS)
        row_address = row_address + (codes_ptr.to(tl.int64) + (e * N + n) * ROW_BYTES,)
        row_mask = row_mask + (mask,)
    x_address, token_mask = _token_addresses(x_ptr, sorted_ptr, m, g, num_pairs, TOP_K, K, GATED, ALIGNED, TOKENS8)
    zero = tl.zeros([32 * WARPS], tl.float32)
    acc = ()
    for _ in tl.static_range(4 * TILES * TOKENS8):
        acc = acc + (zero,)
    w = (warp % SPLIT * 4 + t) * LENGTH
    words = _row_words(row_address, row_mask, w, BLOCK_N // 8, NUM_W, STAGES, STAGE_BYTES, WIDE, SIGNED, D, LENGTH)
    for w0 in tl.range(0, NUM_W, STEP, num_stages=1):
        following = _row_words(
            row_address, row_mask, w + w0 + STEP, BLOCK_N // 8, NUM_W, STAGES, STAGE_BYTES, WIDE, SIGNED, D, LENGTH
        )
        x = ()
        for j in tl.static_range(LENGTH):
            for unit in tl.static_range(4 * D // WIDTH):
                # x in loads of 8 columns; of 4 where rows do not start at multiples of 16 bytes.
                column = 4 * D * (w + w0 + j) + WIDTH * unit
                if WIDTH == 8 or X_LOADS == 2 or unit % 2 == 0:
                    x = ()
                    for i in tl.static_range(TOKENS8):
                        x = x + load_words(
                            x_address[i] + 2 * column, token_mask[i] & (column < K), 4 // X_LOADS, "kept"
                        )
                sums = ()
                for tile in tl.static_range(TILES):
                    top = _row_pairs(
                        words, 2 * tile, j, unit, words_ptr, groups_ptr, shared, D, C, STAGES, GROUPS, WIDE, SIGNED,
                        BF16, COPIES, LENGTH,
                    )  # fmt: skip
                    bottom = _row_pairs(
                        words, 2 * tile + 1, j, unit, words_ptr, groups_ptr, shared, D, C, STAGES, GROUPS, WIDE,
                        SIGNED, BF16, COPIES, LENGTH,
                    )  # fmt: skip
                    for i in tl.static_range(TOKENS8):
                        sums = sums + _multiply(top, bottom, x, i, unit, acc, tile * TOKENS8 + i, WIDTH, X_LOADS, BF16)
                acc = sums
        words = following

    store_rows(
        _total(acc, ROW_WARPS, SPLIT, TILES, TOKENS8),
        e,
        pair,
        pair < num_pairs,
        pair // TOP_K if GATED else pair,
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
        ROWS,
        BLOCK_R,
    )


@triton.jit
def _column_words(address, column, inside, first, K: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """For each of 4 columns the 2 BITS int32 with the codes of 64 rows, from word `first` of its stream on, and the one
    behind, which past the end of a stream is its first. Anything where there is none: every code stands for a level."""
    LOADS: tl.constexpr = 2 if BITS % 2 == 1 else 4
    WORDS: tl.constexpr = ROW_BYTES // 4
    words = ()
    for c in tl.static_range(4):
        stream = address + (column + c).to(tl.int64) * ROW_BYTES
        there = inside & (column + c < K)
        for i in tl.static_range(2 * BITS // LOADS):
            words = words + load_words(stream + 4 * (first + i * LOADS), there, LOADS, "loose")
        behind = first + 2 * BITS
        words = words + load_words(stream + 4 * tl.where(behind >= WORDS, behind - WORDS, behind), there, 1, "loose")
    return words


@triton.jit
def _levels(words, c: tl.constexpr, i: tl.constexpr, g, shared, BITS: tl.constexpr, COPIES: tl.constexpr):
    """The level, twice in an int32, of row g + 8 i of column c of `_column_words`."""
    # Its window of 12 bits begins at bit 8 i BITS + g BITS: in the 32 bits from bit g BITS on of the word with bit
    # 8 i BITS, but where that is the word's last byte, eight bits further on.
    AT: tl.constexpr = c * (2 * BITS + 1) + 8 * i * BITS // 32
    LATE: tl.constexpr = 8 if 8 * i * BITS % 32 == 24 else 0
    window = funnel(words[AT], words[AT + 1], g * BITS + LATE) >> (8 * i * BITS % 32 - LATE)
    word, _ = shared_words(shared, trellis_level(window, BITS), 2, COPIES)
    return word


@triton.jit
def _column_pairs(words, c: tl.constexpr, g, shared, BITS: tl.constexpr, COPIES: tl.constexpr):
    """Pairs of columns c and c + 1, of rows g + 8 i for i < 8."""
    pairs = ()
    for i in tl.static_range(8):
        left = _levels(words, c, i, g, shared, BITS, COPIES)
        right = _levels(words, c + 1, i, g, shared, BITS, COPIES)
        pairs = pairs + ((left & 0xFFFF) | (right & ~0xFFFF),)
    return pairs


@triton.jit
def trellis_kernel(
    x_ptr,
    low_ptr,
    experts_ptr,
    sorted_ptr,
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
    COPIES: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`decode_kernel` of trellis codes, whose streams run down the columns; N must be a multiple of 128.

    A lane takes four columns of the 64 rows of its warp at a time, and of these rows g, g + 8, ...: what it hands to
    the tensor cores are again two pairs of two rows for each tile of 16 rows. The 256 levels are the table.
    """
    m, e, pair = _block(experts_ptr, sorted_ptr, num_pairs, E, ALIGNED, ROUTED, BLOCK_M)
    if e < 0:
        return
    SPLIT: tl.constexpr = WARPS // ROW_WARPS
    ROWS: tl.constexpr = BLOCK_N * ROW_WARPS
    TOKENS8: tl.constexpr = BLOCK_M // 8
    thread = tl.arange(0, 32 * WARPS)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4
    shared = share_tables(words_ptr, 1, 2, 256, COPIES)
    x_address, token_mask = _token_addresses(x_ptr, sorted_ptr, m, g, num_pairs, TOP_K, K, GATED, ALIGNED, TOKENS8)
    n, inside = tile_rows(tl.program_id(0), warp // SPLIT * BLOCK_N, N, GATED, ROWS)
    first = n * BITS // 32
    address = codes_ptr.to(tl.int64) + e * K * ROW_BYTES + tl.zeros([32 * WARPS], tl.int64)
    acc = ()
    for _ in tl.static_range(BLOCK_N // 4 * TOKENS8):
        acc = acc + (tl.zeros([32 * WARPS], tl.float32),)
    column = warp % SPLIT * 16 + 4 * t
    words = _column_words(address, column, inside, first, K, BITS, ROW_BYTES)
    for k0 in tl.range(0, K, 16 * SPLIT, num_stages=1, loop_unroll_factor=2):
        following = _column_words(address, column + k0 + 16 * SPLIT, inside, first, K, BITS, ROW_BYTES)
        x = ()
        for i in tl.static_range(TOKENS8):
            x = x + load_words(x_address[i] + 2 * (column + k0), token_mask[i] & (column + k0 < K), 2, "kept")
        left = _column_pairs(words, 0, g, shared, BITS, COPIES)
        right = _column_pairs(words, 2, g, shared, BITS, COPIES)
        sums = ()
        for tile in tl.static_range(BLOCK_N // 16):
            for i in tl.static_range(TOKENS8):
                c = _four(acc, 4 * (tile * TOKENS8 + i))
                sums = sums + mma(
                    left[2 * tile], left[2 * tile + 1], right[2 * tile], right[2 * tile + 1],
                    x[2 * i], x[2 * i + 1], c[0], c[1], c[2], c[3], BF16,
                )  # fmt: skip
        acc = sums
        words = following
    store_rows(
        _total(acc, ROW_WARPS, SPLIT, BLOCK_N // 16, TOKENS8),
        e,
        pair,
        pair < num_pairs,
        pair // TOP_K if GATED else pair,
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
        ROWS,
        BLOCK_R,
    )
