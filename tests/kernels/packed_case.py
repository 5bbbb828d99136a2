"""Random packed projections for the kernel tests, packed by code of their own (not by the code under test)."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import torch
from torch import Tensor


def pack_rows(codes: Tensor, codebook_size: int) -> Tensor:
    """int64 codes [E, N, S, V] -> uint8 [E, N, row_bytes], byte by byte."""
    experts, rows, stages, vectors = codes.shape
    planes = []
    for s in range(stages):
        planes.append(codes[:, :, s] % 256)
        if codebook_size > 256:
            nibbles = torch.zeros(experts, rows, (vectors + 1) // 2, dtype=torch.int64)
            for v in range(vectors):
                nibbles[:, :, v // 2] += codes[:, :, s, v] // 256 * (16 if v % 2 else 1)
            planes.append(nibbles)
    return torch.cat(planes, -1).to(torch.uint8)


def random_projection(
    num_experts: int,
    out_features: int,
    in_features: int,
    *,
    codebook: str | None = None,
    vector_dim: int = 4,
    codebook_size: int = 256,
    num_stages: int = 1,
    signed: bool = False,
    codebook_dtype: str = "float16",
    num_groups: int = 1,
    tail: int = 0,
    per_expert: bool = False,
    has_scale: bool = True,
    has_bias: bool = True,
    rank: int = 0,
    factor_dtype: str = "float16",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors, format fields) of a projection whose outputs are of order one for inputs of order one.

    codebook None: vq or rq, by the number of stages. The first row of each expert holds the highest code everywhere.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).half()

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    codebook = codebook or ("vq" if num_stages == 1 else "rq")
    books = num_experts if per_expert else 1
    width = (in_features * num_stages) ** -0.5
    if codebook == "trellis":
        bits = codebook_size.bit_length() - 1
        tensors = {"codes": integers(0, 256, num_experts, in_features, out_features * bits // 8).to(torch.uint8)}
        tensors["codes"][:, 0] = 255
        if has_scale:
            tensors["scale"] = normal(num_experts, out_features, scale=0.1 * width) + width
    else:
        vectors, tables = in_features // vector_dim, 1 + (num_stages - 1) * num_groups
        codes = integers(0, codebook_size, num_experts, out_features, num_stages, vectors)
        codes[:, 0] = codebook_size - 1
        packed = [pack_rows(codes, codebook_size)]
        if signed:
            packed.append(integers(0, 256, num_experts, out_features, in_features // 8).to(torch.uint8))
        tensors = {"codes": torch.cat(packed, -1)}
        shape = (books, tables, codebook_size, vector_dim)
        if codebook_dtype == "int8":
            values = integers(0 if signed else -127, 128, *shape)
            values[..., -1, :] = 127
            tensors["codebook"] = values.to(torch.int8)
            tensors["codebook_scale"] = normal(books, tables, scale=0.1 * width / 64) + width / 64
        else:
            tensors["codebook"] = normal(*shape, scale=width)
            if signed:
                tensors["codebook"] = tensors["codebook"].abs()
        if num_groups > 1:
            tensors["groups"] = integers(0, num_groups, books, codebook_size).to(torch.uint8)
            tensors["groups"][:, -1] = num_groups - 1
        if has_scale:
            tensors["scale"] = normal(num_experts, out_features, scale=0.1) + 1
    if has_bias:
        tensors["bias"] = normal(num_experts, out_features, scale=0.1)
    if rank and factor_dtype == "float16":
        tensors["basis"] = normal(rank, in_features, scale=in_features**-0.5)
        tensors["coefficients"] = normal(num_experts, out_features, rank, scale=rank**-0.5)
    elif rank:
        tensors["basis"] = torch.randint(-127, 128, (rank, in_features), generator=g).to(torch.int8)
        tensors["basis_scale"] = normal(rank, scale=1e-3) + 1 / (64 * in_features**0.5)
        shape = (num_experts, out_features, rank)
        tensors["coefficients"] = torch.randint(-127, 128, shape, generator=g).to(torch.int8)
        tensors["coefficients_scale"] = normal(num_experts, rank, scale=1e-3) + 1 / (64 * rank**0.5)
    fields = {
        "num_experts": num_experts,
        "out_features": out_features,
        "in_features": in_features,
        "codebook": codebook,
        "vector_dim": 1 if codebook == "trellis" else vector_dim,
        "codebook_size": codebook_size,
        "num_stages": num_stages,
        "num_codebooks": books,
        "has_scale": has_scale,
        "has_bias": has_bias,
        "rank": rank,
        "factor_dtype": factor_dtype,
        "signed": signed,
        "codebook_dtype": codebook_dtype,
        "num_groups": num_groups,
        "tail": tail,
    }
    return tensors, fields


def trellis_value(stream: list[int], row: int, bits: int, tail: int) -> float:
    """Value of one row of a stream of bytes: the 12 bits from bit `row * bits` on, through product and quantile."""
    total = 8 * len(stream)
    state = 0
    for i in range(12):
        place = (row * bits + i) % total
        state += (stream[place // 8] // 2 ** (place % 8) % 2) * 2**i
    factor = {1: 0x8DB4863B, 2: 0xC34D312F, 3: 0xE0B8F077, 4: 0x4FDE7251}[bits]
    level = state * factor % 2**32 // 2**24
    quantile = NormalDist().inv_cdf((4 * level + 1) / 1022)
    return torch.tensor(quantile * math.exp(tail / 100 * quantile**2 / 2)).half().item()


def stored_weight(tensors: dict[str, Tensor], fields: dict[str, object], e: int, row: int, column: int) -> float:
    """One weight, bit by bit from the definition of the format."""
    codebook, dim, size = fields["codebook"], fields["vector_dim"], fields["codebook_size"]
    if codebook == "trellis":
        value = trellis_value(tensors["codes"][e, column].tolist(), row, size.bit_length() - 1, fields["tail"])
    else:
        packed, vectors = tensors["codes"][e, row].tolist(), fields["in_features"] // dim
        v, i = divmod(column, dim)
        book = e if fields["num_codebooks"] > 1 else 0
        value, first, start = 0.0, 0, 0
        for stage in range(fields["num_stages"]):
            code = packed[start + v]
            start += vectors
            if size == 4096:
                code += packed[start + v // 2] // (16 if v % 2 else 1) % 16 * 256
                start += (vectors + 1) // 2
            first = code if stage == 0 else first
            table = stage
            if fields["num_groups"] > 1 and stage:
                table = 1 + (stage - 1) * fields["num_groups"] + tensors["groups"][book, first].item()
            part = tensors["codebook"][book, table, code, i].item()
            if fields["codebook_dtype"] == "int8":
                part *= tensors["codebook_scale"][book, table].item()
            value += part
        if fields["signed"] and packed[start + column // 8] // 2 ** (column % 8) % 2:
            value = -value
    for q in range(fields["rank"]):
        basis, factor = tensors["basis"][q, column].item(), tensors["coefficients"][e, row, q].item()
        if fields["factor_dtype"] == "int8":
            basis *= tensors["basis_scale"][q].item()
            factor *= tensors["coefficients_scale"][e, q].item()
        value += factor * basis
    return value * (tensors["scale"][e, row].item() if fields["has_scale"] else 1.0)


def stored_weights(tensors: dict[str, Tensor], fields: dict[str, object]) -> Tensor:
    """All weights, float64 [E, N, K]; slow."""
    sizes = [range(fields[name]) for name in ("num_experts", "out_features", "in_features")]
    flat = [stored_weight(tensors, fields, *place) for place in itertools.product(*sizes)]
    return torch.tensor(flat, dtype=torch.float64).view([len(size) for size in sizes])


def random_routing(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(indices int64, weights float32) [T, k]; expert 1 gets most pairs, expert 0 none (when there are others)."""
    g = torch.Generator().manual_seed(seed)
    if num_experts == 1:
        index = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    else:
        index = torch.randint(1, num_experts, (num_tokens, top_k), generator=g)
        index[:, 0] = 1
    return index, torch.rand(num_tokens, top_k, generator=g)
