"""Vector quantization of the experts' weights: tables by k-means, codes by nearest codeword or with error feedback.

KBVQ-MoE quantizes in weight space without weighting: vectors of `vector_dim` consecutive inputs of a row, one
codebook of 2^(bits·vector_dim) codewords per expert and matrix. Tables are rounded as they will be stored before
the codes are chosen, so that the codes are the best ones for the tables that the reader sees.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from kbvq.codes.codebooks import REFIT_VECTORS, Codebook, NetworkCodebook, Refit, TableCodebook, TrellisCodebook
from kbvq.codes.grouped_residual import fit_grouped_codebooks
from kbvq.codes.kmeans import kmeans
from kbvq.codes.level_choice import NUM_BINS, best_tail, value_histogram
from kbvq.codes.packing import new_network
from kbvq.codes.residual_quantization import fit_residual_codebooks
from kbvq.method.error_feedback import (
    channel_order,
    encode_with_feedback,
    simulated_target_variances,
    upper_factor,
)
from kbvq.method.team import ALONE, Team, gather
from kbvq.recipes import Recipe
from kbvq.structures import MakeZeros, Moments, ProjectionFormat

CODED_AT_ONCE = 1 << 27
"""Weights of as many experts as have so many are coded together: it takes several copies of them."""

EXPERTS_FOR_SCALES = 4
"""Experts whose targets decide a projection's column scales: those with most energy. All have the same scales."""

_MAX_SAMPLING_DAMPING = 1.0  # of an expert that hardly any token reached: its moments are mostly those of all experts

_REFIT_VECTORS = 1024
"""Vectors per codeword by which a table that all experts share is refitted, where k-means draws a subset as well: of
evenly spaced rows."""

_LEAST_REFIT_ROWS = 64  # of an expert; its signs are tabulated anew for each group, whatever the rows

_NETWORK_EPOCHS = 2  # of training before error feedback: what follows it moves the network more


def row_scales(weights: Tensor) -> Tensor:
    """Root mean square of each weight row, rounded to float16 and never zero: [..., out_features] float32."""
    if weights.dim() == 3:  # one expert at a time: the squares of all would be a copy of them
        return torch.stack([row_scales(weight) for weight in weights])
    smallest = torch.finfo(torch.float16).smallest_normal
    return weights.square().mean(-1).sqrt().clamp_min(smallest).half().float()


def row_slopes(weight: Tensor, quantized: Tensor, second_moment: Tensor) -> Tensor:
    """By what each row of a quantized matrix is best multiplied, ⟨w, ŵ⟩_H / ⟨ŵ, ŵ⟩_H: [out_features] float32."""
    weighted = quantized @ second_moment
    return (weighted * weight).sum(1) / (weighted * quantized).sum(1).clamp_min(1e-30)


class Factors:
    """M of the inputs of each expert of this process (error_feedback), channels in coding order: made where they are
    asked for, and kept for as long as somebody holds them.

    order: [in_features], vectors of vector_dim kept whole. experts: those of this process. make: `stacked`.
    """

    def __init__(
        self,
        moments: Moments,
        recipe: Recipe,
        vector_dim: int,
        experts: range,
        make: MakeZeros = torch.zeros,
    ) -> None:
        self.order, self.experts = channel_order(moments.pooled_second_moment(), vector_dim), experts
        self._moments, self._recipe, self._make = moments, recipe, make

    @cached_property
    def stacked(self) -> Tensor:
        """Of all experts of this process, [experts, in_features, in_features]."""
        n = len(self.order)
        stacked = self._make(len(self.experts), n, n, device=self.order.device)
        tokens = self._moments.tokens.tolist()
        for place, expert in enumerate(self.experts):
            second_moment, _ = self._moments.expert_moments(expert, self._recipe.prior_tokens)
            stacked[place] = expert_factor(second_moment[self.order][:, self.order], tokens[expert], self._recipe)
        return stacked


def expert_factor(second_moment: Tensor, tokens: int, recipe: Recipe) -> Tensor:
    """M of an expert's inputs (error_feedback), [in_features, in_features] float32, damped as the recipe says for a
    second moment of so many tokens."""
    sampled = recipe.sampling_damping * len(second_moment) / max(1, tokens)
    return upper_factor(second_moment, recipe.damping, min(sampled, _MAX_SAMPLING_DAMPING))


