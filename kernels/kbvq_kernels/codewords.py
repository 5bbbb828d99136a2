"""From codes to pairs of weights: what every kernel that reads codes has in common.

Shapes are constexpr: a model has a handful of them, and constant trip counts and strides spare instructions.

Names: N rows (out_features), K columns (in_features), E experts, P = T * k token-expert pairs.
A row of codes has STAGES planes of PLANE low bytes, each followed, when WIDE, by PLANE / 2 bytes of nibbles, and last,
when SIGNED, a bit per weight. A *word* is an int64 of a codeword's values (an int32 when there are only two); a
codeword is WORDS of them. Tables of words are [.., TABLES, WORDS, C]: equal words of all codewords lie together, so
that a load of one word meets every memory bank. A *pair* is two adjacent weights of a codeword as 16-bit floats.

Where FLOAT32 is set values are widened before any arithmetic, for products in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbvq_kernels.ptx import shared_words

_SIGNS = tl.constexpr(-2147450880)  # 0x80008000: the sign bits of a pair


@triton.jit
def halves(pair, BF16: tl.constexpr, FLOAT32: tl.constexpr):
    """The two 16-bit floats of an int32."""
    HALF: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low = pair.to(tl.int16).to(HALF, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    if FLOAT32:
        low, high = low.to(tl.float32), high.to(tl.float32)
    return low, high


@triton.jit
def signed_pair(a, b, signs, i: tl.constexpr, SIGNED: tl.constexpr):
    """Weights 2 i and 2 i + 1 of codewords, an int32; a, b: their words; signs: spread by `spread_signs`."""
    word = b if i >= 2 else a
    if i % 2 == 1:
        pair = (word >> 32).to(tl.int32)
    else:
        pair = word.to(tl.int32)
    if SIGNED:
        pair = pair ^ ((signs << (15 - 2 * i)) & _SIGNS)
    return pair


@triton.jit
def spread_signs(signs):
    """Sign bits 2 i at 2 i, sign bits 2 i + 1 at 2 i + 16: one shift then puts those of a pair in their places."""
    return signs | (signs << 15)


@triton.jit
def expert_tables(
    words_ptr, groups_ptr, e, D: tl.constexpr, C: tl.constexpr, TABLES: tl.constexpr, PER_EXPERT: tl.constexpr
):
    """Where the tables and groups of expert e start."""
    if PER_EXPERT:
        words_ptr += e * (TABLES * C * (2 if D == 8 else 1))
        groups_ptr += e * C
    return words_ptr, groups_ptr


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
def codeword_words(
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
def trellis_level(window, BITS: tl.constexpr):
    """The level, 0 to 255, of the trellis state in the low 12 bits of int32."""
    MULTIPLIER: tl.constexpr = (
        -1917548997 if BITS == 1 else -1018351313 if BITS == 2 else -524750729 if BITS == 3 else 1339978321
    )
    return (((window & 4095) * MULTIPLIER) >> 24) & 255
