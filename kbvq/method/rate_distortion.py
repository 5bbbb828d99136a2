"""How far a quantized projection is from the Shannon limit for Gaussian weights under its inputs' metric.

D*(R) = Σ_j min(θ, κ_j) with R = (1/in_features) Σ_j max(0, ½ log₂(κ_j/θ)): reverse water-filling over the
eigenvalues κ of H^½ Σ_w H^½ (Cover & Thomas, section 10.3.3), H the second moment of an expert's inputs, Σ_w that of
its weight rows. A Σ_w estimated from fewer rows than it has columns has null directions that cost nothing, and its
limit lies bits below the true one; `row_moment` therefore shrinks it as far as the rows demand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbvq.method.quadratic_form import quadratic_forms


def row_moment(rows: Tensor) -> Tensor:
    """Second moment of weight rows with its off-diagonal part shrunk, [in_features, in_features] float64.

    rows: [n, in_features]. The factor 1 − λ is that of Ledoit and Wolf (2004) for a diagonal target: λ is the variance
    of the off-diagonal entries, estimated from the rows, over what is found there; 1 for rows without correlation,
    near 0 where there are many more rows than columns.
    """
    rows = rows.double()
    moment = rows.T @ rows / len(rows)
    diagonal = moment.diagonal().clone()
    found = moment.square().sum() - diagonal.square().sum()
    squares = rows.square()
    fourth = squares.sum(1).square().sum() - squares.square().sum()
    variance = (fourth / len(rows) - found) / len(rows)
    moment *= 1 - (variance / found.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
    moment.diagonal().copy_(diagonal)
    return moment


def weighted_spectrum(second_moment: Tensor, row_moment: Tensor) -> Tensor:
    """Eigenvalues κ of H^½ Σ_w H^½, [in_features] float64 >= 0, ascending.

    second_moment, row_moment: [in_features, in_features] symmetric positive semidefinite. They are the eigenvalues of
    Lᵀ H L too, Σ_w = L Lᵀ, which takes a Cholesky decomposition in the place of a second eigenvalue problem.
    """
    lengths = row_moment.diagonal().double().clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    correlation = inverse[:, None] * row_moment.double() * inverse
    # As much as float32 moments are wrong by, so that those without full rank have a root too.
    correlation.diagonal().copy_(torch.full_like(lengths, 1 + 1e-6))
    root = lengths[:, None] * torch.linalg.cholesky(correlation)
    return torch.linalg.eigvalsh(root.T @ second_moment.double() @ root).clamp_min(0)


def shannon_distortion(spectrum: Tensor, bits_per_weight: float) -> float:
    """Least weighted error per row, E[(w − ŵ) H (w − ŵ)ᵀ], that any code of that rate can reach (Gaussian rows).

    spectrum: [in_features] from `weighted_spectrum`. The water level θ is found by bisection on log θ.
    """
    spectrum = spectrum.double().cpu()  # the search below asks for a number in every step
    largest = float(spectrum.max())
    if largest <= 0:
        return 0.0
    positive = spectrum[spectrum > largest * 1e-30]
    low, high = math.log(largest) - 80.0, math.log(largest)
    for _ in range(80):
        middle = (low + high) / 2
        rate = 0.5 * (positive.log() - middle).clamp_min(0).sum().item() / math.log(2) / len(spectrum)
        low, high = (middle, high) if rate > bits_per_weight else (low, middle)
    return positive.clamp_max(math.exp(low)).sum().item()


def weighted_error(difference: Tensor, second_moment: Tensor) -> float:
    """tr(Δ H Δᵀ) / out_features: squared output error per row. difference Δ [out_features, in_features], H symmetric
    positive semidefinite; products in float32, their sum in float64."""
    return quadratic_forms(difference, second_moment).sum(dtype=torch.float64).item() / len(difference)


def bits_above_limit(distortion: float, limit: float) -> float:
    """½ log₂(D/D*): the rate a perfect code would save at the same error."""
    return 0.5 * math.log2(distortion / limit) if distortion > 0 and limit > 0 else 0.0
