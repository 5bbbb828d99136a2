"""Random packed projections for the kernel tests, packed by code of their own (not by the code under test)."""

from __future__ import annotations

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
    vector_dim: int = 4,
    codebook_size: int = 256,
    num_stages: int = 1,
    per_expert: bool = False,
    has_scale: bool = True,
    has_bias: bool = True,
    rank: int = 0,
    factor_dtype: str = "float16",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors, format fields) of a projection whose outputs are of order one for inputs of order one.

    The first row of each expert holds the highest code everywhere.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).half()

    vectors = in_features // vector_dim
    codes = torch.randint(0, codebook_size, (num_experts, out_features, num_stages, vectors), generator=g)
    codes[:, 0] = codebook_size - 1
    books = num_experts if per_expert else 1
    width = (in_features * num_stages) ** -0.5
    tensors = {
        "codes": pack_rows(codes, codebook_size),
        "codebook": normal(books, num_stages, codebook_size, vector_dim, scale=width),
    }
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
        "codebook": "vq" if num_stages == 1 else "rq",
        "vector_dim": vector_dim,
        "codebook_size": codebook_size,
        "num_stages": num_stages,
        "num_codebooks": books,
        "has_scale": has_scale,
        "has_bias": has_bias,
        "rank": rank,
        "factor_dtype": factor_dtype,
    }
    return tensors, fields


def random_routing(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(indices int64, weights float32) [T, k]; expert 1 gets most pairs, expert 0 none (when there are others)."""
    g = torch.Generator().manual_seed(seed)
    if num_experts == 1:
        index = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    else:
        index = torch.randint(1, num_experts, (num_tokens, top_k), generator=g)
        index[:, 0] = 1
    return index, torch.rand(num_tokens, top_k, generator=g)
