"""One projection of a bank, from weights and statistics to the packed form: shared basis, codes, correction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbvq.codes.packing import decode_factors, dequantize_expert, expand
from kbvq.errors import NumericalError
from kbvq.method.bias_correction import SLOPE_LIMITS, bias_correction, output_moments
from kbvq.method.rate_distortion import (
    bits_above_limit,
    row_moment,
    shannon_distortion,
    weighted_error,
    weighted_spectrum,
)
from kbvq.method.shared_basis import shared_low_rank
from kbvq.method.target_weights import Goal
from kbvq.method.team import ALONE, Team, gather
from kbvq.method.vector_quantization import (
    Factors,
    column_scales,
    row_scales,
    row_slopes,
    suited_levels,
    vector_quantize,
)
from kbvq.recipes import Recipe
from kbvq.structures import MakeZeros, Moments, PackedProjection, ProjectionFormat

LIMIT_EXPERTS = 4
"""Experts of a projection whose limit is computed: each takes an eigenvalue problem, and that of all experts together
would cost more than the quantization."""

SPECTRUM_POINTS = 33


@dataclass(frozen=True)
class ProjectionReport:
    """What quantizing one projection cost and kept.

    relative_error: Σ_e tr(Δ H_e Δᵀ) / Σ_e tr(W H_e Wᵀ), Δ = W − Ŵ without bias, H_e the inputs' second moments.
    bits_above_limit: ½ log₂(D/D*) of an expert at the projection's true bits per weight, against the Gaussian Shannon
        limit of its rows under its inputs; mean over at most LIMIT_EXPERTS experts.
    relative_error_by_expert: as relative_error, of each expert alone.
    spectrum: share of the weighted energy in the strongest directions, at SPECTRUM_POINTS even steps from none to all;
        mean over the experts whose limit is computed.
    """

    bits_per_weight: float
    code_bits: float
    rank: int
    relative_error: float
    bits_above_limit: float
    relative_error_by_expert: tuple[float, ...]
    spectrum: tuple[float, ...]


def quantize_projection(
    weights: Tensor,
    teacher: Moments,
    student: Moments,
    format: ProjectionFormat,
    recipe: Recipe,
    *,
    seed: int,
    bias: Tensor | None = None,
    goal: Goal | None = None,
    importance: Tensor | None = None,
    team: Team = ALONE,
    make: MakeZeros = torch.zeros,
) -> PackedProjection:
    """KBVQ-MoE for one projection of a bank: steps 1 to 7 of the method (shared_basis, vector_quantization,
    bias_correction). The paper treats gate and up as two matrices; here they are one, as transformers stores them, with
    one basis and one codebook: they see the same inputs, and it halves what those cost.

    weights: [num_experts, out_features, in_features] of the original model.
    teacher: moments of the inputs in the original model. student: of the inputs in the quantized model so far,
        which are those that the packed projection will see. Both on the device of `weights`.
    format: how it will be stored, one that the recipe plans (Recipe.projection_format); but for a trellis code's
        levels, which are chosen here.
    bias: of the original projection, [num_experts, out_features], stored together with that of the correction.
    goal: weights to be coded in their place. The correction then restores the mean that they aim at, and the deviation
        that they themselves give, instead of the teacher's.
    importance: of the rows of a trellis code, [num_experts, out_features]: what a squared error of their outputs
        counts; None for all alike.
    team: that shares the experts; all of it gets the result. Codes and corrections are those of one process, but where
        tables are refitted, whose sums it adds up in another order. Tables of single experts are not shared out.
    make: the factors of the moments of all experts.
    Raises NumericalError when a stored value would overflow float16.
    """
    weights = weights.float() if goal is None else goal.weights
    tensors: dict[str, Tensor] = {}
    residual = weights
    if format.rank:
        moment = student.pooled_second_moment() if recipe.klt else None
        basis, coefficients = shared_low_rank(weights, moment, format.rank)
        residual = weights - coefficients @ basis
    scale = row_scales(residual) if recipe.row_scale else torch.ones_like(weights[..., 0])
    columns = torch.ones_like(weights[0, 0])
    factors, team = None, team if format.num_codebooks == 1 else ALONE
    if recipe.error_feedback:
        factors = Factors(student, recipe, format.vector_dim, team.share(len(weights)), make)
    if format.has_column_scale and factors is not None:
        columns = column_scales(
            residual, recipe.distortion(format), scale=scale, mass=student.mass, factors=factors, team=team
        )
        tensors["column_scale"] = columns.half()
    if format.rank:
        tensors |= _store_factors(basis / columns, coefficients / scale[..., None], format.factor_dtype)
        _check_finite(tensors)
        coefficients, basis = decode_factors(tensors)
        residual = weights - scale[..., None] * (coefficients @ basis) * columns
    if format.codebook == "trellis" and factors is not None:
        format = suited_levels(residual, format, scale=scale, mass=student.mass, factors=factors, team=team)
    tensors |= vector_quantize(
        residual,
        format,
        recipe,
        scale=scale,
        column_scale=columns,
        factors=factors,
        seed=seed,
        importance=importance if format.codebook == "trellis" else None,
        team=team,
    )
    del factors
    if format.has_scale:
        tensors["scale"] = scale.half() * weights.any(-1)  # not every code has a codeword of zeros for a row of zeros
    if recipe.bcos:
        corrected = _correct_outputs(weights, format, tensors, teacher, student, recipe, goal, team)
        tensors |= corrected if format.has_bias else {"scale": corrected["scale"]}
    elif recipe.row_scale:
        tensors["scale"] = _least_squares_scale(weights, format, tensors, student, recipe.prior_tokens)
    if bias is not None:
        tensors["bias"] = (bias.float() + tensors.get("bias", torch.zeros_like(bias)).float()).half()
    _check_finite(tensors)
    return PackedProjection(format, tensors)


def report_projection(
    weights: Tensor, packed: PackedProjection, student: Moments, *, prior_tokens: float, team: Team = ALONE
) -> ProjectionReport:
    """Weighted error of a packed projection and its distance from the Shannon limit (rate_distortion). team: shares the
    experts; all of it gets the report."""
    bits = 8 * packed.format.num_bytes / packed.format.num_weights
    limited, experts = range(0, len(weights), -(-len(weights) // LIMIT_EXPERTS)), team.share(len(weights))
    form = expand(packed.format, packed.tensors)
    # error, energy, bits above the limit, spectrum
    own = torch.zeros(len(experts), 3 + SPECTRUM_POINTS, dtype=torch.float64)
    for row, expert in zip(own, experts, strict=True):
        second_moment, _ = student.expert_moments(expert, prior_tokens)
        quantized = dequantize_expert(*form, expert)
        row[0] = lost = weighted_error(weights[expert] - quantized, second_moment)
        row[1] = weighted_error(weights[expert], second_moment)
        if expert in limited:
            spectrum = _spectrum(second_moment, weights[expert])
            row[2] = bits_above_limit(lost, shannon_distortion(spectrum, bits))
            row[3:] = _shares(spectrum)
    found = gather(team, own.to(weights.device), len(weights)).cpu()
    error, energy = found[:, :2].sum(0).tolist()
    return ProjectionReport(
        bits_per_weight=bits,
        code_bits=8 * packed.format.code_bytes / packed.format.num_weights,
        rank=packed.format.rank,
        relative_error=error / energy if energy else 0.0,
        bits_above_limit=found[limited, 2].mean().item(),
        relative_error_by_expert=tuple(lost / own if own else 0.0 for lost, own in found[:, :2].tolist()),
        spectrum=tuple(found[limited, 3:].mean(0).tolist()),
    )


def _spectrum(second_moment: Tensor, weight: Tensor) -> Tensor:
    return weighted_spectrum(second_moment, row_moment(weight))


def _shares(spectrum: Tensor) -> Tensor:
    """Share of the sum of ascending eigenvalues in the largest, at SPECTRUM_POINTS even steps from none to all."""
    sums = torch.cat([spectrum.new_zeros(1), spectrum.flip(0).cumsum(0)])
    steps = torch.linspace(0, len(spectrum), SPECTRUM_POINTS, dtype=torch.float64).round().long()
    return sums[steps] / sums[-1].clamp_min(1e-30)


def _store_factors(basis: Tensor, coefficients: Tensor, factor_dtype: str) -> dict[str, Tensor]:
    """Basis and coefficients as stored: float16, or int8 with one scale per basis row and per expert's column."""
    if factor_dtype == "float16":
        return {"basis": basis.half(), "coefficients": coefficients.half()}
    smallest = torch.finfo(torch.float16).smallest_normal
    basis_scale = (basis.abs().amax(1) / 127).clamp_min(smallest).half()
    coefficients_scale = (coefficients.abs().amax(1) / 127).clamp_min(smallest).half()
    return {
        "basis": (basis / basis_scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8),
        "basis_scale": basis_scale,
        "coefficients": (coefficients / coefficients_scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8),
        "coefficients_scale": coefficients_scale,
    }


