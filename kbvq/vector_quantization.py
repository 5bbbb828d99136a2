"""Vector quantization of the experts' weights: codebooks by k-means, codes by nearest codeword.

KBVQ-MoE quantizes in weight space without weighting: vectors of `vector_dim` consecutive inputs of a row, one
codebook of 2^(bits·vector_dim) codewords per expert and matrix. Codebooks are rounded to float16 as stored before
the codes are chosen, so that the codes are the best ones for the codebook that the reader sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.kmeans import kmeans, nearest_codeword
from kbvq.recipes import Recipe


def row_scales(weights: Tensor) -> Tensor:
    """Root mean square of each weight row, rounded to float16 and never zero: [..., out_features] float32."""
    smallest = torch.finfo(torch.float16).smallest_normal
    return weights.square().mean(-1).sqrt().clamp_min(smallest).half().float()


def vector_quantize(weights: Tensor, recipe: Recipe, *, scale: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and codebooks for the experts of a bank.

    weights: [num_experts, out_features, in_features] float32, already divided by `scale`.
    scale: [num_experts, out_features] or None; a row of scale s counts s² times in the error.
    Returns (codes [num_experts, out_features, in_features / vector_dim] int64,
             codebooks [num_experts or 1, codebook_size, vector_dim] float16).
    """
    num_experts, out_features, in_features = weights.shape
    dim, size = recipe.vector_dim, recipe.codebook_size
    vectors = weights.reshape(num_experts, -1, dim)
    mass = None if scale is None else scale.square().repeat_interleave(in_features // dim, 1)
    limit = None if recipe.max_vectors_per_codeword is None else recipe.max_vectors_per_codeword * size
    groups = [slice(None)] if recipe.codebook_scope == "bank" else [slice(e, e + 1) for e in range(num_experts)]
    codes, codebooks = [], []
    for index, group in enumerate(groups):
        members = vectors[group].reshape(-1, dim)
        codebook = kmeans(
            members,
            size,
            iterations=recipe.kmeans_iterations,
            seed=seed + index,
            weights=None if mass is None else mass[group].reshape(-1),
            max_vectors=limit,
        ).half()
        codes.append(nearest_codeword(members, codebook.float()))
        codebooks.append(codebook)
    return torch.cat(codes).view(num_experts, out_features, in_features // dim), torch.stack(codebooks)
