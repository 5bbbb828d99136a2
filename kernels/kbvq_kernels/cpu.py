"""The ops on the CPU: compiled decoding where there is a C++ compiler, torch's embedding lookup otherwise.

Both give the same numbers up to float32 rounding, with one exception: 16-bit hidden states that meet int8 codewords or
a trellis code are multiplied in integers, for which they are rounded to 8 bits (integer_panel.h). Which one runs is
logged once, by name.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq_kernels.build import compiled_library
from kbvq_kernels.prepared import PreparedProjection
from kbvq_kernels.reference import (
    ACTIVATIONS,
    TRELLIS_MULTIPLIERS,
    TRELLIS_STATE_BITS,
    trellis_codewords,
    trellis_levels,
    trellis_states,
    weight_signs,
)

DECODE_TOKENS = 16
"""Up to this many tokens of one expert are multiplied while decoding where that is not in integers (`most_tokens`);
above, its rows are decoded once for F.linear."""

PAIRS_AT_ONCE = 1024
"""Tokens of experts that are multiplied by one call: bounds the memory of what lies between."""

MAX_ROUNDING = 0.01
"""Levels of a trellis code are rounded to 8 bits where that costs at most so much of the code's own squared error, else
to 16."""

TRELLIS_ERRORS = {1: 0.285, 2: 0.0693, 3: 0.0180, 4: 0.0048}
"""Bits -> squared error of a trellis code on Gaussian weights of variance 1."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled decoder; None, and a warning, when there is none."""
    return compiled_library("cpu_decode", task="experts decode", otherwise="torch.embedding")


def _address(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _longs(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(v) for v in values]


def _format(p: PreparedProjection) -> tuple[int, ...]:
    codes = p.plane, p.row_bytes, p.vector_dim, p.codebook_size, p.num_stages, p.num_groups, p.signed
    return p.out_features, p.num_vectors, *codes


def _unpack_codes(p: PreparedProjection, expert: int) -> list[Tensor]:
    """Codes of each stage, int32 [N, V]."""
    size = p.plane * 3 // 2 if p.wide else p.plane
    stages = []
    for stage in range(p.num_stages):
        planes = p.codes[expert, :, stage * size : (stage + 1) * size]
        code = planes[:, : p.plane].int()
        if p.wide:
            nibbles = planes[:, p.plane :].int()
            code = code | torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2) << 8
        stages.append(code[:, : p.num_vectors])
    return stages


@functools.cache
def _byte_signs() -> Tensor:
    """The eight signs that each byte of a sign plane stands for, float32 [256, 8]."""
    return weight_signs(torch.arange(256, dtype=torch.uint8)[:, None]).float()


@functools.cache
def _byte_values(bits: int, tail: int) -> Tensor:
    """What the codes of one byte decode to, for each value of it and of the bits after it that they depend on.

    float32 [2^(8 + 12 - bits), 8 / bits]; bits 1, 2 or 4.
    """
    windows = torch.arange(1 << 8 + TRELLIS_STATE_BITS - bits)
    states = torch.stack([windows >> shift for shift in range(0, 8, bits)], -1) & (1 << TRELLIS_STATE_BITS) - 1
    return trellis_codewords(bits, tail).float()[states]


@functools.cache
def _bfloat16_levels(tail: int) -> Tensor:
    return trellis_levels(tail).to(torch.bfloat16)


@functools.cache
def _integer_levels(bits: int, tail: int) -> tuple[Tensor, Tensor | None, float]:
    """(magnitudes uint8 [128], rests int8 [128] or None, unit): the lower half of the levels is
    -unit (magnitudes + rests / 254)."""
    lower = -trellis_levels(tail)[:128].double()
    unit = lower.max().item() / 127
    magnitudes = (lower / unit).round()
    if unit**2 / 12 <= MAX_ROUNDING * TRELLIS_ERRORS[bits]:
        return magnitudes.to(torch.uint8), None, unit
    return magnitudes.to(torch.uint8), ((lower / unit - magnitudes) * 254).round().to(torch.int8), unit


