"""Calls the Triton kernels: block sizes, grids, and which kernel serves which shape. No host synchronisation.

`select_path` is the whole policy. The constants come from the ceilings in README.md, not from a search.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kbvq_kernels import triton_kernels as kernels
from kbvq_kernels.prepared import PreparedProjection
from kbvq_kernels.reference import ACTIVATIONS

DECODE_REUSE = 1.3
"""Up to this many expected tokens per hit expert, one program per pair reads less than it repeats."""

SCRATCH_TOKENS_PER_EXPERT = 400
"""From here on dequantizing once costs less than looking codewords up once per block of tokens."""

SCRATCH_BYTES = 2 << 30
"""The scratch path is not used when the dequantized bank would take more than this."""

LOW_RANK_ROWS = 64
"""Up to this many rows x @ basis.T runs as one program per row, above as a matrix product."""


def expected_reuse(num_tokens: int, top_k: int, num_experts: int) -> float:
    """Tokens per hit expert when every token picks top_k of num_experts uniformly."""
    hit = num_experts * (1 - (1 - min(top_k, num_experts) / num_experts) ** num_tokens)
    return num_tokens * top_k / hit


def select_path(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    compute_capability: tuple[int, int],
    scratch_bytes: int,
) -> str:
    """"decode", "grouped" or "scratch" for one call, from shapes and device alone.

    decode: gate_up_kernel and down_kernel, one program per pair.
    grouped: grouped_kernel on tensor cores, pairs aligned to blocks on the device.
    scratch: dequantize_kernel and F.grouped_mm, which is graph safe for bfloat16 on compute capability 9 and up.
    """
    if expected_reuse(num_tokens, top_k, num_experts) <= DECODE_REUSE:
        return "decode"
    if (
        num_tokens * top_k >= SCRATCH_TOKENS_PER_EXPERT * num_experts
        and dtype == torch.bfloat16
        and compute_capability >= (9, 0)
        and scratch_bytes <= SCRATCH_BYTES
    ):
        return "scratch"
    return "grouped"


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def decode_block_words(p: PreparedProjection, rows: int) -> int:
    """Code words (of 4 codes) per tile of `rows` rows.

    The largest of 64, 32, 16 that leaves at most 1/8 of the last tile idle and whose codes and codewords fit the
    registers of 4 warps: 16 rows of 64 words of one-stage codes of dimension 4 take about 64 registers each.
    """
    words = p.plane // 4
    most = 1024 // (rows * p.num_stages * max(1, p.vector_dim // 4))
    for block in (64, 32):
        if block <= most and -(-words // block) * block * 8 <= words * 9:
            return block
    return 16


def format_constants(p: PreparedProjection) -> dict[str, int | bool]:
    """The constexpr arguments that every kernel which reads codes takes."""
    return {
        "N": p.out_features,
        "K": p.in_features,
        "D": p.vector_dim,
        "C": p.codebook_size,
        "STAGES": p.num_stages,
        "PLANE": p.plane,
        "WIDE": p.wide,
        "ROW_BYTES": p.row_bytes,
        "PER_EXPERT": p.table.shape[0] > 1,
        "SCALE": p.scale is not None,
        "RANK": p.rank,
        "FACTOR_SCALE": p.factor_scale is not None,
    }


def _words(t: Tensor, vector_dim: int) -> Tensor:
    return t.view(torch.int64 if vector_dim >= 4 else torch.int32)


def _or(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an absent tensor: constexpr flags keep the kernel from reading it."""
    return stand_in if t is None else t


