"""What is done by token before and after the products: the low-rank inputs, pairs sorted by expert, weighted sums."""

from __future__ import annotations

import triton
import triton.language as tl


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