def _decode_trellis(p: PreparedProjection, codes: Tensor) -> Tensor:
    """Values of streams uint8 [K, bytes] in torch, float32 [K, N]: one lookup a byte, at 3 bits one a weight."""
    if p.trellis_bits == 3:
        return F.embedding(trellis_states(codes, 3), p.table.view(-1, 1))[..., 0]
    stream = torch.cat([codes, codes[:, :2]], 1).int()  # a byte's last code ends within the next two
    length = codes.shape[1]
    window = stream[:, :length] | stream[:, 1 : length + 1] << 8 | stream[:, 2 : length + 2] << 16
    window &= (1 << 8 + TRELLIS_STATE_BITS - p.trellis_bits) - 1
    return F.embedding(window, _byte_values(p.trellis_bits, p.tail)).flatten(-2)


def _check(failed: int) -> None:
    if failed:
        raise ValueError("a codeword belongs to a group that has no table; the packed tensors are damaged")


def _weight_buffer(p: PreparedProjection, dtype: torch.dtype) -> Tensor:
    """Room for the weights of one expert, in the order in which they are decoded."""
    shape = (p.in_features, p.out_features) if p.trellis_bits else (p.out_features, p.in_features)
    return torch.empty(shape, dtype=dtype)


def decode_expert(p: PreparedProjection, expert: int, buffer: Tensor | None = None) -> Tensor:
    """decode(codes_e), [N, K]; of a trellis code a transposed view.

    buffer: from `_weight_buffer`, float32 or bfloat16, filled where a compiler serves; None: new memory, float32.
    """
    book = min(expert, p.table.shape[0] - 1)
    codes, table = p.codes[expert], p.table[book]
    groups = None if p.groups is None else p.groups[book]
    compiled = library()
    out = _weight_buffer(p, torch.float32) if buffer is None else buffer
    kind, threads = int(out.dtype == torch.bfloat16), torch.get_num_threads()
    if p.trellis_bits:
        if compiled is None:
            return _decode_trellis(p, codes).T.to(out.dtype)
        pointers = (_address(t) for t in (codes, p.words, _bfloat16_levels(p.tail), out))
        multiplier = ctypes.c_uint32(TRELLIS_MULTIPLIERS[p.trellis_bits])
        sizes = _longs(kind, p.out_features, p.in_features, p.trellis_bits, threads)
        compiled.kbvq_trellis_decode(*pointers, multiplier, *sizes)
        return out.T
    if compiled is not None:
        pointers = (_address(t) for t in (codes, table, groups, out))
        _check(compiled.kbvq_decode(*pointers, *_longs(kind, *_format(p), threads)))
        return out
    stages = _unpack_codes(p, expert)
    weight = F.embedding(stages[0], table[0]).flatten(-2)
    if p.signed:
        signs = codes[:, p.plane : p.plane + p.in_features // 8].int()
        return weight.mul_(F.embedding(signs, _byte_signs()).flatten(-2)).to(out.dtype)
    first = 0 if groups is None else groups.int()[stages[0]] * p.codebook_size
    for stage, code in enumerate(stages[1:]):
        tables = table[1 + stage * p.num_groups : 1 + (stage + 1) * p.num_groups].flatten(0, 1)
        weight.add_(F.embedding(first + code, tables).flatten(-2))
    return weight.to(out.dtype)


def dequantize_expert(p: PreparedProjection, expert: int) -> Tensor:
    """Stored weight of one expert, float32 [N, K]."""
    weight = decode_expert(p, expert)
    if p.rank:
        coefficients = p.coefficients[expert].float()
        if p.factor_scale is not None:
            coefficients = coefficients * p.factor_scale[expert]
        weight.addmm_(coefficients, p.basis.float())
    if p.scale is not None:
        weight.mul_(p.scale[expert].float()[:, None])
    return weight


def dequantize(p: PreparedProjection, dtype: torch.dtype) -> Tensor:
    """Stored weights [E, N, K]."""
    return torch.stack([dequantize_expert(p, e).to(dtype) for e in range(p.num_experts)])


def _integer_products(x: Tensor, rows: Tensor, experts: Tensor, p: PreparedProjection, out: Tensor) -> None:
    """The codes' part of `_decode_products` into out, x rounded to 8 bits; int8 codewords or a trellis code."""
    sizes = len(x), len(out), p.out_features
    if p.trellis_bits:
        magnitudes, rests, unit = _integer_levels(p.trellis_bits, p.tail)
        pointers = (_address(t) for t in (p.codes, magnitudes, rests, x, rows, experts, out))
        code = ctypes.c_float(unit), ctypes.c_uint32(TRELLIS_MULTIPLIERS[p.trellis_bits])
        sizes = *sizes, p.in_features, p.trellis_bits, torch.get_num_threads()
        library().kbvq_integer_trellis_products(*pointers, *code, *_longs(*sizes))
        return
    pointers = (_address(t) for t in (p.codes, p.words, x, rows, experts, out))
    codes = p.num_vectors, p.plane, p.row_bytes, p.vector_dim, p.codebook_size, p.signed
    library().kbvq_integer_products(*pointers, *_longs(*sizes, *codes, p.table.shape[0], torch.get_num_threads()))


def _float_products(x: Tensor, rows: Tensor, experts: Tensor, p: PreparedProjection, out: Tensor) -> None:
    """The codes' part of `_decode_products` into out, in float32."""
    threads = torch.get_num_threads()
    if p.trellis_bits:
        pointers = (_address(t) for t in (p.codes, p.words, x, rows, experts, out))
        sizes = len(out), p.out_features, p.in_features, p.trellis_bits, threads
        library().kbvq_trellis_products(*pointers, *_longs(*sizes))
    else:
        pointers = (_address(t) for t in (p.codes, p.table, p.groups, x, rows, experts, out))
        sizes = len(out), *_format(p), p.table.shape[0], threads
        _check(library().kbvq_products(*pointers, *_longs(*sizes)))


def _has_integers(p: PreparedProjection) -> bool:
    """Whether the codes stand for integers, or nearly so."""
    return bool(p.trellis_bits) or p.words is not None


def _has_rests(p: PreparedProjection) -> bool:
    """Whether it takes 16 bits for each."""
    return bool(p.trellis_bits) and _integer_levels(p.trellis_bits, p.tail)[1] is not None


def most_tokens(dtype: torch.dtype, *projections: PreparedProjection) -> float:
    """Up to how many tokens of one expert are multiplied while decoding.

    Products with integers of 8 bits are faster than those of floats with any number of tokens, unless the processor
    multiplies tiles (AMX).
    """
    if library() is None:
        return 0
    in_8_bits = all(_has_integers(p) and not _has_rests(p) for p in projections)
    if in_8_bits and dtype in (torch.bfloat16, torch.float16) and not torch.cpu._is_amx_tile_supported():
        return math.inf
    return DECODE_TOKENS


def _decode_products(x: Tensor, rows: Tensor, experts: Tensor, p: PreparedProjection, integers: bool) -> Tensor:
    """W_e x + b_e of every pair, float32 [P, N]; x float32 [., K], rows [P] of x, experts valid ascending int64 [P].

    integers: round x to 8 bits where the codes have integers to multiply it with.
    """
    out = torch.empty(experts.numel(), p.out_features)
    by_integers = integers and _has_integers(p)
    (_integer_products if by_integers else _float_products)(x, rows, experts, p, out)
    if p.rank:
        low = (x @ p.basis.float().T)[rows]
        if p.factor_scale is not None:
            low = low * p.factor_scale[experts]
        for pair, e in enumerate(experts.tolist()):
            out[pair].addmv_(p.coefficients[e].float(), low[pair])
    if p.scale is not None:
        out.mul_(p.scale[experts])
    if p.bias is not None:
        out.add_(p.bias[experts])
    return out


def _linear(x: Tensor, p: PreparedProjection, expert: int, buffer: Tensor) -> Tensor:
    """W_e x + b_e of many tokens, [T, N] in x's dtype, float32 or bfloat16; the scale multiplies the products.

    buffer: decode_expert's, of x's dtype; used again for each expert: new memory costs as much as decoding.
    """
    y = F.linear(x, decode_expert(p, expert, buffer))
    if p.rank:
        low = F.linear(x, p.basis.to(x.dtype))
        coefficients = p.coefficients[expert].float()
        if p.factor_scale is not None:
            coefficients = coefficients * p.factor_scale[expert]
        y = y + F.linear(low, coefficients.to(x.dtype))
    if p.scale is not None:
        y = y * p.scale[expert].to(x.dtype)
    return y if p.bias is None else y + p.bias[expert].to(x.dtype)


def linear(x: Tensor, p: PreparedProjection) -> Tensor:
    """W x + b of the only expert, [T, N] in x's dtype; few tokens multiply while decoding, many go through F.linear."""
    num_tokens = x.shape[0]
    if library() is not None and 0 < num_tokens <= DECODE_TOKENS:
        rows = torch.arange(num_tokens)
        return _decode_products(x.float().contiguous(), rows, torch.zeros_like(rows), p, False).to(x.dtype)
    inputs = x if x.dtype == torch.bfloat16 and multiplies_bfloat16() else x.float()
    return _linear(inputs, p, 0, _weight_buffer(p, inputs.dtype)).to(x.dtype)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16; without, those of float32 are several times faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def moe_forward(
    x: Tensor,
    experts: Tensor | None,
    weights: Tensor | None,
    gate_up: PreparedProjection,
    down: PreparedProjection,
    activation: str,
) -> Tensor:
    """The mixture [T, H] in x's dtype; tokens multiply while decoding, or many of an expert go through F.linear.

    Each token's experts are added in ascending order, those that go through F.linear last.
    """
    if experts is None:
        experts = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        weights = torch.ones(x.shape[0], 1)
    top_k = experts.shape[1]
    act = ACTIVATIONS[activation]
    weights = weights.reshape(-1, 1).float()
    pairs_of: dict[int, list[int]] = {}  # in lists: tensors of so few elements cost more than their products
    for pair, e in enumerate(experts.flatten().tolist()):
        if 0 <= e < gate_up.num_experts:
            pairs_of.setdefault(e, []).append(pair)
    most, integers = most_tokens(x.dtype, gate_up, down), x.dtype in (torch.bfloat16, torch.float16)
    few = [e for e in sorted(pairs_of) if len(pairs_of[e]) <= most]
    y = torch.zeros(x.shape[0], down.out_features)

    x_float = x.float().contiguous() if few else x
    in_turn = [(pair, e) for e in few for pair in pairs_of[e]]
    for first in range(0, len(in_turn), PAIRS_AT_ONCE):
        pairs, hit = torch.tensor(in_turn[first : first + PAIRS_AT_ONCE]).T.contiguous()
        tokens = pairs // top_k
        gate, up = _decode_products(x_float, tokens, hit, gate_up, integers).chunk(2, -1)
        h = (act(gate) * up).contiguous()
        rows = _decode_products(h, torch.arange(len(pairs)), hit, down, integers)
        y.index_add_(0, tokens, rows.mul_(weights[pairs]))
    inputs = x if x.dtype == torch.bfloat16 and multiplies_bfloat16() else x.float()
    many = sorted(pairs_of.keys() - set(few))
    gate_up_buffer, down_buffer = (_weight_buffer(p, inputs.dtype) if many else None for p in (gate_up, down))
    for e in many:
        pairs = torch.tensor(pairs_of[e])
        tokens = pairs // top_k
        gate, up = _linear(inputs[tokens], gate_up, e, gate_up_buffer).chunk(2, -1)
        y.index_add_(0, tokens, _linear(act(gate) * up, down, e, down_buffer).float() * weights[pairs])
    return y.to(x.dtype)
