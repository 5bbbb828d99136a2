"""k-means on small vectors: nearest codeword, k-means++ seeding, Lloyd iterations with optional weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.errors import ConfigError, NumericalError

_CHUNK_SCORES = 1 << 18  # scores held at once; on CPU they must stay in the cache, or the search is memory-bound


def _assign(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codeword of each vector: (codes [n] int64, ½‖c‖² − x·c of the winner [n])."""
    half_norms = 0.5 * codebook.square().sum(1)
    transposed = codebook.T.contiguous()
    chunk = (
        max(64, _CHUNK_SCORES // len(codebook)) if vectors.device.type == "cpu" else max(64, (1 << 27) // len(codebook))
    )
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    scores = torch.empty(len(vectors), dtype=vectors.dtype, device=vectors.device)
    for start in range(0, len(vectors), chunk):
        part = slice(start, start + chunk)
        scores[part], codes[part] = torch.addmm(half_norms, vectors[part], transposed, alpha=-1).min(1)
    return codes, scores


def nearest_codeword(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword nearest to each vector in squared Euclidean distance.

    vectors [n, d] float32, codebook [K, d] float32 -> [n] int64. Ties go to one of the tied codewords.
    """
    return _assign(vectors, codebook)[0]


def nearest_codewords(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """`nearest_codeword` for a batch of problems: [B, n, d] and [B, K, d] -> [B, n] int64."""
    half_norms = 0.5 * codebooks.square().sum(-1, keepdim=True).mT
    transposed = codebooks.mT.contiguous()
    limit = (1 << 20) if vectors.device.type == "cpu" else (1 << 28)
    step = max(1, limit // (vectors.shape[1] * codebooks.shape[1]))
    chunks = [
        torch.baddbmm(half_norms[b : b + step], vectors[b : b + step], transposed[b : b + step], alpha=-1)
        .min(2)
        .indices
        for b in range(0, len(vectors), step)
    ]
    return torch.cat(chunks)


def _draw(mass: Tensor, generator: torch.Generator) -> Tensor:
    """One index drawn with probability proportional to `mass` [n] float64 >= 0; the first one if all are zero. [1]
    int64 on the device of `mass`, where it stays: a GPU would be waited for at every codeword."""
    cumulative = mass.cumsum(0)
    threshold = torch.rand((), generator=generator, dtype=torch.float64).to(mass.device) * cumulative[-1]
    return torch.searchsorted(cumulative, threshold, right=True).clamp_max(len(mass) - 1)[None]


def _seed_codebook(vectors: Tensor, num_codewords: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each new codeword is drawn by weighted squared distance."""
    chosen = [_draw(weights, generator)]
    distance = torch.full((len(vectors),), torch.inf, dtype=vectors.dtype, device=vectors.device)
    for _ in range(num_codewords - 1):
        torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1), out=distance)
        chosen.append(_draw(weights * distance, generator))
    return vectors[torch.cat(chosen)]


def kmeans(
    vectors: Tensor,
    num_codewords: int,
    *,
    iterations: int,
    seed: int,
    weights: Tensor | None = None,
    max_vectors: int | None = None,
) -> Tensor:
    """Codebook of `num_codewords` minimising Σ_n w_n ‖x_n − c(x_n)‖² by k-means++ and Lloyd's iterations.

    vectors: [n, d] float32. weights: [n] float32 >= 0 or None for 1. max_vectors: train on a random subset
    of at most that many. Stops early when no assignment changes, which further iterations could not undo.
    An empty cell moves to the vector that is worst represented.
    Returns [num_codewords, d] float32. Means are accumulated in float64, so that on a GPU the order of
    the additions does not show in float32.
    Raises ConfigError with fewer vectors than codewords, NumericalError on values that are not finite.
    """
    if len(vectors) < num_codewords:
        raise ConfigError(f"k-means needs at least as many vectors as codewords: {len(vectors)} < {num_codewords}")
    if not torch.isfinite(vectors).all():
        raise NumericalError("k-means got vectors with NaN or infinite values; check the weights they come from")
    generator = torch.Generator().manual_seed(seed)
    vectors = vectors.float()
    if max_vectors is not None and len(vectors) > max_vectors:
        subset = torch.randperm(len(vectors), generator=generator)[: max(max_vectors, num_codewords)].to(vectors.device)
        vectors = vectors[subset]
        weights = None if weights is None else weights[subset]
    mass = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device) if weights is None else weights.double()
    codebook = _seed_codebook(vectors, num_codewords, mass, generator)
    weighted = vectors.double() * mass[:, None]
    half_squares = 0.5 * vectors.square().sum(1)
    previous = None
    for _ in range(iterations):
        codes, scores = _assign(vectors, codebook)
        if previous is not None and torch.equal(codes, previous):
            break
        previous = codes
        cell_mass = mass.new_zeros(num_codewords).index_add_(0, codes, mass)
        cell_sum = weighted.new_zeros(num_codewords, vectors.shape[1]).index_add_(0, codes, weighted)
        filled = cell_mass > 0
        codebook[filled] = (cell_sum[filled] / cell_mass[filled, None]).float()
        empty = (~filled).nonzero().flatten()
        if len(empty):
            worst = ((half_squares + scores) * mass).topk(len(empty)).indices
            codebook[empty] = vectors[worst]
    return codebook