def low_rank(x: Tensor, p: PreparedProjection, planes: bool = False) -> Tensor:
    """x @ basis.T without the int8 scales, float32 [M, rank]; planes: x is in plane order."""
    rows = x.shape[0]
    if rows > LOW_RANK_ROWS and not planes:
        return x.float() @ p.basis.float().T
    out = torch.empty(rows, p.rank, dtype=torch.float32, device=x.device)
    bf16 = x.dtype == torch.bfloat16
    block_r = 4
    kernels.low_rank_kernel[(rows, triton.cdiv(p.rank, block_r))](
        x.view(torch.int16) if bf16 else x,
        p.basis,
        out,
        K=p.in_features,
        RANK=p.rank,
        X_STRIDE=x.shape[1],
        X_BF16=bf16,
        X_PLANES=planes,
        PLANE=p.plane,
        D=p.vector_dim,
        BLOCK_R=block_r,
        BLOCK_K=min(512, power_of_2(p.in_features)),
        num_warps=4,
    )
    return out


def _decode_arguments(x: Tensor, p: PreparedProjection, rows: int) -> tuple[list[Tensor], dict]:
    """Pointers (codes .. factor_scale) and constants shared by the two decode kernels; rows: of a tile."""
    c = p.codes
    pointers = [
        c.view(torch.int32),
        c.view(torch.int16),
        p.words,
        _or(p.scale, c),
        _or(p.bias, c),
        _or(p.coefficients, c),
        _or(p.factor_scale, c),
    ]
    constants = format_constants(p) | {
        "BIAS": p.bias is not None,
        "TABLE_BF16": p.table.dtype == torch.bfloat16,
        "X_BITS": 32 if x.dtype == torch.float32 else 16,
        "X_BF16": x.dtype == torch.bfloat16,
        "BLOCK_W": decode_block_words(p, rows),
        "BLOCK_R": power_of_2(p.rank),
        "num_warps": 4,
    }
    return pointers, constants


