"""What the kernels must compute, in plain torch: the definition that every test compares with.

Everything runs in the dtype asked for (float64 by default) and is written for reading, not for speed.
Tensor names and shapes are those of a packed projection (see README.md, "Formats").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Served activations, by their names in a transformers config."""

TRELLIS_STATE_BITS = 12
"""Bits of a trellis stream that one value depends on."""

TRELLIS_MULTIPLIERS = {1: 0x8DB4863B, 2: 0xC34D312F, 3: 0xE0B8F077, 4: 0x4FDE7251}
"""Bits per value -> the odd factor that scatters a trellis code's states over its levels."""

MAX_TAIL = 50
"""Heaviest tails of a trellis code's levels, in hundredths of Tukey's h."""


def unpack_codes(codes: Tensor, num_vectors: int, num_stages: int, codebook_size: int) -> Tensor:
    """Codes of every vector, int64 [..., num_stages, num_vectors], from packed rows uint8 [..., row_bytes].

    A row holds per stage the low bytes of all its codes, then, for 4096 codewords, the high 4 bits:
    vector 2j in the low nibble and vector 2j + 1 in the high nibble of byte j.
    """
    rows = codes.unflatten(-1, (num_stages, -1)).long()
    low = rows[..., :num_vectors]
    if codebook_size <= 256:
        return low
    nibbles = rows[..., num_vectors:]
    high = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)[..., :num_vectors]
    return low | high << 8


def low_rank_weight(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """coefficients_e @ basis, [num_experts, out_features, in_features]."""
    basis, coefficients = tensors["basis"].to(dtype), tensors["coefficients"].to(dtype)
    if "basis_scale" in tensors:
        basis = basis * tensors["basis_scale"].to(dtype)[:, None]
        coefficients = coefficients * tensors["coefficients_scale"].to(dtype)[:, None, :]
    return coefficients @ basis


def weight_signs(sign_plane: Tensor) -> Tensor:
    """-1 or 1 of every weight, int64 [..., K], from uint8 [..., K / 8]: weight k in bit k % 8 of byte k // 8."""
    bits = (sign_plane[..., None].long() >> torch.arange(8, device=sign_plane.device)) & 1
    return 1 - 2 * bits.flatten(-2)


@cache
def _trellis_levels(tail: int) -> tuple[float, ...]:
    quantiles = (NormalDist().inv_cdf((4 * j + 1) / 1022) for j in range(256))
    return tuple(z * math.exp(tail / 200 * z * z) for z in quantiles)


def trellis_levels(tail: int) -> Tensor:
    """The 256 values of a trellis code, ascending, float16 [256]: z exp(tail z^2 / 200), z the unit-Gaussian quantiles
    at (4j + 1) / 1022."""
    return torch.tensor(_trellis_levels(tail)).half()


def trellis_codewords(bits: int, tail: int) -> Tensor:
    """The value of every state, float16 [2^12]: levels[(state * multiplier mod 2^32) >> 24]."""
    states = torch.arange(1 << TRELLIS_STATE_BITS)
    return trellis_levels(tail)[(states * TRELLIS_MULTIPLIERS[bits] & 0xFFFFFFFF) >> 24]


def trellis_states(codes: Tensor, bits: int) -> Tensor:
    """States down every stream, int64 [..., N], from streams uint8 [..., N * bits / 8].

    State n is the 12 bits from bit n * bits on, lowest bit first; past the end of a stream its first bits follow.
    """
    stream = ((codes[..., None].long() >> torch.arange(8, device=codes.device)) & 1).flatten(-2)
    place = torch.arange(stream.shape[-1] // bits, device=codes.device) * bits
    states = torch.zeros(*codes.shape[:-1], len(place), dtype=torch.int64, device=codes.device)
    for i in range(TRELLIS_STATE_BITS):
        states |= stream[..., (place + i) % stream.shape[-1]] << i
    return states


def _codewords(
    tensors: Mapping[str, Tensor], in_features: int, vector_dim: int, codebook_size: int, num_stages: int, signed: bool,
    num_groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """decode(codes_e) of the formats with a table, [E, N, K]."""
    rows = tensors["codes"]
    if signed:
        rows, sign_plane = rows.split([rows.shape[-1] - in_features // 8, in_features // 8], -1)
    codes = unpack_codes(rows, in_features // vector_dim, num_stages, codebook_size)  # [E, N, S, V]
    codebook = tensors["codebook"].to(dtype)  # [1 or E, tables, C, d]
    if "codebook_scale" in tensors:
        codebook = codebook * tensors["codebook_scale"].to(dtype)[..., None, None]
    weights = []
    for e in range(len(codes)):
        book = min(e, len(codebook) - 1)
        first = codes[e, :, 0]
        group = tensors["groups"][book].long()[first] if num_groups > 1 else torch.zeros_like(first)
        weight = codebook[book, 0][first]
        for s in range(1, num_stages):
            weight = weight + codebook[book][1 + (s - 1) * num_groups + group, codes[e, :, s]]
        weights.append(weight.flatten(1))
    weight = torch.stack(weights)
    return weight * weight_signs(sign_plane) if signed else weight


def dequantize(
    tensors: Mapping[str, Tensor],
    *,
    codebook: str,
    in_features: int,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    signed: bool = False,
    num_groups: int = 1,
    tail: int = 0,
    dtype: torch.dtype = torch.float64,
    **_: object,
) -> Tensor:
    """Stored weights [num_experts, out_features, in_features]: scale_e * (decode(codes_e) + coefficients_e @ basis).

    Takes the tensors of a packed projection and its format's fields (those it has no use for are ignored).
    """
    if codebook == "trellis":
        bits = codebook_size.bit_length() - 1
        values = trellis_codewords(bits, tail).to(tensors["codes"].device, dtype)
        weight = values[trellis_states(tensors["codes"], bits)].transpose(1, 2)
    else:
        weight = _codewords(tensors, in_features, vector_dim, codebook_size, num_stages, signed, num_groups, dtype)
    if "basis" in tensors:
        weight = weight + low_rank_weight(tensors, dtype)
    if "scale" in tensors:
        weight = weight * tensors["scale"].to(dtype)[..., None]
    return weight


def moe_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Mixture of experts [T, H] in the dtype of the weights, pair by pair.

    y_t = sum_j w_tj (W_down (act(g) * u) + b_down), [g; u] = W_gate_up x_t + b_gate_up, for the experts
    e = top_k_index[t, j]; indices outside [0, num_experts) are skipped.
    """
    dtype = gate_up_weight.dtype
    x = hidden_states.to(dtype)
    y = torch.zeros_like(x)
    for t, row in enumerate(top_k_index.tolist()):
        for j, e in enumerate(row):
            if not 0 <= e < len(gate_up_weight):
                continue
            pre = gate_up_weight[e] @ x[t]
            if gate_up_bias is not None:
                pre = pre + gate_up_bias[e].to(dtype)
            gate, up = pre.chunk(2)
            out = down_weight[e] @ (ACTIVATIONS[activation](gate) * up)
            if down_bias is not None:
                out = out + down_bias[e].to(dtype)
            y[t] += top_k_weights[t, j].to(dtype) * out
    return y
