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

from kbvq.errors import NumericalError
from kbvq.kmeans import nearest_codewords

_BLOCK = 128  # channels whose feedback from earlier blocks is computed in one product, as in GPTQ


def upper_factor(second_moment: Tensor, damping: float) -> Tensor:
    """M, upper triangular, with M Mᵀ = H + damping · mean(diag H) · I.

    second_moment: [..., n, n] symmetric positive semidefinite. Factorised in float64. Returns [..., n, n] float32.
    Raises NumericalError when it cannot be factorised even so.
    """
    moment = second_moment.double()
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = moment + (damping * mean)[..., None, None] * torch.eye(moment.shape[-1], device=moment.device)
    factor, failed = torch.linalg.cholesky_ex(damped.flip(-1, -2))
    if failed.any():
        raise NumericalError("the second moment of the inputs is not positive definite; use more calibration tokens")
    return factor.flip(-1, -2).float()


def channel_order(second_moment: Tensor, vector_dim: int) -> Tensor:
    """Order in which the channels are coded, [n] int64: whole vectors, those with the largest inputs first.

    The channels coded last have nobody left to make up for their errors, so they should be those that matter least.
    Vectors stay whole, so that nothing about the order has to be stored. second_moment: [n, n], pooled.
    """
    energy = second_moment.diagonal().view(-1, vector_dim).sum(1)
    first = energy.argsort(descending=True, stable=True) * vector_dim
    return (first[:, None] + torch.arange(vector_dim, device=first.device)).flatten()


def encode_with_feedback(
    weights: Tensor, factor: Tensor, codebooks: Tensor, scale: Tensor, *, refit: bool
) -> tuple[Tensor, Tensor]:
    """Codes of all experts of a bank in coding order, and the codebooks refitted to them.

    weights: [E, out_features, n] float32, channels in coding order. factor: M of each expert, [E, n, n].
    codebooks: [E or 1, codebook_size, vector_dim] float32. scale: [E, out_features] > 0; ŵ = scale · codeword.
    Returns (codes [E, out_features, n / vector_dim] int64, codebooks). With `refit`, each codeword is the minimiser of
    the weighted error of the targets that chose it (the maximisation step of Hessian-weighted EM); else as given.
    """
    num_experts, out_features, n = weights.shape
    size, dim = codebooks.shape[1:]
    shared = len(codebooks) == 1
    each = codebooks.expand(num_experts, -1, -1)
    codes = torch.empty(num_experts, out_features, n // dim, dtype=torch.int64, device=weights.device)
    error = torch.empty_like(weights)  # W − Ŵ of the channels coded so far
    mass = scale.square()
    offset = torch.arange(num_experts, device=weights.device)[:, None] * size
    normal = torch.zeros(num_experts, size, dim, dim, device=weights.device)
    right = torch.zeros(num_experts, size, dim, device=weights.device)
    for block in range(0, n, _BLOCK):
        end = min(block + _BLOCK, n)
        from_before = torch.bmm(error[..., :block], factor[:, :block, block:end])
        for start in range(block, end, dim):
            stop = start + dim
            metric = factor[:, start:stop, start:stop]
            carried = from_before[..., start - block : stop - block]
            carried = carried + torch.bmm(error[..., block:start], factor[:, block:start, start:stop])
            feedback = torch.linalg.solve_triangular(metric, carried, upper=True, left=False)
            target = (weights[..., start:stop] + feedback) / scale[..., None]
            chosen = nearest_codewords(target @ metric, each @ metric)
            codes[..., start // dim] = chosen
            decoded = each.gather(1, chosen[..., None].expand(-1, -1, dim))
            error[..., start:stop] = weights[..., start:stop] - scale[..., None] * decoded
            if refit:
                cells = (chosen + offset).flatten()
                cell_mass = mass.new_zeros(num_experts * size).index_add_(0, cells, mass.flatten())
                sums = target.new_zeros(num_experts * size, dim)
                sums.index_add_(0, cells, (target * mass[..., None]).flatten(0, 1))
                square = metric @ metric.mT
                normal += cell_mass.view(num_experts, size, 1, 1) * square[:, None]
                right += sums.view(num_experts, size, dim) @ square
    if not refit:
        return codes, codebooks
    if shared:
        normal, right = normal.sum(0, keepdim=True), right.sum(0, keepdim=True)
    return codes, _solve_codewords(normal, right, codebooks)


def _solve_codewords(normal: Tensor, right: Tensor, codebooks: Tensor) -> Tensor:
    """Codewords c with normal · c = right; a slight pull toward the old ones keeps empty and thin cells in place."""
    dim = codebooks.shape[-1]
    trace = normal.diagonal(dim1=-2, dim2=-1).sum(-1)
    pull = torch.where(trace > 0, 1e-4 * trace / dim, torch.ones_like(trace))
    identity = torch.eye(dim, device=normal.device)
    solved = torch.linalg.solve(
        (normal + pull[..., None, None] * identity).double(), (right + pull[..., None] * codebooks).double()
    )
    return solved.float()
