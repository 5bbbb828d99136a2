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

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kbvq.codes.level_choice import NUM_BINS, best_tail, value_histogram
from kbvq.method.error_feedback import channel_order, error_passing, target_variances
from kbvq.method.shared_basis import shared_low_rank
from kbvq.method.vector_quantization import expert_factor, row_scales
from kbvq.models.calibration import LayerRunner, observe_banks, run_and_watch
from kbvq.models.moe_adapters import ExpertBank
from kbvq.quantization.matching import token_weights
from kbvq.quantization.row_importance import Importance, row_importance, uses_importance
from kbvq.recipes import CODES, Recipe
from kbvq.structures import PROJECTIONS, InputMoments, MakeZeros

SUPER_QUANTILE = 0.995
SUPER_SHARE = 0.1
"""A super expert's largest output lies above that quantile of all experts and above that share of the largest of all
(Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models")."""

SUPER_MEDIANS = 20.0
"""And above so many medians, which the paper does not ask: else every model would have some."""


EXPONENTS = (0.25, 1.25)
"""Bounds on how KL grows with the energy of the noise: as its root where the model saturates, in proportion where it
does not; the rest of the range is for the sampling error of two probes."""


_LARGEST_VARIANCE = 10.0
"""Of the error of a row that hardly counts, in that of rows alike: about its whole energy at 2 bits."""

_Key = TypeVar("_Key", bound=Hashable)

Site = tuple[ExpertBank, str]
"""A projection of a bank."""


def probed_rates(recipe: Recipe) -> tuple[int, int]:
    """The two code rates whose noise is measured: of those that the codebook has the ones around the bits per weight
    that the budget spends."""
    rates = sorted(CODES[recipe.codebook])
    lower = max(place for place, rate in enumerate(rates[:-1]) if rate <= max(recipe.bits, rates[0]))
    return rates[lower], rates[lower + 1]


