"""Vector quantization of the experts' weights: codebooks by k-means, codes by nearest codeword.

KBVQ-MoE quantizes in weight space without weighting: vectors of `vector_dim` consecutive inputs of a row, one
codebook of 2^(bits·vector_dim) codewords per expert and matrix. Codebooks are rounded to float16, as stored, before
the codes are chosen, so that the codes are the best ones for the codebook that the reader sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.error_feedback import channel_order, encode_with_feedback, upper_factor
from kbvq.kmeans import kmeans, nearest_codeword
from kbvq.recipes import Recipe
from kbvq.structures import InputMoments


def row_scales(weights: Tensor) -> Tensor:
    """Root mean square of each weight row, rounded to float16 and never zero: [..., out_features] float32."""
    smallest = torch.finfo(torch.float16).smallest_normal
    return weights.square().mean(-1).sqrt().clamp_min(smallest).half().float()


def vector_quantize(
    weights: Tensor, recipe: Recipe, *, scale: Tensor, moments: InputMoments, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes and codebooks for the experts of a bank, ŵ = scale · codeword.

    weights: [num_experts, out_features, in_features] float32. scale: [num_experts, out_features] > 0.
    moments: of the inputs; they matter with the recipe's error feedback only.
    Returns (codes [num_experts, out_features, in_features / vector_dim] int64,
             codebooks [num_experts or 1, codebook_size, vector_dim] float16).
    """
    targets = weights / scale[..., None]
    codebooks = _fit_codebooks(targets, recipe, scale, seed)
    if recipe.error_feedback:
        return _encode_in_order(weights, codebooks, recipe, scale, moments)
    codes = [
        nearest_codeword(target.reshape(-1, recipe.vector_dim), codebook.float()).view(len(target), -1)
        for target, codebook in zip(targets, codebooks.expand(len(targets), -1, -1), strict=True)
    ]
    return torch.stack(codes), codebooks


def _fit_codebooks(targets: Tensor, recipe: Recipe, scale: Tensor, seed: int) -> Tensor:
    """k-means codebooks, [num_experts or 1, codebook_size, vector_dim] float16; a row of scale s counts s² times."""
    vectors = targets.reshape(len(targets), -1, recipe.vector_dim)
    mass = scale.square().repeat_interleave(targets.shape[-1] // recipe.vector_dim, 1)
    limit = None
    if recipe.max_vectors_per_codeword is not None:
        limit = recipe.max_vectors_per_codeword * recipe.codebook_size
    whole = recipe.codebook_scope == "bank"
    groups = [slice(None)] if whole else [slice(expert, expert + 1) for expert in range(len(targets))]
    codebooks = [
        kmeans(
            vectors[group].flatten(0, 1),
            recipe.codebook_size,
            iterations=recipe.kmeans_iterations,
            seed=seed + index,
            weights=mass[group].flatten(),
            max_vectors=limit,
        )
        for index, group in enumerate(groups)
    ]
    return torch.stack(codebooks).half()


def _encode_in_order(
    weights: Tensor, codebooks: Tensor, recipe: Recipe, scale: Tensor, moments: InputMoments
) -> tuple[Tensor, Tensor]:
    """Codes with error feedback under each expert's moments, after refitting the codebooks to the weighted error."""
    order = channel_order(moments.pooled_second_moment(), recipe.vector_dim)
    ordered = weights[..., order]
    factor = torch.stack(
        [
            upper_factor(moments.expert_moments(expert, recipe.prior_tokens)[0][order][:, order], recipe.damping)
            for expert in range(len(weights))
        ]
    )
    current = codebooks.float()
    for _ in range(recipe.refits):
        _, current = encode_with_feedback(ordered, factor, current, scale, refit=True)
        current = current.half().float()
    codes, _ = encode_with_feedback(ordered, factor, current, scale, refit=False)
    vector_order = order[:: recipe.vector_dim] // recipe.vector_dim
    return codes[..., vector_order.argsort()], current.half()
