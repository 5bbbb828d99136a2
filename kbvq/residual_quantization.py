"""Plain residual quantization: a vector is the sum of one codeword per stage (Chen, Guan & Wang 2010).

Stage m is k-means on what stages 0..m-1 leave. Encoding is greedy (beam 1) or keeps the `beam` best partial sums;
decoding is a sum of table lookups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kbvq.errors import ConfigError
from kbvq.kmeans import kmeans, nearest_codeword

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
    chunk = max(1, _CHUNK_FLOATS // (beam * codebooks.shape[1]))
    return torch.cat([_beam_search(part, codebooks, beam) for part in vectors.float().split(chunk)])


def _beam_search(vectors: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    n, dim = vectors.shape
    num_stages, size, _ = codebooks.shape
    residual = vectors[:, None]  # [n, partial sums, d]
    codes = torch.empty(n, 1, 0, dtype=torch.int64, device=vectors.device)
    for codebook in codebooks:
        # ‖r − c‖² = ‖r‖² + ‖c‖² − 2 r·c for every partial sum and codeword
        scores = residual.square().sum(2)[..., None] + codebook.square().sum(1) - 2 * residual @ codebook.T
        best = scores.flatten(1).topk(min(beam, scores[0].numel()), largest=False).indices
        origin, code = best // size, best % size
        codes = torch.cat([codes.gather(1, origin[..., None].expand(-1, -1, codes.shape[2])), code[..., None]], 2)
        residual = residual.gather(1, origin[..., None].expand(-1, -1, dim)) - F.embedding(code, codebook)
    winner = residual.square().sum(2).argmin(1)
    return codes[torch.arange(n, device=codes.device), winner]


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the chosen codewords: codes [n, m] of any integer type, codebooks [M, K, d] -> [n, d].

    With m < M columns the first m stages are decoded: a shorter, coarser code.
    """
    return sum(
        (F.embedding(codes[:, stage].long(), codebooks[stage]) for stage in range(codes.shape[1])),
        start=codebooks.new_zeros(len(codes), codebooks.shape[2]),
    )
