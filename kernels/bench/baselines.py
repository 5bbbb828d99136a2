"""What the packed kernels are measured against on a GPU, besides F.grouped_mm: per-pair GEMV in bfloat16 and int4."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbvq_kernels.ptx import share_tables, shared_words

INT4_GROUP = 128


@triton.jit
def gemv_kernel(
    x_ptr, experts_ptr, w_ptr, y_ptr, X_DIV: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[p] = W_e x[p / X_DIV] for the pair's expert e; grid (N / BLOCK_N, P)."""
    p = tl.program_id(1)
    e = tl.load(experts_ptr + p).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + (e * N + n)[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += w * tl.load(x_ptr + p // X_DIV * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + p * N + n, tl.sum(acc, 1).to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int4_gemv_kernel(
    x_ptr, experts_ptr, w_ptr, scale_ptr, y_ptr, X_DIV: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """As gemv_kernel with symmetric 4-bit weights: int32 words [E, N, K / 8], float16 scales [E, N, K / GROUP]."""
    p = tl.program_id(1)
    e = tl.load(experts_ptr + p).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for w0 in range(0, K // 8, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        mask = (n < N)[:, None] & (w < K // 8)[None, :]
        words = tl.load(w_ptr + (e * N + n)[:, None] * (K // 8) + w[None, :], mask=mask, other=0)
        group = (w * 8 // GROUP)[None, :]
        scale = tl.load(scale_ptr + (e * N + n)[:, None] * (K // GROUP) + group, mask=mask, other=0.0).to(tl.float32)
        part = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for i in tl.static_range(8):
            x = tl.load(x_ptr + p // X_DIV * K + 8 * w + i, mask=w < K // 8, other=0.0).to(tl.float32)
            part += (((words >> (4 * i)) & 15) - 8).to(tl.float32) * x[None, :]
        acc += part * scale
    tl.store(y_ptr + p * N + n, tl.sum(acc, 1).to(y_ptr.dtype.element_ty), mask=n < N)


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows.view(*weights.shape, -1) * weights[..., None]).sum(1).to(rows.dtype)


def _gated(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gemv(x: Tensor, experts: Tensor, weight: Tensor, x_div: int) -> Tensor:
    """[P, N] in x's dtype; weight [E, N, K]."""
    _, rows, columns = weight.shape
    y = torch.empty(experts.numel(), rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, 8), experts.numel())
    gemv_kernel[grid](x, experts, weight, y, X_DIV=x_div, N=rows, K=columns, BLOCK_N=8, BLOCK_K=256)
    return y


def gemv_moe(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The fair bfloat16 baseline for few tokens: reads each pair's weights once, in two launches."""
    h = _gated(gemv(x, index, gate_up, index.shape[1]))
    return _combine(gemv(h, index, down, 1), weights)


def random_int4(num_experts: int, rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """(int32 words, float16 scales) of random weights of order columns^-1/2."""
    words = torch.randint(-(2**31), 2**31 - 1, (num_experts, rows, columns // 8), dtype=torch.int32, device=device)
    scale = torch.full((num_experts, rows, columns // INT4_GROUP), 0.2 * columns**-0.5, device=device)
    return words, scale.half()


def int4_gemv(x: Tensor, experts: Tensor, weight: tuple[Tensor, Tensor], x_div: int) -> Tensor:
    """[P, N] in x's dtype."""
    words, scale = weight
    rows, columns = words.shape[1], words.shape[2] * 8
    y = torch.empty(experts.numel(), rows, dtype=x.dtype, device=x.device)
    int4_gemv_kernel[(triton.cdiv(rows, 16), experts.numel())](
        x, experts, words, scale, y, X_DIV=x_div, N=rows, K=columns, GROUP=INT4_GROUP, BLOCK_N=16, BLOCK_W=32
    )
    return y


def int4_moe(x: Tensor, index: Tensor, weights: Tensor, gate_up, down) -> Tensor:
    """A simple int4 kernel with groups of 128: what 4 bits cost without codebooks."""
    h = _gated(int4_gemv(x, index, gate_up, index.shape[1]))
    return _combine(int4_gemv(h, index, down, 1), weights)


@triton.jit
def lookup_kernel(
    table_ptr, out_ptr, ENTRIES: tl.constexpr, WORDS: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr
):
    """REPEAT pseudo-random lookups of WORDS adjacent words per lane; the sum keeps them from being removed."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = lane * 747796405 + 12345
    acc = tl.load(table_ptr + lane * 0)
    for _ in range(REPEAT):
        code = code * 1664525 + 1013904223
        entry = (code >> 13) & (ENTRIES - 1)
        for word in tl.static_range(WORDS):
            acc += tl.load(table_ptr + entry * WORDS + word, eviction_policy="evict_last")
    tl.store(out_ptr + lane, acc)


@triton.jit
def shared_lookup_kernel(
    words_ptr, out_ptr, D: tl.constexpr, COPIES: tl.constexpr, REPEAT: tl.constexpr, BLOCK: tl.constexpr
):
    """The same of codewords of D values in COPIES copies of a table of 256 in shared memory."""
    shared = share_tables(words_ptr, 1, D, 256, COPIES)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = lane * 747796405 + 12345
    acc = lane.to(tl.int64)
    for _ in range(REPEAT):
        code = code * 1664525 + 1013904223
        word0, word1 = shared_words(shared, (code >> 13) & 255, D, COPIES)
        acc += word0 ^ word1 if D == 8 else word0
    tl.store(out_ptr + lane, acc)