@dataclass(frozen=True)
class Energies:
    """Of the noise and of the errors of a projection, as multiples of the noise of the lowest probed rate.

    noise: by code bits, of what the probed rates are probed with.
    errors: by (code bits, rank of the shared basis), expected of the quantization. Low rates grow faster than their
        distortion, because error feedback then feeds back more; and a trellis code errs more than its noise where
        weights lie far out in the tails, which on massive activations can cost more than all others.
    bias_share: share of the error of the outputs that is constant over tokens, which a bias takes away.
    shares: of each expert in what the errors cost the layer's outputs when all experts have one rate.
    """

    noise: dict[int, float]
    errors: dict[tuple[int, int], float]
    bias_share: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Of one projection of a bank.

    divergences: by code bits, KL(original ‖ disturbed) per token when it alone is disturbed by the noise of that rate,
        at the rates that were probed.
    """

    divergences: dict[int, float]
    energies: Energies

    @property
    def exponent(self) -> float:
        """How the divergence grows with the energy of the noise, from the two probes: 1 for a second-order effect, less
        where the model saturates (the first layers of a real model: about ½)."""
        low, high = min(self.divergences), max(self.divergences)
        noise = self.energies.noise
        if min(noise[low], noise[high], *self.divergences.values()) <= 0 or noise[low] <= noise[high]:
            return 1.0
        slope = math.log(self.divergences[low] / self.divergences[high]) / math.log(noise[low] / noise[high])
        return min(max(slope, EXPONENTS[0]), EXPONENTS[1])

    def predict(self, bits: int | Mapping[int, float], rank: int, *, bias: bool) -> float:
        """Expected KL per token when the projection is stored with so many code bits, this rank of the shared basis,
        and with or without a bias: on the power law through the probes, from the nearer of them.

        bits: of all experts, or each rate with the share (Energies.shares) of the experts that have it.

        Noise larger than what was probed is not trusted to saturate: beside the noise of all other projections it does
        not, and a rate that is too low would look cheap.
        """
        shares = {bits: 1.0} if isinstance(bits, int) else bits
        mean = sum(rate * share for rate, share in shares.items())
        nearest = min(self.divergences, key=lambda rate: abs(rate - mean))
        energy = sum(share * self.energies.errors[rate, rank] for rate, share in shares.items())
        energy *= 1 - self.energies.bias_share * bias
        energy /= max(self.energies.noise[nearest], 1e-30)
        return self.divergences[nearest] * energy ** (max(self.exponent, 1.0) if energy > 1 else self.exponent)


@dataclass(frozen=True)
class LayerProbe:
    """outputs: the layer's, [windows, tokens, hidden_size]. energies: of its sites. peaks: largest absolute output of
    each expert by bank, [num_experts] float32."""

    outputs: Tensor
    energies: dict[Site, Energies]
    peaks: dict[ExpertBank, Tensor]


def probe_layer(
    layer: nn.Module,
    layer_path: str,
    banks: list[ExpertBank],
    recipe: Recipe,
    *,
    run: LayerRunner,
    inputs: Tensor,
    disturbed: dict[tuple[Site, int], Tensor],
    num_probed: int,
    rates: tuple[int, ...],
    seed: int,
) -> LayerProbe:
    """Run a decoder layer of the original model: on all windows, on the first `num_probed` with the noise of each of
    its projections at each rate, and on those that come disturbed from the layers before.

    layer: materialised, at `layer_path` of its model; its banks' modules are replaced. inputs: [windows, tokens,
    hidden_size] on the CPU. disturbed: by site and rate, [num_probed, tokens, hidden_size]; replaced by the layer's
    outputs, and joined by those of its own sites. rates: code bits whose noise is taken, the same noise at each but for
    its size, so that the differences between them are not those of two draws.
    """
    observed = observe_banks(layer, layer_path, banks)
    outputs, moments = run_and_watch(run, inputs, observed, PROJECTIONS, by_routing=recipe.routing_weighted)
    for bank, module in observed.items():
        order = module.sort_channels_(moments[bank]["down_proj"], vector_dim=1)
        moments[bank]["down_proj"].reorder_(order)
    peaks = {bank: module.peaks.cpu() for bank, module in observed.items()}
    importance: dict[ExpertBank, Importance] = {}
    if uses_importance(recipe) or recipe.expert_rates:
        importance = row_importance(run, inputs, token_weights(outputs), observed, recipe)
    generator = torch.Generator().manual_seed(seed)
    for probe, states in disturbed.items():
        disturbed[probe] = run.batch(states).cpu()
    energies = {}
    for bank, module in observed.items():
        for projection in PROJECTIONS:
            weights = module.weights[projection]
            site = bank, projection
            found = importance.get(bank)
            law = noise_law(
                weights,
                moments[bank][projection],
                recipe,
                rates,
                importance=found.rows if found and uses_importance(recipe) and projection == PROJECTIONS[0] else None,
                costs=None if found is None else found.errors[projection],
                make=run.statistics.make,
            )
            energies[site] = law.energies
            white = law.white(generator)
            for rate in rates:
                module.set_(projection, law.noise(white, rate).add_(weights), None)
                disturbed[site, rate] = run.batch(inputs[:num_probed]).cpu()
            module.set_(projection, weights, None)
            del law, white  # before those of the next projection
    return LayerProbe(outputs, energies, peaks)


def divergences(
    logits: Callable[[Tensor], Tensor], reference: Tensor, disturbed: Mapping[_Key, Tensor]
) -> dict[_Key, float]:
    """Mean over tokens of KL(original ‖ disturbed) by the keys of `disturbed`, from the last layer's outputs [windows,
    tokens, hidden_size]; the original's predictions are made once for all."""
    totals = dict.fromkeys(disturbed, 0.0)
    for window, states in enumerate(reference):
        log_p = logits(states[None])[0].float().log_softmax(-1)
        p = log_p.exp()
        for key, others in disturbed.items():
            # Both by the same function, so that its error cancels: 8e-6 at 49152 entries, which against the bare logits
            # would be more than what a projection at 4 bits costs.
            log_q = logits(others[window][None])[0].float().log_softmax(-1)
            totals[key] += (p * (log_p - log_q)).sum(-1).sum().item()
    return {key: total / (len(reference) * reference.shape[1]) for key, total in totals.items()}


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
class NoiseLaw:
    """The quantization error's law: (W − Ŵ) M = white · deviations, channels in `order`.

    spread: [E, out_features], row scales. factor: [E, n, n] M. deviations: by rate, [E, n].
    """

    order: Tensor
    spread: Tensor
    factor: Tensor
    deviations: dict[int, Tensor]
    energies: Energies

    def white(self, generator: torch.Generator) -> Tensor:
        """Unit-Gaussian values [E, out_features, n] float32."""
        return torch.randn((*self.spread.shape, len(self.order)), generator=generator).to(self.spread.device)

    def noise(self, white: Tensor, rate: int) -> Tensor:
        """Noise of a rate [E, out_features, n] float32 from white values."""
        noise, back, deviations = torch.empty_like(white), self.order.argsort(), self.deviations[rate]
        for expert, of_expert in enumerate(white):  # one at a time: copies of all experts are large
            scaled = of_expert * self.spread[expert][:, None] * deviations[expert]
            noise[expert] = torch.linalg.solve_triangular(self.factor[expert], scaled, upper=True, left=False)[:, back]
        return noise


