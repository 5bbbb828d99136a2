"""What the kernels must compute, in plain torch: the definition that every test compares with.

Everything runs in the dtype asked for (float64 by default) and is written for reading, not for speed.
Tensor names and shapes are those of a packed projection (see README.md, "Formats").
"""

from __future__ import annotations

from collections.abc import Mapping

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


def dequantize(
    tensors: Mapping[str, Tensor],
    *,
    in_features: int,
    vector_dim: int,
    codebook_size: int,
    num_stages: int = 1,
    dtype: torch.dtype = torch.float64,
    **_: object,
) -> Tensor:
    """Stored weights [num_experts, out_features, in_features]: scale_e * (decode(codes_e) + coefficients_e @ basis).

    Takes the tensors of a packed projection and its format's fields (those it has no use for are ignored).
    """
    codes = unpack_codes(tensors["codes"], in_features // vector_dim, num_stages, codebook_size)  # [E, N, S, V]
    codebook = tensors["codebook"].to(dtype)  # [1 or E, S, C, d]
    weight = torch.stack(
        [
            sum(codebook[min(e, len(codebook) - 1), s][codes[e, :, s]] for s in range(num_stages)).flatten(1)
            for e in range(len(codes))
        ]
    )
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
