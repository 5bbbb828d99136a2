"""How far a quantized projection is from the Shannon limit for Gaussian weights under its inputs' metric.

D*(R) = Σ_j min(θ, κ_j) with R = (1/in_features) Σ_j max(0, ½ log₂(κ_j/θ)): reverse water-filling over the
eigenvalues κ of H^½ Σ_w H^½ (Cover & Thomas, section 10.3.3), H the second moment of the inputs, Σ_w that of the
weight rows over all experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weighted_spectrum(second_moment: Tensor, row_moment: Tensor) -> Tensor:
    """Eigenvalues κ of H^½ Σ_w H^½, [in_features] float64 >= 0, ascending.

    second_moment, row_moment: [in_features, in_features] symmetric positive semidefinite.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(second_moment.double())
    root = (eigenvectors * eigenvalues.clamp_min(0).sqrt()) @ eigenvectors.T
    return torch.linalg.eigvalsh(root @ row_moment.double() @ root).clamp_min(0)


def shannon_distortion(spectrum: Tensor, bits_per_weight: float) -> float:
    """Least weighted error per row, E[(w − ŵ) H (w − ŵ)ᵀ], that any code of that rate can reach (Gaussian rows).

    spectrum: [in_features] from `weighted_spectrum`. The water level θ is found by bisection on log θ.
    """
    spectrum = spectrum.double()
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
    """tr(Δ H Δᵀ) / out_features: squared output error per row. difference Δ [out_features, in_features]."""
    difference = difference.double()
    return ((difference @ second_moment.double()) * difference).sum().item() / len(difference)


def bits_above_limit(distortion: float, limit: float) -> float:
    """½ log₂(D/D*): the rate a perfect code would save at the same error."""
    return 0.5 * math.log2(distortion / limit) if distortion > 0 and limit > 0 else 0.0