def _correct_outputs(
    weights: Tensor,
    format: ProjectionFormat,
    tensors: dict[str, Tensor],
    teacher: Moments,
    student: Moments,
    recipe: Recipe,
    goal: Goal | None,
    team: Team,
) -> dict[str, Tensor]:
    """Scale and bias after BCOS: the slope multiplies the row scale. Both float16."""
    experts, form, prior_tokens = team.share(len(weights)), expand(format, tensors), recipe.prior_tokens
    scales, biases = (weights.new_empty(len(experts), weights.shape[1]) for _ in range(2))
    for place, expert in enumerate(experts):
        weight = weights[expert]
        of_student = student.expert_moments(expert, prior_tokens)
        if goal is None:
            wanted = output_moments(weight, *teacher.expert_moments(expert, prior_tokens))
        else:
            wanted = goal.mean[expert], output_moments(weight, *of_student)[1]
        quantized = dequantize_expert(*form, expert)
        given = output_moments(quantized, *of_student)
        if recipe.bcos_part == "mean":
            wanted = (wanted[0], given[1])
        slope, biases[place] = bias_correction(wanted, given)
        scales[place] = tensors["scale"][expert].float() * slope
    scales, biases = (gather(team, own, len(weights)) for own in (scales, biases))
    return {"scale": scales.half(), "bias": biases.half()}


def _least_squares_scale(
    weights: Tensor, format: ProjectionFormat, tensors: dict[str, Tensor], student: Moments, prior_tokens: float
) -> Tensor:
    """Row scales times the slope that minimises each row's weighted error, within SLOPE_LIMITS like the correction's:
    the outputs of a row that hardly counts may be next to nothing. float16."""
    scales = []
    form = expand(format, tensors)
    for expert, weight in enumerate(weights):
        quantized = dequantize_expert(*form, expert)
        slope = row_slopes(weight, quantized, student.expert_moments(expert, prior_tokens)[0]).clamp(*SLOPE_LIMITS)
        scales.append(tensors["scale"][expert].float() * slope)
    return torch.stack(scales).half()


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericalError(f"{name} leaves the range of float16; the weights or their statistics are extreme")
