"""Calls the Triton kernels: block sizes, grids, and which kernel serves which shape. No host synchronisation.

`select_path` is the whole policy. The constants come from the ceilings in README.md, not from a search.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kbvq_kernels import decode_kernels, routing_kernels, tile_kernels
from kbvq_kernels.prepared import PreparedProjection
from kbvq_kernels.reference import ACTIVATIONS

DECODE_REUSE = 1.3
"""Up to this many expected tokens per hit expert, one program per pair reads less than it repeats."""

SCRATCH_TOKENS_PER_EXPERT = 400
"""From here on dequantizing once costs less than looking codewords up once per block of tokens."""

SCRATCH_BYTES = 2 << 30
"""The scratch path is not used when the dequantized bank would take more than this."""

FULL_CARD = 1056
"""Warps that keep a card busy: 8 for each of 132 multiprocessors."""

DECODE_TOKENS_PER_EXPERT = 24
"""Up to this many tokens per expert decode_kernel serves, above grouped_kernel."""

DECODE_TABLES, GROUPED_TABLES = 32768, 8192
"""Bytes of shared memory for copies of the tables. With the 8 or 32 KiB that Triton uses besides, within the 48 KiB
that a program may have unasked: Triton asks for more only when its own part exceeds that."""

LOW_RANK_STEP = 16
"""Columns of the coefficients that are multiplied at a time."""

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
    decodable: bool = True,
) -> str:
    """ "pairs", "blocks", "grouped" or "scratch" for one call, from shapes, format and device alone.

    pairs: decode_kernel, each pair by itself; where both projections are `decodable`, from compute capability 8 on.
    blocks: decode_kernel, pairs aligned on the device to blocks of one expert.
    grouped: the same with grouped_kernel.
    scratch: dequantize_kernel and F.grouped_mm, which is graph safe for bfloat16 on compute capability 9 and up.
    """
    decodable = decodable and compute_capability >= (8, 0)
    if decodable and expected_reuse(num_tokens, top_k, num_experts) <= DECODE_REUSE:
        return "pairs"
    if decodable and num_tokens * top_k <= DECODE_TOKENS_PER_EXPERT * num_experts:
        return "blocks"
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


def format_constants(p: PreparedProjection) -> dict[str, int | bool]:
    """The arguments that every kernel which reads codes takes."""
    return {
        "N": p.out_features,
        "K": p.in_features,
        "D": p.vector_dim,
        "C": p.codebook_size,
        "STAGES": p.num_stages,
        "GROUPS": p.num_groups,
        "TABLES": p.num_tables,
        "PLANE": p.plane,
        "WIDE": p.wide,
        "SIGNED": p.signed,
        "BITS": p.trellis_bits,
        "ROW_BYTES": p.row_bytes,
        "PER_EXPERT": p.table.shape[0] > 1,
        "SCALE": p.scale is not None,
        "RANK": p.rank,
        "FACTOR_SCALE": p.factor_scale is not None,
        "BF16": p.table.dtype == torch.bfloat16,
    }


def _row_terms(p: PreparedProjection, stand_in: Tensor) -> list[Tensor]:
    """What `store_rows` adds to a product."""
    return [_or(t, stand_in) for t in (p.scale, p.bias, p.coefficients, p.factor_scale)]


def _or(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an absent tensor: constexpr flags keep the kernel from reading it."""
    return stand_in if t is None else t


def low_rank(x: Tensor, p: PreparedProjection) -> Tensor:
    """x @ basis.T without the int8 scales, float32 [M, rank]."""
    rows = x.shape[0]
    if rows > LOW_RANK_ROWS:
        return x.float() @ p.basis.float().T
    out = torch.empty(rows, p.rank, dtype=torch.float32, device=x.device)
    bf16 = x.dtype == torch.bfloat16
    block_r = 4
    routing_kernels.low_rank_kernel[(rows, triton.cdiv(p.rank, block_r))](
        x.view(torch.int16) if bf16 else x,
        p.basis,
        out,
        K=p.in_features,
        RANK=p.rank,
        X_BF16=bf16,
        BLOCK_R=block_r,
        BLOCK_K=min(512, power_of_2(p.in_features)),
        num_warps=4,
    )
    return out


