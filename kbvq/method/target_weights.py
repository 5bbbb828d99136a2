"""Weights that make up for what is already lost: the least-squares map from the inputs that a projection will see to
the outputs that it should give.

Second-order coding asks that Ŵ x̃ be near W x̃, x̃ the inputs in the quantized model. But what is wanted are the outputs y
that belong to the original inputs x, and x̃ differs from them by all the errors made before. With paired sums over the
same tokens, the weights to be coded are

    W* = W + (E[y x̃ᵀ] − W E[x̃ x̃ᵀ]) (E[x̃ x̃ᵀ] + ridge)⁻¹

under the metric E[x̃ x̃ᵀ] as before: the error ‖y − Ŵ x̃‖² is that of coding W* plus a constant. This is the asymmetric
calibration of GPTAQ (Li et al. 2025) in closed form; where y is what a whole layer still lacks (quantization.matching),
it also takes back errors that the residual stream carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbvq.method.team import ALONE, Team, gather
from kbvq.structures import InputMoments, MakeZeros

RIDGE = 0.04
"""Pull toward the original weights, as a fraction of the mean second moment of the inputs, with plenty of tokens."""

TOKENS_PER_CHANNEL = 160.0
"""An expert with fewer tokens than that for each input channel is pulled harder, in proportion: its sums would be
fitted, not its function."""


@dataclass(frozen=True)
class TargetSums:
    """Weighted sums over the tokens of each expert of wanted outputs y and the inputs x̃ that are to give them.

    cross_sum: [num_experts, outputs, in_features] float32, Σ y x̃ᵀ. output_sum: [num_experts, outputs], Σ y. The weights
    are those of the InputMoments gathered beside them.
    """

    cross_sum: Tensor
    output_sum: Tensor

    @classmethod
    def zeros(
        cls,
        num_experts: int,
        outputs: int,
        in_features: int,
        device: torch.device | str = "cpu",
        *,
        make: MakeZeros = torch.zeros,
    ) -> TargetSums:
        """No tokens yet. make: the cross sums."""
        return cls(
            make(num_experts, outputs, in_features, device=device),
            torch.zeros(num_experts, outputs, device=device),
        )

    def add_(self, expert: int, targets: Tensor, inputs: Tensor, weights: Tensor) -> None:
        """Accumulate, in place, tokens of one expert: targets [n, outputs], inputs [n, in_features], weights [n]."""
        weighted = targets.float() * weights[:, None]
        self.cross_sum[expert].addmm_(weighted.T, inputs.float())
        self.output_sum[expert] += weighted.sum(0)

    def mapped(self, weights: Tensor) -> TargetSums:
        """The sums for the outputs `weights` @ y, [num_experts, out_features, outputs]."""
        weights = weights.float()
        return TargetSums(torch.bmm(weights, self.cross_sum), torch.bmm(weights, self.output_sum[..., None])[..., 0])


def bounded(lacking: Tensor, own: Tensor) -> Tensor:
    """What a part of the model is asked to make up for, [tokens, outputs]: of each token no more than it gives to it.

    lacking: what the residual stream lacks. own: the outputs of the part in the original. Some tokens of real models
    lack hundreds of times what a layer adds to them (massive activations that came out differently); trying to return
    that bends the weights for all other tokens, in vain.
    """
    lacking, own = lacking.float(), own.float()
    share = own.norm(dim=-1, keepdim=True) / lacking.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return lacking * share.clamp_max(1)


@dataclass(frozen=True)
class Goal:
    """What a projection is to be coded and corrected toward.

    weights: W* of every expert, [num_experts, out_features, in_features] float32. mean: of the wanted outputs,
    [num_experts, out_features]. Their deviation is none of it: a part of it no weights can give, and outputs stretched
    to have all of it are further from those wanted.
    """

    weights: Tensor
    mean: Tensor


def goal_of(
    weights: Tensor, targets: TargetSums, moments: InputMoments, prior_tokens: float, *, team: Team = ALONE
) -> Goal:
    """What these sums ask of every expert. team: shares them; all of it gets the result, which is that of one process.

    weights: the original ones, [num_experts, out_features, in_features]. moments: of the inputs. prior_tokens: virtual
    tokens of all experts for which the original weights give what is wanted (InputMoments.expert_moments).
    """
    experts = team.share(len(weights))
    goals = weights.new_empty(len(experts), *weights.shape[1:], dtype=torch.float32)
    means = goals.new_empty(goals.shape[:2])
    prior = prior_tokens * moments.mass.sum() / moments.tokens.sum().clamp_min(1)
    pooled_mean = moments.pooled_mean()
    for place, expert in enumerate(experts):
        weight = weights[expert].float()
        total = (moments.mass[expert] + prior).clamp_min(1e-12)
        lacking = (targets.cross_sum[expert] - weight @ moments.outer_sum[expert]).double() / total
        second_moment = moments.expert_moments(expert, prior_tokens)[0].double()
        needed = TOKENS_PER_CHANNEL * len(second_moment)
        strength = RIDGE * max(1.0, needed / max(1.0, float(moments.tokens[expert])))
        second_moment.diagonal().add_(strength * second_moment.diagonal().mean().clamp_min(1e-12))
        change = torch.cholesky_solve(lacking.T, torch.linalg.cholesky(second_moment)).T
        goals[place] = weight + change.float()
        means[place] = (targets.output_sum[expert] + prior * (weight @ pooled_mean)) / total
    return Goal(*(gather(team, own, len(weights)) for own in (goals, means)))