def gate_up(
    x: Tensor,
    experts: Tensor | None,
    top_k: int,
    p: PreparedProjection,
    h: Tensor,
    down: PreparedProjection,
    activation: str,
) -> None:
    """Fill h [T * top_k, down.plane * down.vector_dim], in plane order, with act(gate) * up of every pair."""
    low = low_rank(x, p) if p.rank else x
    block_n = 8
    pointers, constants = _decode_arguments(x, p, 2 * block_n)
    kernels.gate_up_kernel[(triton.cdiv(p.out_features // 2, block_n), x.shape[0] * top_k)](
        x if x.dtype == torch.float32 else _words(x, p.vector_dim),
        low,
        _or(experts, x),
        *pointers,
        h,
        TOP_K=top_k,
        E=p.num_experts,
        H_PLANE=down.plane,
        H_D=down.vector_dim,
        ROUTED=experts is not None,
        ACTIVATION=activation,
        BLOCK_N=block_n,
        **constants,
    )


def down(
    h: Tensor, experts: Tensor | None, weights: Tensor | None, top_k: int, p: PreparedProjection, y: Tensor
) -> None:
    """Fill y [T, N] with the weighted sum over each token's experts; h as `gate_up` leaves it."""
    low = low_rank(h, p, planes=True) if p.rank else h
    block_j = power_of_2(top_k)
    block_n = max(1, 32 // block_j)
    pointers, constants = _decode_arguments(h, p, block_n * block_j)
    kernels.down_kernel[(triton.cdiv(p.out_features, block_n), y.shape[0])](
        h if h.dtype == torch.float32 else _words(h, p.vector_dim),
        low,
        _or(experts, h),
        _or(weights, h),
        *pointers,
        y,
        TOP_K=top_k,
        E=p.num_experts,
        ROUTED=experts is not None,
        BLOCK_J=block_j,
        BLOCK_N=block_n,
        **constants,
    )


def align(experts: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sorted pairs, expert of each block, end slot of each expert, slot of each pair), int32; see align_kernel."""
    num_pairs = experts.numel()
    max_blocks = num_pairs // block_m + min(num_pairs, num_experts)

    def empty(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int32, device=experts.device)

    sorted_pairs, block_experts = empty(max_blocks * block_m), empty(max_blocks)
    ends, slots = empty(num_experts), empty(num_pairs)
    kernels.align_kernel[(num_experts + 1,)](
        experts,
        sorted_pairs,
        block_experts,
        ends,
        slots,
        num_pairs,
        max_blocks,
        E=num_experts,
        BINS=max(32, power_of_2(num_experts + 1)),
        BLOCK_M=block_m,
        BLOCK_P=min(4096, max(128, power_of_2(num_pairs))),
        num_warps=4 if num_pairs <= 1024 else 8,
    )
    return sorted_pairs, block_experts, ends, slots


def grouped_blocks(tokens_per_expert: float) -> dict[str, int]:
    """Tile of grouped_kernel: BLOCK_M tokens by BLOCK_N rows of codes, BLOCK_K columns at a time."""
    if tokens_per_expert <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4}
    if tokens_per_expert <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}


def grouped(
    x: Tensor,
    sorted_pairs: Tensor,
    block_experts: Tensor,
    top_k: int,
    num_pairs: int,
    p: PreparedProjection,
    out: Tensor,
    blocks: dict[str, int],
    activation: str | None,
) -> None:
    """One projection of all pairs into out; activation: gate and up are fused into act(gate) * up; None: down."""
    gated = activation is not None
    low = low_rank(x, p) if p.rank else x
    width = p.out_features // 2 if gated else p.out_features
    rows = blocks["BLOCK_N"] // 2 if gated else blocks["BLOCK_N"]
    kernels.grouped_kernel[(triton.cdiv(width, rows), block_experts.numel())](
        x,
        low,
        sorted_pairs,
        block_experts,
        p.codes,
        p.table,
        _or(p.scale, x),
        _or(p.bias, x),
        _or(p.coefficients, x),
        _or(p.factor_scale, x),
        out,
        num_pairs,
        TOP_K=top_k,
        BIAS=p.bias is not None,
        GATED=gated,
        ACTIVATION=activation or "relu",
        FLOAT32=x.dtype == torch.float32 or _interpreted(),
        BLACKWELL=capability(x) >= (10, 0),
        BLOCK_M=blocks["BLOCK_M"],
        BLOCK_N=blocks["BLOCK_N"],
        BLOCK_V=max(8, min(blocks["BLOCK_K"] // p.vector_dim, power_of_2(p.plane))),
        BLOCK_R=max(16, power_of_2(p.rank)),
        num_warps=blocks["num_warps"],
        num_stages=1,
        **format_constants(p),
    )


def capability(x: Tensor) -> tuple[int, int]:
    """CUDA compute capability of the tensor's device; (0, 0) without one, as in the interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def _interpreted() -> bool:
    """The Triton interpreter computes bfloat16 products wrongly: there everything runs in float32."""
    return not isinstance(kernels.grouped_kernel, triton.JITFunction)


def combine(
    rows: Tensor, slots: Tensor | None, experts: Tensor, weights: Tensor, num_experts: int, y: Tensor
) -> None:
    """Fill y [T, N] with the weighted sum of every token's rows; slots: where each pair's row lies, None: in order."""
    num_tokens, top_k = experts.shape
    block_j = power_of_2(top_k)
    block_n = min(max(128, 2048 // block_j), power_of_2(y.shape[1]))
    bf16 = rows.dtype == torch.bfloat16
    kernels.combine_kernel[(triton.cdiv(y.shape[1], block_n), num_tokens)](
        rows.view(torch.int16) if bf16 else rows,
        _or(slots, experts),
        experts,
        weights,
        y,
        TOP_K=top_k,
        E=num_experts,
        N=y.shape[1],
        SORTED=slots is not None,
        ROWS_BF16=bf16,
        BLOCK_J=block_j,
        BLOCK_N=block_n,
        num_warps=4,
    )


def dequantize(p: PreparedProjection, out: Tensor) -> None:
    """Fill out [E, N, K], any float dtype, with the stored weights."""
    block_n, block_v = 32, 16
    grid = (triton.cdiv(p.out_features, block_n), triton.cdiv(p.num_vectors, block_v), p.num_experts)
    kernels.dequantize_kernel[grid](
        p.codes,
        p.table,
        _or(p.scale, out),
        _or(p.basis, out),
        _or(p.coefficients, out),
        _or(p.factor_scale, out),
        out,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        BLOCK_R=max(16, power_of_2(p.rank)),
        num_warps=4,
        **format_constants(p),
    )


def _scratch_product(x: Tensor, p: PreparedProjection, ends: Tensor, experts: Tensor) -> Tensor:
    """x [slots, K] @ dequantized weights, by expert; experts [slots]: for the bias."""
    weight = torch.empty(p.num_experts, p.out_features, p.in_features, dtype=x.dtype, device=x.device)
    dequantize(p, weight)
    out = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return out if p.bias is None else out + p.bias[experts]


def moe_forward(
    x: Tensor,
    experts: Tensor | None,
    weights: Tensor | None,
    gate_up_proj: PreparedProjection,
    down_proj: PreparedProjection,
    activation: str,
    path: str | None = None,
) -> Tensor:
    """The mixture [T, H]; path: one of `select_path`'s, None to let it choose."""
    x = x.contiguous()
    num_tokens = x.shape[0]
    top_k = 1 if experts is None else experts.shape[1]
    num_experts, intermediate = gate_up_proj.num_experts, down_proj.in_features
    if path is None:
        larger = max(p.out_features * p.in_features for p in (gate_up_proj, down_proj))
        path = select_path(
            num_tokens,
            top_k,
            num_experts,
            x.dtype,
            capability(x),
            num_experts * larger * x.element_size(),
        )
    y = torch.empty(num_tokens, down_proj.out_features, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    if path == "decode":
        if experts is not None:
            experts, weights = experts.contiguous(), weights.contiguous()
        h = torch.empty(num_tokens * top_k, down_proj.plane * down_proj.vector_dim, dtype=x.dtype, device=x.device)
        gate_up(x, experts, top_k, gate_up_proj, h, down_proj, activation)
        down(h, experts, weights, top_k, down_proj, y)
        return y
    if experts is None:
        experts = torch.zeros(num_tokens, 1, dtype=torch.int64, device=x.device)
        weights = torch.ones(num_tokens, 1, dtype=torch.float32, device=x.device)
    experts, weights = experts.contiguous(), weights.contiguous()
    num_pairs = experts.numel()
    if path == "grouped":
        blocks = grouped_blocks(num_pairs / num_experts)
        sorted_pairs, block_experts, _, _ = align(experts, num_experts, blocks["BLOCK_M"])
        h = torch.empty(num_pairs, intermediate, dtype=x.dtype, device=x.device)
        rows = torch.empty(num_pairs, down_proj.out_features, dtype=x.dtype, device=x.device)
        grouped(x, sorted_pairs, block_experts, top_k, num_pairs, gate_up_proj, h, blocks, activation)
        grouped(h, sorted_pairs, block_experts, 1, num_pairs, down_proj, rows, blocks, None)
        combine(rows, None, experts, weights, num_experts, y)
        return y
    sorted_pairs, block_experts, ends, slots = align(experts, num_experts, 1)
    # Slots without a pair, at the end, compute on some token and are never combined.
    token = sorted_pairs[:num_pairs].clamp_max(num_pairs - 1) // top_k
    expert = block_experts[:num_pairs].clamp_min(0)
    gate, up = _scratch_product(x[token], gate_up_proj, ends, expert).chunk(2, -1)
    rows = _scratch_product((ACTIVATIONS[activation](gate) * up).to(x.dtype), down_proj, ends, expert)
    combine(rows.to(x.dtype), slots, experts, weights, num_experts, y)
    return y
