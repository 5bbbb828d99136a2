"""Bias-corrected output stabilization: a scale and a bias per output channel that restore the output statistics.

KBVQ-MoE's BCOS (arXiv 2602.11184, section 4.2): y = (1 + s) ⊙ (Ŵ x) + b with
s = σ_y/σ_ŷ − 1 and b = μ_y − (1 + s) μ_ŷ, moments over the tokens routed to the expert. The moments of a linear
map follow from those of its inputs, μ_y = W μ_x and σ_y² = diag(W (M − μ μᵀ) Wᵀ), so no token is stored.

Where we differ from the paper:
- the moments of y are of the original model's inputs, those of ŷ of the inputs in the model as quantized so far, so a
  correction also makes up for what the layers before it lost;
- of a projection that is coded toward other weights than the original ones (target_weights), μ_y is the mean wanted
  and σ_y what those weights give on the student's inputs;
- both are shrunk toward the moments of all experts of the bank by a few virtual tokens (Recipe.prior_tokens), so that
  an expert without tokens has moments too, and count a token by its squared routing weight where the recipe says so;
- 1 + s stays within SLOPE_LIMITS, and is 1 for a channel of ŷ that does not vary (`bias_correction`);
- the slope is multiplied into the row scale and both are stored in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbvq.method.quadratic_form import quadratic_forms

SLOPE_LIMITS = (0.2, 5.0)
"""Bounds on 1 + s. The paper has none; a channel outside them has next to no variance to match. The bias is
computed with the slope as bounded, so that the mean is met in any case."""


def output_moments(weight: Tensor, second_moment: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel of y = W x.

    weight [out_features, in_features], second_moment E[x xᵀ] [in_features, in_features], mean E[x] [in_features].
    Returns (mean [out_features], standard deviation [out_features]), float32.
    """
    variance = quadratic_forms(weight, second_moment, mean)
    return weight.float() @ mean.float(), variance.clamp_min(0).sqrt()


def bias_correction(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Slope 1 + s and bias b per output channel, both [out_features] float32.

    teacher, student: (mean, standard deviation) of y and of ŷ per channel. A channel whose ŷ does not vary
    keeps slope 1 and takes the difference of the means as its bias.
    """
    (mean, deviation), (student_mean, student_deviation) = teacher, student
    floor = 1e-6 * deviation.square().mean().sqrt()
    slope = torch.where(student_deviation > floor, deviation / student_deviation.clamp_min(1e-30), 1.0)
    slope = slope.clamp(*SLOPE_LIMITS)
    return slope.float(), (mean - slope * student_mean).float()