def noise_law(
    weights: Tensor,
    moments: InputMoments,
    recipe: Recipe,
    probed: tuple[int, ...],
    *,
    importance: Tensor | None = None,
    costs: Tensor | None = None,
    make: MakeZeros = torch.zeros,
) -> NoiseLaw:
    """Of a projection, for the probed code rates. importance: as of quantize_projection. costs: of a squared error of
    an output of each expert, [E] (Importance.errors), None for the mass of its tokens. make: the factors of all
    experts."""
    order = channel_order(moments.pooled_second_moment(), 1)
    rates = {rate: code.distortion for rate, code in CODES[recipe.codebook].items()}
    residuals = _Residuals(weights, moments, recipe)
    spread = weights.new_empty(weights.shape[:2], dtype=torch.float32)
    # Summed on the device: a GPU would be waited for at every number that the host asks for.
    energy = torch.zeros(len(rates), len(residuals.ranks), dtype=torch.float64, device=weights.device)
    constant = energy.new_zeros(())
    sizes = energy.new_zeros(len(residuals.ranks), NUM_BINS)
    n = weights.shape[2]
    factors = make(len(weights), n, n, device=weights.device)
    deviations: dict[int, list[Tensor]] = {rate: [] for rate in probed}
    shares = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    costs = moments.mass if costs is None else costs
    tokens = moments.tokens.tolist()
    for expert in range(len(weights)):
        second_moment, mean = moments.expert_moments(expert, recipe.prior_tokens)
        factors[expert] = factor = expert_factor(second_moment[order][:, order], tokens[expert], recipe)
        passing, diagonal = error_passing(factor), factor.diagonal().square()
        variances_of_rank, masses = [], []
        for place, rank in enumerate(residuals.ranks):
            residual = residuals.of(expert, rank)
            scales = row_scales(residual)
            if not rank:
                spread[expert] = scales
            scaled = residual[:, order] / scales[:, None]
            variances_of_rank.append(scaled.square().mean(0))
            masses.append(scales.square().sum())
            if recipe.codebook == "trellis":  # the tables of others are fitted to the weights
                sizes[place] += value_histogram(scaled, moments.mass[expert] * scales.square(), diagonal)
        own, mass = torch.stack(variances_of_rank, 1), moments.mass[expert] * torch.stack(masses)  # [n, ranks], [ranks]
        for place, (rate, distortion) in enumerate(rates.items()):
            variances = distortion * diagonal[:, None] * target_variances(passing, own, distortion)
            energy[place] += mass * variances.sum(0)
            if rate in probed:
                deviations[rate].append(variances[:, 0].sqrt())
            if rate == probed[0]:
                shares[expert] = costs[expert] * masses[0] * variances[:, 0].sum()
                # The constant input in the coordinates of M: what it sums up of the error is the same for all tokens.
                direction = torch.linalg.solve_triangular(factor, mean[order][:, None], upper=True)[:, 0]
                constant += mass[0] * (variances[:, 0] * direction.square()).sum()
    if importance is not None:
        spread *= _row_deviations(spread, importance)
    noise = {rate: energy[list(rates).index(rate), 0].item() for rate in probed}
    lowest = max(noise[probed[0]], 1e-30)
    if recipe.codebook == "trellis":
        for place, (rate, distortion) in enumerate(rates.items()):
            energy[place] *= energy.new_tensor([best_tail(rate, of_rank)[1] / distortion for of_rank in sizes])
    options = ((rate, rank) for rate in rates for rank in residuals.ranks)
    return NoiseLaw(
        order,
        spread,
        factors,
        {rate: torch.stack(of_rate) for rate, of_rate in deviations.items()},
        Energies(
            {rate: of_rate / lowest for rate, of_rate in noise.items()},
            dict(zip(options, (energy.flatten() / lowest).tolist(), strict=True)),
            constant.item() / lowest,
            tuple((shares / shares.sum().clamp_min(1e-30)).tolist()),
        ),
    )


def _row_deviations(spread: Tensor, importance: Tensor) -> Tensor:
    """By what the errors of rows that differ in importance deviate from those of rows alike, [E, rows]: weighted, all
    have the same, but none more than its whole row. spread: of the rows, [E, rows]."""
    mass = (spread.square() * importance).clamp_min(1e-30)
    variances = mass.log().mean(1, keepdim=True).exp() / mass
    return variances.clamp_max(_LARGEST_VARIANCE).sqrt()


class _Residuals:
    """What is left to the codes by the rank of the shared basis, of an expert at a time: all at once would be as many
    copies of the weights as there are ranks. ranks: 0 first."""

    def __init__(self, weights: Tensor, moments: InputMoments, recipe: Recipe) -> None:
        self._weights, ranks = weights, recipe.ranks(weights.shape[-1])
        self.ranks = sorted({0, *ranks})
        if max(ranks):
            moment = moments.pooled_second_moment() if recipe.klt else None
            self._basis, self._coefficients = shared_low_rank(weights, moment, max(ranks))

    def of(self, expert: int, rank: int) -> Tensor:
        """[out_features, in_features] float32."""
        weight = self._weights[expert].float()
        if not rank:
            return weight
        # The directions come in descending order, so those of a lower rank are the first ones.
        return weight - self._coefficients[expert][:, :rank] @ self._basis[:rank]
