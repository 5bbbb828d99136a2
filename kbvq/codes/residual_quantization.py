"""Plain residual quantization: a vector is the sum of one codeword per stage (Chen, Guan & Wang 2010).

Stage m is k-means on what stages 0..m-1 leave. Encoding is greedy (beam 1) or keeps the `beam` best partial sums;
decoding is a sum of table lookups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.codes.kmeans import kmeans, nearest_codeword
from kbvq.errors import ConfigError

_CHUNK_FLOATS = 1 << 21  # candidate scores held at once while encoding with a beam


def fit_residual_codebooks(
    vectors: Tensor,
    num_stages: int,
    codebook_size: int,
    *,
    iterations: int,
    seed: int,
    weights: Tensor | None = None,
    max_vectors: int | None = None,
) -> Tensor:
    """Codebooks of all stages, each by k-means on the residual that greedy encoding leaves.

    vectors: [n, d] float32. weights: [n] float32 >= 0 or None for 1. max_vectors: each k-means sees a random subset
    of at most that many. Returns [num_stages, codebook_size, d] float32.
    Raises ConfigError with fewer vectors than codewords, NumericalError on values that are not finite.
    """
    residual = vectors.float()
    codebooks = []
    for stage in range(num_stages):
        codebook = kmeans(
            residual, codebook_size, iterations=iterations, seed=seed + stage, weights=weights, max_vectors=max_vectors
        )
        residual = residual - F.embedding(nearest_codeword(residual, codebook), codebook)
        codebooks.append(codebook)
    return torch.stack(codebooks)


def residual_encode(vectors: Tensor, codebooks: Tensor, *, beam: int = 1) -> Tensor:
    """Codes of each vector: at every stage the `beam` partial sums nearest to the vector are kept, at the end the best.

    vectors [n, d] float32, codebooks [M, K, d] float32 -> [n, M] int64. beam 1 is the greedy encoder.
    """
    if beam < 1:
        raise ConfigError(f"beam must be at least 1, not {beam}")
    return beam_search(vectors.float(), codebooks, beam=beam)


def beam_search(
    vectors: Tensor, tables: Tensor, groups: Tensor | None = None, *, num_groups: int = 1, beam: int
) -> Tensor:
    """Codes of vectors by the `beam` best partial sums.

    vectors: [n, d] float32. tables: [num_tables, K, d], one for each stage. groups: [K] int64, the group that a
    codeword of stage 0 belongs to: then every later stage has a table for each group, and takes it from the vector's.
    Returns [n, num_stages] int64.
    """
    # Stage 0 has one table, [K, d], each later stage one per group, side by side: [num_groups · K, d].
    later = range(1, len(tables), num_groups)
    stages = [tables[0], *(tables[first : first + num_groups].flatten(0, 1) for first in later)]
    half_norms = [0.5 * stage.square().sum(1) for stage in stages]
    chunk = max(1, _CHUNK_FLOATS // (beam * tables.shape[1]))
    return torch.cat([_beam_search(part, stages, half_norms, groups, beam) for part in vectors.split(chunk)])


def _beam_search(
    vectors: Tensor, stages: list[Tensor], half_norms: list[Tensor], groups: Tensor | None, beam: int
) -> Tensor:
    n, dim = vectors.shape
    size = len(stages[0])
    residual = vectors[:, None]  # [n, partial sums, d]
    codes = torch.empty(n, 1, 0, dtype=torch.int64, device=vectors.device)
    for stage, codebook in enumerate(stages):
        if groups is None or stage == 0:
            table = torch.zeros_like(residual[..., 0], dtype=torch.int64)
            products = half_norms[stage] - residual @ codebook.T
        else:
            table = groups[codes[..., 0]]
            products = _products_by_table(residual, table, codebook, half_norms[stage], size)
        # ½‖r − c‖² = ½‖r‖² + ½‖c‖² − r·c for every partial sum and codeword
        scores = 0.5 * residual.square().sum(2)[..., None] + products
        best = scores.flatten(1).topk(min(beam, scores[0].numel()), largest=False).indices
        origin, code = best // size, best % size
        place = table.gather(1, origin) * size + code
        codes = torch.cat([codes.gather(1, origin[..., None].expand(-1, -1, codes.shape[2])), code[..., None]], 2)
        residual = residual.gather(1, origin[..., None].expand(-1, -1, dim)) - F.embedding(place, codebook)
    winner = residual.square().sum(2).argmin(1)
    return codes[torch.arange(n, device=codes.device), winner]


def _products_by_table(residual: Tensor, table: Tensor, codebook: Tensor, half_norms: Tensor, size: int) -> Tensor:
    """½‖c‖² − r·c of partial sums [n, s, d] and the codewords of their own tables: [n, s, size]; table: [n, s]."""
    order = table.flatten().argsort()
    counts = torch.bincount(table.flatten(), minlength=len(codebook) // size).tolist()
    parts = residual.flatten(0, 1)[order].split(counts)
    found = [
        half_norms[rows : rows + size] - part @ codebook[rows : rows + size].T
        for rows, part in zip(range(0, len(codebook), size), parts, strict=True)
        if len(part)
    ]
    products = residual.new_empty(len(order), size)
    products[order] = torch.cat(found)
    return products.view(*table.shape, size)


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the chosen codewords: codes [n, m] of any integer type, codebooks [M, K, d] -> [n, d].

    With m < M columns the first m stages are decoded: a shorter, coarser code.
    """
    return sum(
        (F.embedding(codes[:, stage].long(), codebooks[stage]) for stage in range(codes.shape[1])),
        start=codebooks.new_zeros(len(codes), codebooks.shape[2]),
    )
