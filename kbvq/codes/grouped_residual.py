"""`rq-grouped` codebooks for weights: residual tables chosen by the group of the first codeword.

The cheap part of RQ-MoE's idea (kbvq.codes.rq_moe), without its network: the codewords of a later stage adapt to the
first code, which chooses among a few tables. They are trained as tables, one for each of a few groups of first
codewords, and a decoder needs a lookup per stage and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.kmeans import kmeans, nearest_codeword

_ROUNDS = 4  # of grouping the first codewords by the tables, and training the tables of the groups


def fit_grouped_codebooks(
    vectors: Tensor,
    num_stages: int,
    codebook_size: int,
    num_groups: int,
    *,
    iterations: int,
    seed: int,
    weights: Tensor | None = None,
    max_vectors: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tables of all stages and the group of each codeword of stage 0.

    vectors: [n, d] float32. weights: [n] float32 >= 0 or None for 1. max_vectors: trained on a random subset of as
    many.
    Returns (tables [1 + (num_stages − 1) · num_groups, codebook_size, d] float32, in the order of
    ProjectionFormat.num_tables, and groups [codebook_size] int64).
    Raises ConfigError with fewer vectors than codewords, NumericalError on values that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = vectors.float()
    mass = vectors.new_ones(len(vectors)) if weights is None else weights.float()
    if max_vectors is not None and len(vectors) > max_vectors:
        subset = torch.randperm(len(vectors), generator=generator)[:max_vectors].to(vectors.device)
        vectors, mass = vectors[subset], mass[subset]
    options = {"iterations": iterations, "seed": seed}
    first = kmeans(vectors, codebook_size, weights=mass, **options)
    code = nearest_codeword(vectors, first)
    residual = vectors - F.embedding(code, first)
    # Codewords of like length leave like residuals: the inner cells are small, the outer ones wide.
    groups = torch.empty(codebook_size, dtype=torch.int64, device=vectors.device)
    groups[first.norm(dim=1).argsort()] = (
        torch.arange(codebook_size, device=vectors.device) * num_groups // codebook_size
    )
    tables = [first]
    for stage in range(1, num_stages):
        plain = kmeans(residual, codebook_size, weights=mass, **options)
        of_group = [plain.clone() for _ in range(num_groups)]
        for turn in range(_ROUNDS if stage == 1 else 1):
            for group in range(num_groups):
                members = (groups[code] == group).nonzero().flatten()
                if len(members) >= 4 * codebook_size:  # fewer would be learnt by heart
                    of_group[group] = kmeans(residual[members], codebook_size, weights=mass[members], **options)
            if stage == 1 and turn < _ROUNDS - 1:
                errors = torch.stack([_errors(residual, table) * mass for table in of_group], 1)
                per_codeword = errors.new_zeros(codebook_size, num_groups).index_add_(0, code, errors)
                groups = per_codeword.argmin(1)
        chosen = torch.stack([nearest_codeword(residual, table) for table in of_group], 1)
        own = groups[code]
        flat = torch.cat(of_group)
        residual = residual - F.embedding(own * codebook_size + chosen.gather(1, own[:, None])[:, 0], flat)
        tables += of_group
    return torch.stack(tables), groups


def _errors(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Squared distance of each vector to its nearest codeword, [n]."""
    return (vectors - F.embedding(nearest_codeword(vectors, codebook), codebook)).square().sum(1)
