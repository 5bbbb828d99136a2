"""Codes to bytes and back, and the one definition of what a stored weight decodes to.

Bytes of one row, per stage: a *byte plane* with the low 8 bits of each code and, for 12-bit codes, a
*nibble plane* with the high 4 bits, vector 2j in the low nibble and vector 2j+1 in the high one (the
last high nibble is zero when the number of vectors is odd). Signed codes end with a *sign plane*, a bit per weight.
Planes keep every read byte-aligned. The bit stream of a trellis code is laid out by `TrellisCode.pack`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.rq_moe import RQMoE
from kbvq.codes.trellis import TrellisCode
from kbvq.errors import ConfigError
from kbvq.structures import INDEX_BITS, RQ_MOE_REFINERS, RQ_MOE_WIDTH, ProjectionFormat

_NETWORK = ("projection", "gate_in", "gate_out", "refiner_in", "refiner_out")
"""Parameters of RQMoE in the order in which the tensor "network" has their values."""


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


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., n] with n a multiple of 8 -> uint8 [..., n / 8], element k in bit k mod 8 of byte k // 8."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8).unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., n / 8] -> bool [..., n]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).bool().flatten(-2)


def store_tables(tables: Tensor, dtype: str) -> dict[str, Tensor]:
    """Tables [..., size, d] as stored: "codebook" in float16, or in int8 with "codebook_scale" [...] float16."""
    if dtype == "float16":
        return {"codebook": tables.half()}
    smallest = torch.finfo(torch.float16).smallest_normal
    scale = (tables.abs().amax((-2, -1)) / 127).clamp_min(smallest).half()
    codebook = (tables / scale.float()[..., None, None]).round().clamp(-127, 127).to(torch.int8)
    return {"codebook": codebook, "codebook_scale": scale}


def table_values(tensors: Mapping[str, Tensor]) -> Tensor:
    """Codewords of stored tables, [num_codebooks, num_tables, codebook_size, vector_dim] float32."""
    tables = tensors["codebook"].float()
    if "codebook_scale" in tensors:
        tables = tables * tensors["codebook_scale"].float()[..., None, None]
    return tables


def new_network(format: ProjectionFormat) -> RQMoE:
    """An untrained network of the sizes that rq-moe has."""
    return RQMoE(format.vector_dim, format.num_stages, format.codebook_size, RQ_MOE_REFINERS, 1, RQ_MOE_WIDTH)


@torch.no_grad()
def store_network(network: RQMoE, dtype: str) -> dict[str, Tensor]:
    """The tensors of rq-moe, but the codes, of a trained network: its codebooks and instructions as tables in `dtype`,
    its matrices as one vector in float16.

    Mean and scale of the vectors go into them: ReLU and all maps but those of the gate take a factor of u through, so
    tables times the scale, and G1 over it, give codewords times the scale.
    """
    tables = torch.cat([network.codebooks, network.instructions]) * network.scale
    tables[0] += network.mean
    matrices = {name: getattr(network, name) for name in _NETWORK}
    matrices["gate_in"] = network.gate_in / network.scale
    return store_tables(tables[None], dtype) | {"network": torch.cat([m.flatten() for m in matrices.values()]).half()}


@torch.no_grad()
def stored_network(format: ProjectionFormat, tensors: Mapping[str, Tensor]) -> RQMoE:
    """Inverse of `store_network`, in float64, with mean 0 and scale 1."""
    network = new_network(format).to(tensors["network"].device, torch.float64)
    tables, values = table_values(tensors)[0], tensors["network"].double()
    network.scale.fill_(1.0)
    network.codebooks.copy_(tables[: format.num_stages])
    network.instructions.copy_(tables[format.num_stages :])
    matrices = [getattr(network, name) for name in _NETWORK]
    for matrix, own in zip(matrices, values.split([matrix.numel() for matrix in matrices]), strict=True):
        matrix.copy_(own.view_as(matrix))
    return network


def expand(format: ProjectionFormat, tensors: Mapping[str, Tensor]) -> tuple[ProjectionFormat, Mapping[str, Tensor]]:
    """`format.expanded` and its tensors, which decode to the same by lookups alone.

    The tables of rq-moe hold what its network makes of every first and second code, computed in float64 and rounded to
    float16: that rounded value is what a code stands for, for the encoder as for every reader. Other formats are
    returned as they are.
    """
    if format.codebook != "rq-moe":
        return format, tensors
    network, size = stored_network(format, tensors), format.codebook_size
    codes = torch.arange(size, device=network.codebooks.device)
    first = network.codebooks.detach()[0].half()
    later = network.decode(torch.cartesian_prod(codes, codes)).view(size, size, -1) - first[:, None]
    limit = torch.finfo(torch.float16).max  # a damaged network may leave it
    tables = torch.cat([first[None], later.clamp(-limit, limit).half()])[None]
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("codebook", "codebook_scale", "network")}
    return format.expanded, kept | {"codebook": tables, "groups": codes.to(torch.uint8)[None]}


def codeword_places(format: ProjectionFormat, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
    """Where the codewords of an expert lie in the flattened tables: int64 [num_stages, out_features, num_vectors].

    Tables are flattened to [num_codebooks · num_tables · codebook_size, vector_dim]; not of rq-moe, whose codewords
    lie in no table.
    """
    packed = tensors["codes"][expert]
    if format.signed:
        packed = packed[:, : -format.sign_bytes]
    codes = unpack_stages(packed, format.num_stages, format.num_vectors, format.codebook_size).long()
    book = expert if format.num_codebooks > 1 else 0
    tables = torch.arange(format.num_stages, device=codes.device)[:, None, None]
    if format.num_groups > 1:
        group = F.embedding(codes[0], tensors["groups"][book].long()[:, None])[..., 0]
        tables = torch.where(tables > 0, 1 + (tables - 1) * format.num_groups + group, tables)
    return (book * format.num_tables + tables) * format.codebook_size + codes


def weight_signs(format: ProjectionFormat, tensors: Mapping[str, Tensor], expert: int) -> Tensor | None:
    """±1 of every weight of an expert, [out_features, in_features] float32; None for a format without sign bits."""
    if not format.signed:
        return None
    return 1.0 - 2.0 * unpack_bits(tensors["codes"][expert][:, -format.sign_bytes :]).float()


def decode_codes(format: ProjectionFormat, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
    """What the codes of an expert stand for, [out_features, in_features] float32. Where it is called for many experts,
    `expand` first: else a network is expanded for each."""
    if format.codebook == "trellis":
        code = TrellisCode(format.trellis_bits, tail=format.tail)
        return code.decode(code.unpack(tensors["codes"][expert])).T.contiguous()
    format, tensors = expand(format, tensors)
    places, flat = codeword_places(format, tensors, expert), table_values(tensors).flatten(0, 2)
    # F.embedding, not flat[places]: advanced indexing is ten times slower on a CPU.
    weight = F.embedding(places[0], flat)
    for stage in range(1, format.num_stages):
        weight += F.embedding(places[stage], flat)
    weight = weight.flatten(-2)
    signs = weight_signs(format, tensors, expert)
    return weight if signs is None else weight * signs


def dequantize_expert(
    format: ProjectionFormat, tensors: Mapping[str, Tensor], expert: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The stored weight of one expert, `scale[:, None] * (decode(codes) + coefficients @ basis) * column_scale`.

    `tensors` are those of `format.tensors()`, on any device; float ones may have any float dtype, since
    `model.to(dtype)` casts them. Computed in float32, then cast. For many experts see `decode_codes`.

    Returns [out_features, in_features] in `dtype`.
    """
    weight = decode_codes(format, tensors, expert)
    if format.rank:
        weight = torch.addmm(weight, *decode_factors(tensors, expert))
    if format.has_scale:
        weight *= tensors["scale"][expert].float()[:, None]
    if format.has_column_scale:
        weight *= tensors["column_scale"].float()
    return weight.to(dtype)


def dequantize_rows(
    format: ProjectionFormat, tensors: Mapping[str, Tensor], rows: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of the stored weight of the only expert, as `dequantize_expert` gives them, decoding no others.

    For the formats of `recipes.dense_format`, whose rows are independent. rows: [n] integers. Returns
    [n, in_features] in `dtype`.
    """
    chosen = {**tensors, "codes": tensors["codes"][:, rows], "scale": tensors["scale"][:, rows]}
    return dequantize_expert(format, chosen, 0, dtype)


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