def column_scales(
    weights: Tensor,
    distortion: float,
    *,
    scale: Tensor,
    mass: Tensor,
    factors: Factors,
    team: Team = ALONE,
) -> Tensor:
    """Deviation of each channel's targets in error feedback, behind the row scales: [in_features] float32, rounded to
    float16. One codebook then suits the first channels and the last.

    weights: [num_experts, out_features, in_features]. scale: [num_experts, out_features]. mass: of the inputs of each
    expert, [num_experts]. factors: of the inputs; where vectors are coded, channels are counted one by one all the
    same. distortion: of the code (Recipe.distortion).
    """
    order = factors.order
    heaviest = (scale.square().sum(1) * mass).topk(min(len(scale), EXPERTS_FOR_SCALES))
    energies = dict(zip(heaviest.indices.tolist(), heaviest.values.tolist(), strict=True))
    variances = weights.new_zeros(len(factors.experts), len(order))
    for place, expert in enumerate(factors.experts):
        if expert not in energies:
            continue
        own = (weights[expert][:, order] / scale[expert, :, None]).square().mean(0)
        variances[place] = simulated_target_variances(factors.stacked[place], own, distortion)
    gathered, total = gather(team, variances, len(weights)), sum(energies.values())
    variances = sum(
        (energy * gathered[expert] for expert, energy in energies.items()), start=torch.zeros_like(weights[0, 0])
    )
    smallest = torch.finfo(torch.float16).smallest_normal
    deviations = (variances / max(total, 1e-30)).sqrt() if total else torch.ones_like(variances)
    return deviations[order.argsort()].clamp_min(smallest).half().float()


def suited_levels(
    weights: Tensor, format: ProjectionFormat, *, scale: Tensor, mass: Tensor, factors: Factors, team: Team = ALONE
) -> ProjectionFormat:
    """A trellis code's format with the levels that suit the weights behind their scales, under their inputs' metric.

    weights: [num_experts, out_features, in_features]. scale: [num_experts, out_features]. mass: of the inputs of each
    expert, [num_experts]. factors: of the inputs, as they are before channels are scaled.
    """
    histogram = torch.zeros(NUM_BINS, dtype=torch.float64, device=weights.device)
    for place, expert in enumerate(factors.experts):
        scaled = weights[expert][:, factors.order] / scale[expert, :, None]
        diagonal = factors.stacked[place].diagonal().square()
        histogram += value_histogram(scaled, mass[expert] * scale[expert].square(), diagonal)
    team.sum_(histogram)
    return replace(format, tail=best_tail(format.trellis_bits, histogram)[0])


