"""Codes to bytes and back, and the one definition of what a stored weight decodes to.

Bytes of one row, per stage: a *byte plane* with the low 8 bits of each code and, for 12-bit codes, a
*nibble plane* with the high 4 bits, vector 2j in the low nibble and vector 2j+1 in the high one (the
last high nibble is zero when the number of vectors is odd). Planes keep every read byte-aligned.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.errors import ConfigError
from kbvq.structures import INDEX_BITS, ProjectionFormat


def pack_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Pack the codes of one stage: integers [..., num_vectors] -> uint8 [..., bytes].

    Raises ConfigError for a codebook size without a packing, or a code outside the codebook.
    """
    bits = _index_bits(codebook_size)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ConfigError(
            f"codes lie in [{int(codes.min())}, {int(codes.max())}]; a codebook of {codebook_size} needs "
            f"[0, {codebook_size - 1}]"
        )
    low = (codes & 0xFF).to(torch.uint8)
    if bits == 8:
        return low
    high = F.pad((codes >> 8).to(torch.uint8), (0, codes.shape[-1] % 2))
    return torch.cat([low, high[..., 0::2] | (high[..., 1::2] << 4)], dim=-1)


def unpack_codes(packed: Tensor, num_vectors: int, codebook_size: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [..., bytes] -> int32 [..., num_vectors]."""
    low = packed[..., :num_vectors].int()
    if _index_bits(codebook_size) == 8:
        return low
    nibbles = packed[..., num_vectors:].int()
    high = torch.stack([nibbles & 0xF, nibbles >> 4], dim=-1).flatten(-2)[..., :num_vectors]
    return low | (high << 8)


def pack_stages(codes: Tensor, codebook_size: int) -> Tensor:
    """Pack all stages, one after the other in a row: [num_stages, ..., num_vectors] -> uint8 [..., row_bytes]."""
    return torch.cat([pack_codes(stage, codebook_size) for stage in codes], dim=-1)


def unpack_stages(packed: Tensor, num_stages: int, num_vectors: int, codebook_size: int) -> Tensor:
    """Inverse of `pack_stages`: uint8 [..., row_bytes] -> int32 [num_stages, ..., num_vectors]."""
    return torch.stack([unpack_codes(p, num_vectors, codebook_size) for p in packed.chunk(num_stages, dim=-1)])


def dequantize_expert(
    format: ProjectionFormat, tensors: Mapping[str, Tensor], expert: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The stored weight of one expert, `scale[:, None] * (decode(codes) + coefficients @ basis)`.

    `tensors` are those of `format.tensors()`, on any device; float ones may have any float dtype, since
    `model.to(dtype)` casts them. Computed in float32, then cast.

    Returns [out_features, in_features] in `dtype`.
    """
    codes = unpack_stages(tensors["codes"][expert], format.num_stages, format.num_vectors, format.codebook_size)
    codebooks = tensors["codebook"][expert if format.num_codebooks > 1 else 0].float()
    # F.embedding, not codebooks[stage][codes]: advanced indexing is ten times slower on a CPU.
    weight = F.embedding(codes[0], codebooks[0])
    for stage in range(1, format.num_stages):
        weight += F.embedding(codes[stage], codebooks[stage])
    weight = weight.flatten(-2)
    if format.rank:
        weight = torch.addmm(weight, *decode_factors(tensors, expert))
    if format.has_scale:
        weight *= tensors["scale"][expert].float()[:, None]
    return weight.to(dtype)


def decode_factors(tensors: Mapping[str, Tensor], expert: int | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(coefficients, basis) as stored, in float32: [out_features, rank] of one expert or [experts, out_features, rank],
    and [rank, in_features]."""
    coefficients, basis = tensors["coefficients"][expert].float(), tensors["basis"].float()
    if "basis_scale" in tensors:
        coefficients = coefficients * tensors["coefficients_scale"][expert].float().unsqueeze(-2)
        basis = basis * tensors["basis_scale"].float()[:, None]
    return coefficients, basis


def _index_bits(codebook_size: int) -> int:
    if codebook_size not in INDEX_BITS:
        raise ConfigError(f"codebook_size {codebook_size} cannot be packed; use one of {sorted(INDEX_BITS)}")
    return INDEX_BITS[codebook_size]
