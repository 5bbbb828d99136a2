"""The Triton kernels. README.md derives them; `launch.py` chooses block sizes and calls them.

Shapes are constexpr: a model has a handful of them, and constant trip counts and strides spare instructions.

Names: N rows (out_features), K columns (in_features), E experts, P = T * k token-expert pairs.
A row of codes has STAGES planes of PLANE low bytes, each followed, when WIDE, by PLANE / 2 bytes of nibbles, and last,
when SIGNED, a bit per weight. A *word* is an int64 of a codeword's values (an int32 when there are only two); a
codeword is WORDS of them. Tables of words are [.., TABLES, WORDS, C]: equal words of all codewords lie together, so
that a load of one word meets every memory bank. A *pair* is two adjacent weights of a codeword as 16-bit floats.

COPIES > 0: a program first writes that many copies of the tables to shared memory, side by side, so that each lane of a
load has banks of its own and no two lanes wait for each other. Triton has no lookup in shared memory that keeps its
table, so the three accesses are PTX: `_ALLOCATE`, `_STORE` and `_LOOKUP`, at 32-bit addresses.

Where FLOAT32 is set values are widened before any arithmetic: the Triton interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbvq_kernels.ptx import add_pairs, funnel, load_words, mma, share_tables, shared_words

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
def _pair(a, b, signs, i: tl.constexpr, SIGNED: tl.constexpr):
    """Weights 2 i and 2 i + 1 of codewords, an int32; a, b: their words; signs: spread by `_spread`."""
    word = b if i >= 2 else a
    if i % 2 == 1:
        pair = (word >> 32).to(tl.int32)
    else:
        pair = word.to(tl.int32)
    if SIGNED:
        pair = pair ^ ((signs << (15 - 2 * i)) & _SIGNS)
    return pair


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
    shared,
    first,
    code,
    stage: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The words of codewords of one stage: two where codewords of 8 have two, else the one word twice."""
    WORDS: tl.constexpr = 2 if D == 8 else 1
    if COPIES > 0:
        word0, word1 = shared_words(shared + stage * (C * COPIES * 2 * D), code, D, COPIES)
    else:
        word0 = _lookup(words_ptr, groups_ptr, first, code, stage, 0, C, WORDS, GROUPS)
        word1 = word0
        if WORDS == 2:
            word1 = _lookup(words_ptr, groups_ptr, first, code, stage, 1, C, WORDS, GROUPS)
    return word0, word1


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
    a0, b0 = _both_words(words_ptr, groups_ptr, shared, code0, code0, 0, D, C, GROUPS, COPIES)
    a1, b1, a2, b2 = a0, b0, a0, b0
    if STAGES > 1:
        a1, b1 = _both_words(words_ptr, groups_ptr, shared, code0, code1, 1, D, C, GROUPS, COPIES)
    if STAGES > 2:
        a2, b2 = _both_words(words_ptr, groups_ptr, shared, code0, code2, 2, D, C, GROUPS, COPIES)
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
    low, high = _halves(_pair(a0, b0, signs, i, SIGNED), BF16, FLOAT32)
    if STAGES > 1:
        more_low, more_high = _halves(_pair(a1, b1, signs, i, False), BF16, FLOAT32)
        low, high = low + more_low, high + more_high
    if STAGES > 2:
        more_low, more_high = _halves(_pair(a2, b2, signs, i, False), BF16, FLOAT32)
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
        # In steps, for little shared memory whatever the rank: the tables may have most of what needs no permission.
        for q0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
            q = q0 + tl.arange(0, BLOCK_R)
            factor_mask = mask[:, None] & (q < RANK)[None, :]
            factor = tl.load(coefficients_ptr + row[:, None] * RANK + q[None, :], mask=factor_mask, other=0).to(
                tl.float32
            )
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
        signs = _spread((words[start + EACH + j] >> (8 * byte)) & 255)
    if SIGNED and D == 4:
        signs = _spread((words[start + EACH + j // 2] >> (16 * (j % 2) + 4 * byte)) & 15)
    a, b = _both_words(words_ptr, groups_ptr, shared, code0, code0, 0, D, C, GROUPS, COPIES)
    pairs = ()
    for i in tl.static_range(D // 2):
        pairs = pairs + (_pair(a, b, signs, i, SIGNED),)
    for stage in tl.static_range(1, STAGES):
        code = _code(words, start + stage * EACH, j, byte, WIDE, LENGTH)
        a, b = _both_words(words_ptr, groups_ptr, shared, code0, code, stage, D, C, GROUPS, COPIES)
        sums = ()
        for i in tl.static_range(D // 2):
            sums = sums + (add_pairs(pairs[i], _pair(a, b, signs, i, False), BF16),)
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

    if PER_EXPERT:
        words_ptr += e * (TABLES * C * (2 if D == 8 else 1))
        groups_ptr += e * C
    shared = share_tables(words_ptr, TABLES, D, C, COPIES)

    row_address, row_mask = (), ()
    for r in tl.static_range(BLOCK_N // 8):
        n, mask = _rows(tl.program_id(0), warp // SPLIT * BLOCK_N + r * 8 + g, N, GATED, ROWS)
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

    _finish(
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
    MULTIPLIER: tl.constexpr = (
        -1917548997 if BITS == 1 else -1018351313 if BITS == 2 else -524750729 if BITS == 3 else 1339978321
    )
    # Its window of 12 bits begins at bit 8 i BITS + g BITS: in the 32 bits from bit g BITS on of the word with bit
    # 8 i BITS, but where that is the word's last byte, eight bits further on.
    AT: tl.constexpr = c * (2 * BITS + 1) + 8 * i * BITS // 32
    LATE: tl.constexpr = 8 if 8 * i * BITS % 32 == 24 else 0
    window = funnel(words[AT], words[AT + 1], g * BITS + LATE) >> (8 * i * BITS % 32 - LATE)
    level = (((window & 4095) * MULTIPLIER) >> 24) & 255
    word, _ = shared_words(shared, level, 2, COPIES)
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
    n, inside = _rows(tl.program_id(0), warp // SPLIT * BLOCK_N, N, GATED, ROWS)
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
    _finish(
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
            signs = _spread(_codes(codes_ptr, row, row_mask, 1, v0, PLANE, False, R, BLOCK_V))
        if SIGNED and D == 4:
            signs = _spread(_nibbles(codes_ptr, row, row_mask, PLANE, v0, PLANE, R, BLOCK_V))
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
    if PER_EXPERT:
        words_ptr += e * (TABLES * C * (2 if D == 8 else 1))
        groups_ptr += e * C
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
    n, row_mask = _rows(tl.program_id(0), tl.arange(0, BLOCK_N), N, GATED, BLOCK_N)
    if PER_EXPERT:
        words_ptr += e * (TABLES * C * (2 if D == 8 else 1))
        groups_ptr += e * C
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
