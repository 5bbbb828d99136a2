"""Vector quantization of the experts' weights: tables by k-means, codes by nearest codeword or with error feedback.

KBVQ-MoE quantizes in weight space without weighting: vectors of `vector_dim` consecutive inputs of a row, one
codebook of 2^(bits·vector_dim) codewords per expert and matrix. Tables are rounded as they will be stored before
the codes are chosen, so that the codes are the best ones for the tables that the reader sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.codes.codebooks import Codebook, TableCodebook, TrellisCodebook
from kbvq.codes.grouped_residual import fit_grouped_codebooks
from kbvq.codes.kmeans import kmeans
from kbvq.codes.residual_quantization import fit_residual_codebooks
from kbvq.method.error_feedback import (
    channel_order,
    encode_with_feedback,
    error_passing,
    target_variances,
    upper_factor,
)
from kbvq.recipes import Recipe
from kbvq.structures import InputMoments, ProjectionFormat


def row_scales(weights: Tensor) -> Tensor:
    """Root mean square of each weight row, rounded to float16 and never zero: [..., out_features] float32."""
    smallest = torch.finfo(torch.float16).smallest_normal
    return weights.square().mean(-1).sqrt().clamp_min(smallest).half().float()


def column_scales(
    weights: Tensor, recipe: Recipe, distortion: float, *, scale: Tensor, moments: InputMoments
) -> Tensor:
    """Deviation of each channel's targets in error feedback, behind the row scales: [in_features] float32, rounded to
    float16. One codebook then suits the first channels and the last.

    weights: [num_experts, out_features, in_features]. scale: [num_experts, out_features]. moments: of the inputs.
    distortion: of the code (Recipe.distortion).
    """
    order = channel_order(moments.pooled_second_moment(), 1)
    variances, mass = torch.zeros_like(weights[0, 0]), 0.0
    for expert, weight in enumerate(weights):
        factor = _factor(moments, expert, order, recipe)
        own = (weight[:, order] / scale[expert, :, None]).square().mean(0)
        energy = float(scale[expert].square().sum() * moments.mass[expert])
        variances += energy * target_variances(error_passing(factor), own, distortion)
        mass += energy
    smallest = torch.finfo(torch.float16).smallest_normal
    deviations = (variances / max(mass, 1e-30)).sqrt() if mass else torch.ones_like(variances)
    return deviations[order.argsort()].clamp_min(smallest).half().float()


def vector_quantize(
    weights: Tensor,
    format: ProjectionFormat,
    recipe: Recipe,
    *,
    scale: Tensor,
    column_scale: Tensor,
    moments: InputMoments,
    seed: int,
) -> dict[str, Tensor]:
    """Codes and tables, as stored, for the experts of a bank: ŵ = scale · decode(codes) · column_scale.

    weights: [num_experts, out_features, in_features] float32. scale: [num_experts, out_features] > 0. column_scale:
    [in_features] > 0. moments: of the inputs; they matter with the recipe's error feedback only.
    """
    weights = weights / column_scale
    codebook = _fit_codebook(weights / scale[..., None], format, recipe, scale, seed)
    if recipe.error_feedback:
        return _encode_in_order(weights, codebook, recipe, scale, column_scale, moments)
    vectors = (weights / scale[..., None]).unflatten(-1, (-1, format.vector_dim)).flatten(1, 2)
    identity = torch.eye(format.vector_dim, device=weights.device).expand(len(weights), -1, -1)
    codes = codebook.encode(vectors, identity, torch.ones_like(vectors[..., 0]))
    return codebook.pack(codes.unflatten(-1, (weights.shape[1], -1)))


def _fit_codebook(targets: Tensor, format: ProjectionFormat, recipe: Recipe, scale: Tensor, seed: int) -> Codebook:
    """Tables by k-means, one set for each expert or one for all; a row of scale s counts s² times."""
    if format.codebook == "trellis":
        return TrellisCodebook(format)
    vectors = targets.unflatten(-1, (-1, format.vector_dim)).flatten(1, 2)
    if format.signed:
        vectors = vectors.abs()
    mass = scale.square().repeat_interleave(format.num_vectors, 1)
    limit = None
    if recipe.max_vectors_per_codeword is not None:
        limit = recipe.max_vectors_per_codeword * format.codebook_size * format.num_groups
    whole = format.num_codebooks == 1
    groups = [slice(None)] if whole else [slice(expert, expert + 1) for expert in range(len(targets))]
    size, stages = format.codebook_size, format.num_stages
    iterations = recipe.kmeans_iterations
    tables: list[Tensor] = []
    of_codewords: list[Tensor] = []
    for index, group in enumerate(groups):
        of_group, weights, own = vectors[group].flatten(0, 1), mass[group].flatten(), seed + index
        if stages == 1:
            fitted = kmeans(of_group, size, iterations=iterations, seed=own, weights=weights, max_vectors=limit)[None]
        elif format.num_groups == 1:
            fitted = fit_residual_codebooks(
                of_group, stages, size, iterations=iterations, seed=own, weights=weights, max_vectors=limit
            )
        else:
            fitted, of_codeword = fit_grouped_codebooks(
                of_group,
                stages,
                size,
                format.num_groups,
                iterations=iterations,
                seed=own,
                weights=weights,
                max_vectors=limit,
            )
            of_codewords.append(of_codeword)
        tables.append(fitted)
    return TableCodebook(format, torch.stack(tables), torch.stack(of_codewords) if of_codewords else None)


def _encode_in_order(
    weights: Tensor, codebook: Codebook, recipe: Recipe, scale: Tensor, column_scale: Tensor, moments: InputMoments
) -> dict[str, Tensor]:
    """Codes with error feedback under each expert's moments, after refitting the tables to the weighted error."""
    dim = codebook.vector_dim
    order = channel_order(moments.pooled_second_moment(), dim)
    ordered = weights[..., order]
    factor = weights.new_empty(len(weights), len(order), len(order))
    for expert in range(len(weights)):
        # Channels divided by their scale see inputs multiplied by it.
        torch.mul(column_scale[order, None], _factor(moments, expert, order, recipe), out=factor[expert])
    for _ in range(recipe.refits):
        refit = codebook.refit()
        if refit is None:
            break
        encode_with_feedback(ordered, factor, codebook, scale, refit)
        codebook = refit.solve()
    codes = encode_with_feedback(ordered, factor, codebook, scale)
    vector_order = order[::dim] // dim
    return codebook.pack(codes[..., vector_order.argsort()])


def _factor(moments: InputMoments, expert: int, order: Tensor, recipe: Recipe) -> Tensor:
    """M of an expert's inputs, channels in coding order."""
    second_moment, _ = moments.expert_moments(expert, recipe.prior_tokens)
    return upper_factor(second_moment[order][:, order], recipe.damping)
