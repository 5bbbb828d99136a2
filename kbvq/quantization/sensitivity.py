"""How much the quantization of each projection would change the model's predictions, measured before it is done.

Error feedback leaves an error whose statistics are known beforehand: in the coordinates of the factor M of the inputs'
second moment, column j of (W − Ŵ) M has variance distortion · scale² · M_jj² · V_j, V the variance of the targets
(error_feedback). So noise of that law stands in for the error: the layer is run with it on some of the windows, what
comes out walks through the original layers that follow, and at the end the KL divergence of the next-token
probabilities is measured. Errors of a layer's output do not tell it: on the bundled model the same relative change
costs four to nine times as much KL when it comes from gate and up, whose errors leave through the directions that down
writes, as when it comes from down, whose own are spread over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kbvq.method.error_feedback import channel_order, target_variances, upper_factor
from kbvq.method.shared_basis import shared_low_rank
from kbvq.method.vector_quantization import row_scales
from kbvq.models.calibration import LayerRunner, observe_banks, run_and_watch
from kbvq.models.moe_adapters import ExpertBank
from kbvq.recipes import CODES, Recipe
from kbvq.structures import PROJECTIONS, InputMoments

SUPER_QUANTILE = 0.995
SUPER_SHARE = 0.1
"""A super expert's largest output lies above that quantile of all experts and above that share of the largest of all
(Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models")."""

SUPER_MEDIANS = 20.0
"""And above so many medians, which the paper does not ask: else every model would have some."""


Site = tuple[ExpertBank, str]
"""A projection of a bank."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one projection of a bank.

    divergence: KL(original ‖ disturbed) per token when it alone is disturbed, by the noise of the rate that was probed.
    growth: by (code bits, rank of the shared basis), the energy of that noise as a multiple of the probed one's, which
        has rank 0. Low rates grow faster than their distortion, because error feedback then feeds back more.
    bias_share: share of the error of its outputs that is constant over tokens, which a bias takes away.
    """

    divergence: float
    growth: dict[tuple[int, int], float]
    bias_share: float

    def predict(self, bits: int, rank: int, *, bias: bool) -> float:
        """Expected KL per token when the projection is stored with so many code bits, this rank of the shared basis,
        and
        with or without a bias."""
        return self.divergence * self.growth[bits, rank] * (1 - self.bias_share * bias)


@dataclass(frozen=True)
class LayerProbe:
    """outputs: the layer's, [windows, tokens, hidden_size]. growth, bias_shares: of its sites (see Sensitivity). peaks:
    largest absolute output of each expert by bank, [num_experts] float32."""

    outputs: Tensor
    growth: dict[Site, dict[tuple[int, int], float]]
    bias_shares: dict[Site, float]
    peaks: dict[ExpertBank, Tensor]


def probe_layer(
    layer: nn.Module,
    layer_path: str,
    banks: list[ExpertBank],
    recipe: Recipe,
    *,
    run: LayerRunner,
    inputs: Tensor,
    disturbed: dict[Site, Tensor],
    num_probed: int,
    bits: int,
    seed: int,
) -> LayerProbe:
    """Run a decoder layer of the original model: on all windows, on the first `num_probed` with the noise of each of
    its projections, and on those that come disturbed from the layers before.

    layer: materialised, at `layer_path` of its model; its banks' modules are replaced. inputs: [windows, tokens,
    hidden_size] on the CPU. disturbed: by site, [num_probed, tokens, hidden_size]; replaced by the layer's outputs, and
    joined by those of its own sites. bits: the rate whose noise is taken.
    """
    observed = observe_banks(layer, layer_path, banks)
    outputs, moments = run_and_watch(run, inputs, observed, PROJECTIONS, by_routing=recipe.routing_weighted)
    for bank, module in observed.items():
        order = module.sort_channels_(moments[bank]["down_proj"], vector_dim=1)
        moments[bank]["down_proj"] = moments[bank]["down_proj"].reorder(order)
    peaks = {bank: module.peaks.cpu() for bank, module in observed.items()}
    generator = torch.Generator().manual_seed(seed)
    for module in observed.values():
        module.watch_()
    for site, states in disturbed.items():
        disturbed[site] = run.batch(states).cpu()
    growth, bias_shares = {}, {}
    for bank, module in observed.items():
        for projection in PROJECTIONS:
            weights = module.weights[projection]
            site = bank, projection
            law = _noise_law(weights, moments[bank][projection], recipe, bits)
            growth[site], bias_shares[site] = law.growth, law.bias_share
            module.set_(projection, weights.float() + law.draw(generator), None)
            disturbed[site] = run.batch(inputs[:num_probed]).cpu()
            module.set_(projection, weights, None)
    return LayerProbe(outputs, growth, bias_shares, peaks)


def divergence(logits: Callable[[Tensor], Tensor], reference: Tensor, disturbed: Tensor) -> float:
    """Mean over tokens of KL(original ‖ disturbed), from the last layer's outputs [windows, tokens, hidden_size]."""
    total = 0.0
    for original, other in zip(reference, disturbed, strict=True):
        wanted, found = (logits(states[None])[0].float().log_softmax(-1) for states in (original, other))
        total += F.kl_div(found, wanted, reduction="sum", log_target=True).item()
    return total / (len(reference) * reference.shape[1])


def super_experts(peaks: dict[str, Tensor]) -> dict[str, list[int]]:
    """Experts whose massive outputs the model depends on, by the path of their bank; banks without any are left out.

    peaks: by bank, [num_experts], of the whole model.
    """
    everyone = torch.cat(list(peaks.values()))
    floor = max(
        everyone.quantile(SUPER_QUANTILE).item(),
        SUPER_SHARE * everyone.max().item(),
        SUPER_MEDIANS * everyone.median().item(),
    )
    found = {path: (peak >= floor).nonzero().flatten().tolist() for path, peak in peaks.items()}
    return {path: experts for path, experts in found.items() if experts}


@dataclass(frozen=True)
class _NoiseLaw:
    """The quantization error's law at one rate: (W − Ŵ) M = white · deviations, channels in `order`.

    spread: [E, out_features], row scales. factor: [E, n, n] M. deviations: [E, n]. growth, bias_share: see Sensitivity.
    """

    order: Tensor
    spread: Tensor
    factor: Tensor
    deviations: Tensor
    growth: dict[tuple[int, int], float]
    bias_share: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """Noise [E, out_features, n] float32."""
        shape = (*self.spread.shape, len(self.order))
        white = torch.randn(shape, generator=generator).to(self.spread.device)
        white *= self.spread[..., None] * self.deviations[:, None]
        noise = torch.linalg.solve_triangular(self.factor, white, upper=True, left=False)
        return noise[..., self.order.argsort()]


def _noise_law(weights: Tensor, moments: InputMoments, recipe: Recipe, bits: int) -> _NoiseLaw:
    order = channel_order(moments.pooled_second_moment(), 1)
    rates = {rate: code.distortion for rate, code in CODES[recipe.codebook].items()}
    residuals = _residuals(weights.float(), moments, recipe)
    spreads = {rank: row_scales(residual) for rank, residual in residuals.items()}
    energy = {(rate, rank): 0.0 for rank in residuals for rate in rates}
    factors, deviations, constant = [], [], 0.0
    for expert in range(len(weights)):
        second_moment, mean = moments.expert_moments(expert, recipe.prior_tokens)
        factor = upper_factor(second_moment[order][:, order], recipe.damping)
        diagonal = factor.diagonal().square()
        for rank, residual in residuals.items():
            own = (residual[expert][:, order] / spreads[rank][expert, :, None]).square().mean(0)
            mass = float(moments.mass[expert] * spreads[rank][expert].square().sum())
            for rate, distortion in rates.items():
                variances = distortion * diagonal * target_variances(factor, own, distortion)
                energy[rate, rank] += mass * variances.sum().item()
                if (rate, rank) == (bits, 0):
                    deviations.append(variances.sqrt())
                    # The constant input in the coordinates of M: what it sums up of the error is the same for all
                    # tokens.
                    direction = torch.linalg.solve_triangular(factor, mean[order][:, None], upper=True)[:, 0]
                    constant += mass * (variances * direction.square()).sum().item()
        factors.append(factor)
    probed = max(energy[bits, 0], 1e-30)
    return _NoiseLaw(
        order,
        spreads[0],
        torch.stack(factors),
        torch.stack(deviations),
        growth={option: of_option / probed for option, of_option in energy.items()},
        bias_share=constant / probed,
    )


def _residuals(weights: Tensor, moments: InputMoments, recipe: Recipe) -> dict[int, Tensor]:
    """What is left to the codes, [E, out_features, in_features], by the rank of the shared basis."""
    ranks = recipe.ranks(weights.shape[-1])
    residuals = {0: weights}
    if max(ranks):
        moment = moments.pooled_second_moment() if recipe.klt else None
        basis, coefficients = shared_low_rank(weights, moment, max(ranks))
        # The directions come in descending order, so those of a lower rank are the first ones.
        residuals |= {rank: weights - coefficients[..., :rank] @ basis[:rank] for rank in ranks if rank}
    return residuals
