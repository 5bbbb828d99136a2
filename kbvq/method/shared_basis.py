"""KLT-guided SVD: the low-rank structure that the experts of a bank share.

KBVQ-MoE's input-driven redundancy elimination (IDRE, arXiv 2602.11184, section 4.1). With C = E[x xᵀ] = U Λ Uᵀ
and G = U Λ^½, the top-k right singular vectors V_k of the stack [W¹G; …; WᴱG] give

    basis = V_kᵀ G⁻¹  [k, in_features]   shared by all experts,
    coefficients_e = W_e G V_k  [out_features, k]   private,

the rank-k part, with one row space for all experts, that minimises Σ_e ‖(W_e − coefficients_e basis) G‖²
(Eckart–Young).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.errors import NumericalError

DAMPING = 1e-4
"""Added to Λ, as a fraction of its mean: directions no token excites keep a finite G⁻¹. The paper does not say."""


def whitening_map(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """(G, G⁻¹) with G Gᵀ = C + damping, both [in_features, in_features] float64.

    second_moment: [in_features, in_features], symmetric positive semidefinite.
    Raises NumericalError if it is not finite or is zero (no token reached the bank).
    """
    moment = second_moment.double()
    if not torch.isfinite(moment).all():
        raise NumericalError(
            "the second moment of the inputs is not finite; check the calibration text and the weights"
        )
    eigenvalues, eigenvectors = torch.linalg.eigh((moment + moment.T) / 2)
    mean = eigenvalues.mean()
    if mean <= 0:
        raise NumericalError("the second moment of the inputs is zero: no calibration token reached these experts")
    roots = (eigenvalues.clamp_min(0) + DAMPING * mean).sqrt()
    return eigenvectors * roots, (eigenvectors / roots).T


def shared_low_rank(weights: Tensor, second_moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Basis shared by the experts and their private coefficients; share_e = coefficients_e @ basis.

    weights: [num_experts, out_features, in_features], any float dtype.
    second_moment: [in_features, in_features] of the inputs, or None for a plain SVD (no KLT: G = I).
    rank: 1 … in_features.
    Returns (basis [rank, in_features], coefficients [num_experts, out_features, rank]), float32. Rows of
    the basis are scaled to largest magnitude 1 so that 16- or 8-bit storage fits them; the coefficients
    take the inverse scale.

    V_k comes from the eigenvectors of the [in, in] Gram matrix Gᵀ (Σ_e WᵀW) G in float64: squaring the
    singular values is harmless there for the leading ones, and the stack of E·out rows is never formed.
    """
    gram = torch.zeros(weights.shape[-1], weights.shape[-1], dtype=torch.float64, device=weights.device)
    for weight in weights:
        weight = weight.double()
        gram.addmm_(weight.T, weight)
    if second_moment is None:
        to_whitened = from_whitened = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    else:
        to_whitened, from_whitened = whitening_map(second_moment.to(gram.device))
    _, vectors = torch.linalg.eigh(to_whitened.T @ gram @ to_whitened)
    leading = vectors[:, -rank:].flip(1)
    basis = leading.T @ from_whitened
    row_scale = basis.abs().amax(1, keepdim=True)
    projector = (to_whitened @ leading * row_scale.T).float()
    coefficients = torch.stack([weight.float() @ projector for weight in weights])
    return (basis / row_scale).float(), coefficients