def vector_quantize(
    weights: Tensor,
    format: ProjectionFormat,
    recipe: Recipe,
    *,
    scale: Tensor,
    column_scale: Tensor,
    factors: Factors | None,
    seed: int,
    importance: Tensor | None = None,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """Codes and tables, as stored, for the experts of a bank: ŵ = scale · decode(codes) · column_scale.

    weights: [num_experts, out_features, in_features] float32. scale: [num_experts, out_features] > 0. column_scale:
    [in_features] > 0. factors: of the inputs, for error feedback, or None without; used up. importance: of the rows
    (encode_with_feedback). team: codes its experts together.
    """
    if format.codebook == "trellis":
        codebook: Codebook = TrellisCodebook(format)
    else:
        codebook = _fit_codebook((weights / column_scale).div_(scale[..., None]), format, recipe, scale, seed)
    if factors is not None:
        experts, at_once = factors.experts, max(1, CODED_AT_ONCE // weights[0].numel())
        if format.num_codebooks > 1:
            at_once = len(weights)
        groups = [experts[first : first + at_once] for first in range(0, len(experts), at_once)] or [experts]
        return _encode_in_order(weights, codebook, recipe, scale, column_scale, factors, groups, importance, team)
    vectors = (weights / column_scale).div_(scale[..., None]).unflatten(-1, (-1, format.vector_dim)).flatten(1, 2)
    identity = torch.eye(format.vector_dim, device=weights.device).expand(len(weights), -1, -1)
    codes = codebook.encode(vectors, identity, torch.ones_like(vectors[..., 0]))
    return codebook.pack(codes.unflatten(-1, (weights.shape[1], -1)))


def _fit_codebook(targets: Tensor, format: ProjectionFormat, recipe: Recipe, scale: Tensor, seed: int) -> Codebook:
    """Tables by k-means, one set for each expert or one for all; a row of scale s counts s² times. targets: used up."""
    vectors = targets.unflatten(-1, (-1, format.vector_dim)).flatten(1, 2)
    if format.signed:
        vectors = vectors.abs_()
    mass = scale.square().repeat_interleave(format.num_vectors, 1)
    limit = None
    if recipe.max_vectors_per_codeword is not None:
        limit = recipe.max_vectors_per_codeword * format.codebook_size * format.num_groups
    whole = format.num_codebooks == 1
    groups = [slice(None)] if whole else [slice(expert, expert + 1) for expert in range(len(targets))]
    size, stages = format.codebook_size, format.num_stages
    iterations = recipe.kmeans_iterations
    if format.codebook == "rq-moe":
        return _fit_network(vectors.flatten(0, 1), mass.flatten(), format, iterations, limit, seed)
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


def _fit_network(
    vectors: Tensor, mass: Tensor, format: ProjectionFormat, iterations: int, limit: int | None, seed: int
) -> Codebook:
    """The network of rq-moe, from residual tables by k-means on; as published, with the codes of a greedy encoder.

    vectors: [n, d]. mass: [n], how much a vector counts. limit: vectors that k-means trains on, None for all.
    """
    if len(vectors) > REFIT_VECTORS:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:REFIT_VECTORS]
        vectors, mass = vectors[chosen.to(vectors.device)], mass[chosen.to(mass.device)]
    network = (
        new_network(format)
        .to(vectors.device)
        .fit(
            vectors,
            seed=seed,
            weights=mass,
            epochs=_NETWORK_EPOCHS,
            batch_size=1024,
            kmeans_iterations=iterations,
            kmeans_max_vectors=limit,
            progress=False,
        )
    )
    return NetworkCodebook(format, network)


def _refit_step(weights: Tensor, codebook: Codebook, recipe: Recipe) -> int:
    """Of so many rows one is coded for a refit. Tables of single experts and networks take all; a network draws its own
    sample."""
    if not isinstance(codebook, TableCodebook) or len(codebook.tables) > 1 or not recipe.max_vectors_per_codeword:
        return 1
    enough = weights.numel() // (_REFIT_VECTORS * codebook.tables.numel())
    return max(1, min(enough, weights.shape[1] // _LEAST_REFIT_ROWS))


def _encode_in_order(
    weights: Tensor,
    codebook: Codebook,
    recipe: Recipe,
    scale: Tensor,
    column_scale: Tensor,
    factors: Factors,
    groups: list[range],
    importance: Tensor | None,
    team: Team,
) -> dict[str, Tensor]:
    """Codes with error feedback under each expert's moments, after refitting the tables to the weighted error. groups:
    the experts of this process by which of them are coded together."""
    dim, order, first = codebook.vector_dim, factors.order, factors.experts.start
    # Channels divided by their scale see inputs multiplied by it.
    factor = factors.stacked.mul_(column_scale[order, None])

    def encode(group: range, refit: Refit | None = None) -> Tensor:
        own = slice(group.start, group.stop)
        rows = slice(None, None, 1 if refit is None else step)
        ordered = (weights[own, rows] / column_scale)[..., order]
        of_group = factor[own.start - first : own.stop - first]
        counting = None if importance is None else importance[own, rows]
        return encode_with_feedback(ordered, of_group, codebook, scale[own, rows], refit, importance=counting)

    step = _refit_step(weights, codebook, recipe)
    for _ in range(recipe.refits):
        refit = codebook.refit()
        if refit is None:
            break
        for group in groups:
            refit.begin(group.start)
            encode(group, refit)
        team.sum_(*refit.sums)
        codebook = refit.solve()
    codes = torch.cat([encode(group) for group in groups], 1)
    codes = gather(team, codes.transpose(0, 1).contiguous(), len(weights)).transpose(0, 1)
    vector_order = order[::dim] // dim
    return codebook.pack(codes[..., vector_order.argsort()])