def _words(p: PreparedProjection) -> Tensor:
    """What grouped_kernel and dequantize_kernel look up: the levels of a trellis code one by one."""
    return p.words.view(p.table.dtype) if p.trellis_bits else p.words


def decodes(p: PreparedProjection, dtype: torch.dtype) -> bool:
    """If decode_kernel or trellis_kernel serve the projection: rows of x start at multiples of 8 bytes, codewords and
    hidden states are of one 16-bit type; half the rows of a trellis code, where those of `up` begin, fill blocks of 64.
    """
    whole = p.out_features % 128 == 0 or not p.trellis_bits
    return whole and p.in_features % 4 == 0 and p.table.dtype == dtype


def table_copies(p: PreparedProjection, limit: int) -> int:
    """Copies of the tables that a program makes in `limit` bytes of shared memory; 0: it reads them through the L1
    cache. More than one for each lane that a load serves at a time would be of no use. Tables of rq-grouped and of 4096
    codewords have no room for several, and one is no faster there than in the cache."""
    entry = 2 * p.vector_dim
    if p.trellis_bits or p.wide or p.num_groups > 1:
        return 0
    copies = min(limit // (p.num_tables * p.codebook_size * entry), 128 // entry)
    return 1 << copies.bit_length() - 1 if copies > 1 else 0


def decode_blocks(p: PreparedProjection, width: int, num_blocks: int, block_m: int) -> dict[str, int]:
    """Tile of decode_kernel: a warp has BLOCK_N rows and takes LENGTH code words a lane at a time; see there.

    width: rows that the launch covers, a gate and its up row for one. num_blocks: of pairs. BLOCK_N is 64, so that
    more rows share the loads of several tokens' x, where that fills the card; warps split the columns where 32 would
    not. Several stages and several tiles of tokens need registers. The widest loads that leave at most 1/8 of the last
    step idle. Four warps share copies of the tables.
    """
    rows = width * 2 if width < p.out_features else width
    if p.trellis_bits:
        programs = rows // 64 * num_blocks
        split = 2 if programs < FULL_CARD else 1
        return {"BLOCK_N": 64, "WARPS": 4, "ROW_WARPS": 4 // split, "COPIES": 32, "num_warps": 4}
    words = p.plane // 4
    block_n = 16 if p.num_stages > 1 or (p.wide and block_m > 16) else 32
    lengths = (2,) if block_m > 16 or (p.vector_dim == 4 and not p.signed and p.num_stages == 1) else (4, 2)
    if p.num_stages == 1 and 1 < block_m <= 16 and rows // 64 * num_blocks >= FULL_CARD:
        block_n, lengths = 64, (2,)
    programs = rows // block_n * num_blocks
    spread = 4 if programs < FULL_CARD // 2 else 2 if programs < FULL_CARD else 1
    options = [(split, length) for split in (4, 2, 1) if split <= spread for length in lengths]
    fitting = [o for o in options if -(-words // (4 * o[0] * o[1])) * 4 * o[0] * o[1] * 8 <= words * 9]
    split, length = (fitting or [(1, 2)])[0]
    copies = table_copies(p, DECODE_TABLES)
    warps = 4 if copies else split
    tile = {"BLOCK_N": block_n, "WARPS": warps, "ROW_WARPS": warps // split, "LENGTH": length}
    return tile | {"COPIES": copies, "num_warps": warps}


def decode_block_m(tokens_per_expert: float) -> int:
    """Pairs of a block of decode_kernel: room for most experts' tokens when they are spread at random."""
    return 8 if tokens_per_expert <= 4 else 16 if tokens_per_expert <= 10 else 32


def decode(
    x: Tensor,
    experts: Tensor | None,
    sorted_pairs: Tensor | None,
    top_k: int,
    num_pairs: int,
    p: PreparedProjection,
    out: Tensor,
    activation: str | None,
    block_m: int = 8,
) -> None:
    """One projection of all pairs into out; activation: gate and up are fused into act(gate) * up; None: down.

    experts, sorted_pairs: each pair's expert and None (experts None: all to expert 0), or from `align` by block_m.
    """
    gated = activation is not None
    low = low_rank(x, p) if p.rank else x
    c, aligned = p.codes, sorted_pairs is not None
    width = p.out_features // 2 if gated else p.out_features
    num_blocks = experts.numel() if aligned else num_pairs
    tile = decode_blocks(p, width, num_blocks, block_m if aligned else 1)
    rows = tile["BLOCK_N"] * tile["ROW_WARPS"] // (2 if gated else 1)
    kernel = decode_kernels.trellis_kernel if p.trellis_bits else decode_kernels.decode_kernel
    kernel[(triton.cdiv(width, rows), num_blocks)](
        x,
        low,
        _or(experts, x),
        _or(sorted_pairs, x),
        c,
        p.words,
        _or(p.groups, c),
        *_row_terms(p, c),
        out,
        num_pairs,
        TOP_K=top_k,
        E=p.num_experts,
        BIAS=p.bias is not None,
        GATED=gated,
        ALIGNED=aligned,
        ROUTED=experts is not None,
        ACTIVATION=activation or "relu",
        BLOCK_M=block_m,
        BLOCK_R=LOW_RANK_STEP,
        num_stages=1,
        **tile,
        **format_constants(p),
    )


def align(experts: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sorted pairs, expert of each block, end slot of each expert, slot of each pair), int32; see align_kernel."""
    num_pairs = experts.numel()
    max_blocks = num_pairs // block_m + min(num_pairs, num_experts)

    def empty(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int32, device=experts.device)

    sorted_pairs, block_experts = empty(max_blocks * block_m), empty(max_blocks)
    ends, slots = empty(num_experts), empty(num_pairs)
    routing_kernels.align_kernel[(num_experts + 1,)](
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
    # A trellis code takes many registers per weight, and so do groups and three stages before Hopper: a larger tile
    # would spill some.
    many = (p.num_stages > 2 or p.num_groups > 1) and capability(x) < (9, 0)
    block_n = min(64, blocks["BLOCK_N"]) if many else blocks["BLOCK_N"]
    block_k = min(32, blocks["BLOCK_K"]) if p.trellis_bits else blocks["BLOCK_K"]
    rows = block_n // 2 if gated else block_n
    block_v = max(8, min(block_k // p.vector_dim, power_of_2(p.num_vectors)))
    # On Hopper the largest tile takes more than 48 KiB, which makes room for the tables too; float32 leaves none.
    largest = blocks["BLOCK_M"] == block_n == 128 and block_v * p.vector_dim >= 64
    tables = DECODE_TABLES if largest and capability(x)[0] == 9 else GROUPED_TABLES
    tile_kernels.grouped_kernel[(triton.cdiv(width, rows), block_experts.numel())](
        x,
        low,
        sorted_pairs,
        block_experts,
        p.codes,
        _words(p),
        _or(p.groups, x),
        *_row_terms(p, x),
        out,
        num_pairs,
        TOP_K=top_k,
        BIAS=p.bias is not None,
        GATED=gated,
        ACTIVATION=activation or "relu",
        FLOAT32=x.dtype == torch.float32,
        BLACKWELL=capability(x) >= (10, 0),
        COPIES=0 if x.dtype == torch.float32 else table_copies(p, tables),
        BLOCK_M=blocks["BLOCK_M"],
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        BLOCK_R=LOW_RANK_STEP,
        num_warps=blocks["num_warps"],
        num_stages=1,
        **format_constants(p),
    )


def capability(x: Tensor) -> tuple[int, int]:
    """CUDA compute capability of the tensor's device; (0, 0) without one."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def combine(rows: Tensor, slots: Tensor | None, experts: Tensor, weights: Tensor, num_experts: int, y: Tensor) -> None:
    """Fill y [T, N] with the weighted sum of every token's rows; slots: where each pair's row lies, None: in order."""
    num_tokens, top_k = experts.shape
    block_j = power_of_2(top_k)
    block_n = min(max(128, 2048 // block_j), power_of_2(y.shape[1]))
    bf16 = rows.dtype == torch.bfloat16
    routing_kernels.combine_kernel[(triton.cdiv(y.shape[1], block_n), num_tokens)](
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
    block_n, block_v = 32, 128 if p.trellis_bits else 16
    grid = (triton.cdiv(p.out_features, block_n), triton.cdiv(p.num_vectors, block_v), p.num_experts)
    tile_kernels.dequantize_kernel[grid](
        p.codes,
        _words(p),
        _or(p.groups, out),
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


def linear_path(num_tokens: int, compute_capability: tuple[int, int], decodable: bool) -> str:
    """ "pairs", "blocks" or "scratch", as `select_path`, for one projection of one expert; "scratch" ends in F.linear,
    which any dtype and device can do."""
    if not decodable or compute_capability < (8, 0) or not 0 < num_tokens <= DECODE_TOKENS_PER_EXPERT:
        return "scratch"
    return "pairs" if num_tokens == 1 else "blocks"


def linear(x: Tensor, p: PreparedProjection, path: str | None = None) -> Tensor:
    """W x + b of the only expert, [T, N]; path: one of `linear_path`'s, None to let it choose."""
    x = _readable(x)
    num_tokens = x.shape[0]
    if path is None:
        path = linear_path(num_tokens, capability(x), decodes(p, x.dtype))
    if path != "scratch":
        y = torch.empty(num_tokens, p.out_features, dtype=x.dtype, device=x.device)
        if path == "pairs":
            decode(x, None, None, 1, num_tokens, p, y, None)
            return y
        experts = torch.zeros(num_tokens, 1, dtype=torch.int64, device=x.device)
        block_m = decode_block_m(num_tokens)
        sorted_pairs, block_experts, _, _ = align(experts, 1, block_m)
        decode(x, block_experts, sorted_pairs, 1, num_tokens, p, y, None, block_m)
        return y
    weight = torch.empty(1, p.out_features, p.in_features, dtype=x.dtype, device=x.device)
    dequantize(p, weight)
    return F.linear(x, weight[0], None if p.bias is None else p.bias[0].to(x.dtype))


def _readable(x: Tensor) -> Tensor:
    """x in rows one after the other, from an address where the kernels can read 16 bytes."""
    x = x.contiguous()
    return x.clone() if not x.is_meta and x.data_ptr() % 16 else x


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
    x = _readable(x)
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
            all(decodes(p, x.dtype) for p in (gate_up_proj, down_proj)),
        )
    y = torch.empty(num_tokens, down_proj.out_features, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    num_pairs = num_tokens * top_k
    if path != "scratch":
        h = torch.empty(num_pairs, intermediate, dtype=x.dtype, device=x.device)
        rows = torch.empty(num_pairs, down_proj.out_features, dtype=x.dtype, device=x.device)
    if path == "pairs" and experts is None:
        decode(x, None, None, 1, num_pairs, gate_up_proj, h, activation)
        decode(h, None, None, 1, num_pairs, down_proj, y, None)
        return y
    if experts is None:
        experts = torch.zeros(num_tokens, 1, dtype=torch.int64, device=x.device)
        weights = torch.ones(num_tokens, 1, dtype=torch.float32, device=x.device)
    experts, weights = experts.contiguous(), weights.contiguous()
    if path == "pairs":
        decode(x, experts, None, top_k, num_pairs, gate_up_proj, h, activation)
        decode(h, experts, None, 1, num_pairs, down_proj, rows, None)
    elif path == "blocks":
        block_m = decode_block_m(num_pairs / num_experts)
        sorted_pairs, block_experts, _, _ = align(experts, num_experts, block_m)
        decode(x, block_experts, sorted_pairs, top_k, num_pairs, gate_up_proj, h, activation, block_m)
        decode(h, block_experts, sorted_pairs, 1, num_pairs, down_proj, rows, None, block_m)
    elif path == "grouped":
        blocks = grouped_blocks(num_pairs / num_experts)
        sorted_pairs, block_experts, _, _ = align(experts, num_experts, blocks["BLOCK_M"])
        grouped(x, sorted_pairs, block_experts, top_k, num_pairs, gate_up_proj, h, blocks, activation)
        grouped(h, sorted_pairs, block_experts, 1, num_pairs, down_proj, rows, blocks, None)
    if path != "scratch":
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
