"""What follows the products: low-rank part, scale, bias, activation and the place of each row."""

from __future__ import annotations

import triton
import triton.language as tl


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
def tile_rows(block, r, N: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
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
def row_factors(coefficients_ptr, factor_scale_ptr, e, row, mask, q, RANK: tl.constexpr, FACTOR_SCALE: tl.constexpr):
    """Columns q of the low-rank coefficients of rows, with their scales, float32 [rows, q]; zeros beyond the rank."""
    inside = mask[:, None] & (q < RANK)[None, :]
    factor = tl.load(coefficients_ptr + row[:, None] * RANK + q[None, :], mask=inside, other=0).to(tl.float32)
    if FACTOR_SCALE:
        factor = factor * tl.load(factor_scale_ptr + e * RANK + q, mask=q < RANK, other=0.0)[None, :]
    return factor


@triton.jit
def store_rows(
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
    n, mask = tile_rows(block, tl.arange(0, BLOCK_N), N, GATED, BLOCK_N)
    row = e * N + n
    if RANK > 0:
        # In steps, for little shared memory whatever the rank: the tables may have most of what needs no permission.
        for q0 in tl.range(0, RANK, BLOCK_R, num_stages=1):
            q = q0 + tl.arange(0, BLOCK_R)
            factor = row_factors(coefficients_ptr, factor_scale_ptr, e, row, mask, q, RANK, FACTOR_SCALE)
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
