"""Second-order vector quantization: each group of channels is coded for the errors already made before it.

The weighted error of a row is (w − ŵ) H (w − ŵ)ᵀ, H the second moment of the inputs. With H = M Mᵀ, M upper
triangular, column group g of (W − Ŵ) M is

    (W_g + Σ_{l<g} (W − Ŵ)_l M_{l,g} M_gg⁻¹ − Ŵ_g) M_gg,

so coding the groups in order, each with its target in brackets and the metric of M_gg, is block LDLQ (Chee et al.
2023, QuIP; the same as GPTQ with column groups, Frantar et al. 2022, van Baalen et al. 2024, GPTVQ). M comes from one
Cholesky factorisation of H with rows and columns flipped; no inverse of H is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.codes.codebooks import Codebook, FeedbackBlock, Refit
from kbvq.errors import NumericalError
from kbvq.structures import blocks

_BLOCK = 128  # channels whose feedback from earlier blocks is computed in one product, as in GPTQ
_INVERTED = 512  # columns of a triangular inverse solved for at once
_SIMULATED = 512  # rows of errors


def upper_factor(second_moment: Tensor, damping: float, sampling_damping: float = 0.0) -> Tensor:
    """M, upper triangular, with M Mᵀ = H + (damping · mean(diag H) + sampling_damping · median(diag H)) · I.

    The median: a channel of massive activations owns the mean, and has no part in the sampling error of the others.
    second_moment: [..., n, n] symmetric positive semidefinite. Factorised in float64. Returns [..., n, n] float32.
    Raises NumericalError when it cannot be factorised even so.
    """
    moment = second_moment.flip(-1, -2).double()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    mean, median = diagonal.mean(-1, keepdim=True), diagonal.median(-1, keepdim=True).values
    diagonal += damping * mean + sampling_damping * median
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.any():
        raise NumericalError("the second moment of the inputs is not positive definite; use more calibration tokens")
    return factor.float().flip(-1, -2)


def channel_order(second_moment: Tensor, vector_dim: int) -> Tensor:
    """Order in which the channels are coded, [n] int64: whole vectors, those with the largest inputs first.

    The channels coded last have nobody left to make up for their errors, so they should be those that matter least.
    Vectors stay whole, so that nothing about the order has to be stored. second_moment: [n, n], pooled.
    """
    energy = second_moment.diagonal().view(-1, vector_dim).sum(1)
    first = energy.argsort(descending=True, stable=True) * vector_dim
    return (first[:, None] + torch.arange(vector_dim, device=first.device)).flatten()


def error_passing(factor: Tensor) -> Tensor:
    """What share of a white error of channel l arrives in the target of channel j: (M⁻¹)²_lj M_ll² for l < j, else 0.

    factor: M, upper triangular, [n, n]. Returns [n, n].
    """
    passing, squares = torch.zeros_like(factor), factor.diagonal().square()[:, None]
    for columns in blocks(len(factor), _INVERTED):  # of M⁻¹, which take no more than the rows down to the diagonal
        stop = columns.stop
        identity = factor.new_zeros(stop, stop - columns.start)
        identity[columns].fill_diagonal_(1)
        inverse = torch.linalg.solve_triangular(factor[:stop, :stop], identity, upper=True)
        torch.mul(inverse.square_(), squares[:stop], out=passing[:stop, columns])
    return passing.triu_(1)


def target_variances(passing: Tensor, variances: Tensor, distortion: float) -> Tensor:
    """Variance of the targets that error feedback makes of weights of known variance, channel by channel.

    A channel is coded together with what the errors before it leave to it, so targets vary more than weights, the last
    channels most. With white errors of variance `distortion` · V_l · M_ll² in the coordinates of M, the target of
    channel j is the weight minus Σ_{l<j} (coordinate l) (M⁻¹)_lj, so V_j = variance_j + distortion · Σ_{l<j} passing_lj
    V_l.

    passing: `error_passing` of M, [n, n]. variances: of the weights in the same order, [n], or [n, k] for several
    problems. Returns the same shape.
    """
    unit_lower = passing.mT * -distortion  # its diagonal counts as ones: V = variances + distortion · passingᵀ V
    columns = variances.view(len(variances), -1)
    return torch.linalg.solve_triangular(unit_lower, columns, upper=False, unitriangular=True).view_as(variances)


def simulated_target_variances(factor: Tensor, variances: Tensor, distortion: float) -> Tensor:
    """As `target_variances` of M, from _SIMULATED rows of white errors that are passed on: right within 6 % (one
    standard deviation), for n² operations a row instead of n³/3.

    factor: M, upper triangular, [n, n]. variances: of the weights in the same order, [n]. Returns [n].
    """
    n = len(factor)
    white = torch.randn(_SIMULATED, n, generator=torch.Generator().manual_seed(0)).to(factor.device)
    error, found = torch.empty_like(white), torch.empty_like(variances)
    for block in blocks(n, _BLOCK):
        own = factor[block, block]
        carried = error[:, : block.start] @ factor[: block.start, block]
        arriving = torch.linalg.solve_triangular(own, carried, upper=True, left=False).square_().mean(0)
        found[block] = target_variances(error_passing(own), variances[block] + arriving, distortion)
        coordinates = white[:, block] * (distortion * found[block]).sqrt() * own.diagonal()
        error[:, block] = torch.linalg.solve_triangular(own, coordinates - carried, upper=True, left=False)
    return found


def encode_with_feedback(
    weights: Tensor,
    factor: Tensor,
    codebook: Codebook,
    scale: Tensor,
    refit: Refit | None = None,
    *,
    importance: Tensor | None = None,
) -> Tensor:
    """Codes of all experts of a bank in coding order.

    weights: [E, out_features, n] float32, channels in coding order. factor: M of each expert, [E, n, n].
    scale: [E, out_features] > 0; ŵ = scale · decode(code). refit: takes part in every choice made (codebooks).
    importance: [E, out_features], what a squared error of a row's output counts, or None for all alike; codes that are
    of one row each are the same whatever it is.
    Returns integers [num_planes, E, out_features, n / vector_dim].
    """
    num_experts, out_features, n = weights.shape
    dim = codebook.vector_dim
    shape = (codebook.num_planes, num_experts, out_features, n // dim)
    codes = torch.empty(shape, dtype=codebook.code_dtype, device=weights.device)
    if not num_experts:
        return codes
    mass = scale.square() if importance is None else scale.square() * importance
    error = torch.empty_like(weights)  # W − Ŵ of the channels coded so far
    carried = weights.new_empty(num_experts, out_features, _BLOCK)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        if end - start < _BLOCK:
            carried = weights.new_empty(num_experts, out_features, end - start)
        torch.bmm(error[..., :start], factor[:, :start, start:end], out=carried)
        block = FeedbackBlock(
            weights[..., start:end],
            carried,
            factor[:, start:end, start:end],
            scale,
            mass,
            codes[..., start // dim : end // dim],
            error[..., start:end],
        )
        if not codebook.code_block(block, refit):
            _code_block(block, codebook, refit)
    return codes


def _code_block(block: FeedbackBlock, codebook: Codebook, refit: Refit | None) -> None:
    """Codes of a block of channels, group by group."""
    dim, width = codebook.vector_dim, block.weights.shape[-1]
    for start in range(0, width, dim):
        stop = start + dim
        metric = block.factor[:, start:stop, start:stop]
        carried = block.carried[..., start:stop]
        solved = torch.linalg.solve_triangular(metric, carried, upper=True, left=False) if dim > 1 else carried / metric
        target = (block.weights[..., start:stop] + solved) / block.scale[..., None]
        chosen = codebook.encode(target, metric, block.mass)
        block.codes[..., start // dim] = chosen
        block.error[..., start:stop] = block.weights[..., start:stop] - block.scale[..., None] * codebook.decode(chosen)
        if stop < width:
            rest = block.carried[..., stop:]
            rest.baddbmm_(block.error[..., start:stop], block.factor[:, start:stop, stop:])
        if refit is not None:
            refit.add(chosen, target, metric, block.mass)
